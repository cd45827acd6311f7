"""Preference models: rewards with their uncertainty, learnt from all labels so far."""

from lightning_rlhf.preference_models.base import AbstractPreferenceModel, ModelStart, Posterior, win_probability
from lightning_rlhf.preference_models.epistemic import EpistemicHead, EpistemicPreferenceModel, EpistemicSize
from lightning_rlhf.preference_models.kernel import KernelPreferenceModel, KernelScales
from lightning_rlhf.preference_models.known import RewardPreferenceModel
from lightning_rlhf.preference_models.reward_model import RewardModelPosterior
from lightning_rlhf.preference_models.training import AbstractTrainedModel, FitSteps


__all__ = [
    "AbstractPreferenceModel",
    "AbstractTrainedModel",
    "EpistemicHead",
    "EpistemicPreferenceModel",
    "EpistemicSize",
    "FitSteps",
    "KernelPreferenceModel",
    "KernelScales",
    "ModelStart",
    "Posterior",
    "RewardModelPosterior",
    "RewardPreferenceModel",
    "win_probability",
]
