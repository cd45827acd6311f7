"""A reward that is known without labels, as a preference model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_rlhf.preference_models.base import AbstractPreferenceModel, ModelStart, Posterior
from lightning_rlhf.rewards.base import AbstractReward, checked_score
from lightning_rlhf.runtime.plugins import check_plugin
from lightning_rlhf.types import Preference, Prompt, Response


class RewardPreferenceModel(AbstractPreferenceModel):
    """Rewards of a reward function, a reward model or an AI judge, without uncertainty; labels do not change them.

    Silver labels by an AI judge or an earlier reward model then stand beside the real ones;
    ``data.silver.kappa_labels`` scales the rewards to the real labels. With the reward of a simulated annotator a run
    shows how far the optimizer would get with a perfect preference model.

    Args:
        reward: the reward, nats of the Bradley-Terry model up to the factor ``data.silver.kappa``.
    """

    def __init__(self, reward: AbstractReward) -> None:
        check_plugin("RewardPreferenceModel.reward", reward, AbstractReward)
        self.reward = reward

    def setup(self, start: ModelStart) -> None:
        """Do nothing."""

    def fit(self, preferences: Sequence[Preference]) -> None:
        """Do nothing."""

    def posterior(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> Posterior:
        """The rewards, with a covariance of zero; see `AbstractPreferenceModel.posterior`."""
        mean = checked_score(self.reward, prompts, responses)
        return Posterior(mean, torch.zeros(len(mean), len(mean), dtype=torch.float64))
