"""Preference models: rewards with their uncertainty, learnt from all labels so far."""

from lightning_rlhf.preference_models.base import AbstractPreferenceModel, ModelStart, Posterior, win_probability
from lightning_rlhf.preference_models.kernel import KernelPreferenceModel, KernelScales


__all__ = [
    "AbstractPreferenceModel",
    "KernelPreferenceModel",
    "KernelScales",
    "ModelStart",
    "Posterior",
    "win_probability",
]
