"""Reward models that are trained in the loop, as preference models: one member, or an ensemble."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_rlhf.logprobs.compute import response_logps
from lightning_rlhf.logprobs.packing import Group
from lightning_rlhf.logprobs.scores import Pooling
from lightning_rlhf.losses.reward import bradley_terry_loss
from lightning_rlhf.preference_models.training import (
    DEFAULT_STEPS,
    AbstractRewardHead,
    AbstractTrainedModel,
    FitSteps,
    MLPs,
)
from lightning_rlhf.types import Preference


class LinearHeads(AbstractRewardHead):
    """Linear reward heads that differ by where they start (arXiv 2401.16635, ``linear`` in `RewardModule`).

    Args:
        width: numbers per feature vector.
        members: number of heads.
    """

    def __init__(self, width: int, members: int) -> None:
        super().__init__()
        self.heads = MLPs(members, (width, 1))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean reward of the members, [responses], and their rewards, [members, responses], nats."""
        rewards = self.heads(features)[..., 0]
        return rewards.mean(0), rewards

    def losses(self, features: Tensor, label: Tensor) -> Tensor:
        """Bradley-Terry loss of each pair, mean over members; [pairs]."""
        _, rewards = self(features.flatten(0, 1))
        # [members, 2 * pairs] -> two of [members, pairs]
        chosen, rejected = rewards.view(len(rewards), -1, 2).unbind(2)
        return bradley_terry_loss(chosen, rejected, label).mean(0)


class RewardModelPosterior(AbstractTrainedModel):
    """A reward model with linear heads on a language model, trained on from fit to fit by the Bradley-Terry loss.

    The posterior mean is the mean over members and the covariance is theirs, zero for one member. Members share the
    trunk and the labels, and differ by their first weights: the covariance says less than that of a Bayesian model.

    Args:
        pooling: vector of a response: ``last`` token, ``mean`` or ``sum`` over its tokens, or sum at the ``middle``
            layer.
        members: number of heads, >= 1.
        train_trunk: train the language model too; else the heads alone.
        sft_weight: weight of the language-modeling loss on preferred responses, per token, >= 0; it keeps the trunk a
            language model (GRM with SFT regularization, arXiv 2406.10216). Needs ``train_trunk``.
        fitting: steps of each fit.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        pooling: Pooling = "last",
        members: int = 1,
        train_trunk: bool = True,
        sft_weight: float = 0.0,
        fitting: FitSteps = DEFAULT_STEPS,
    ) -> None:
        super().__init__(pooling=pooling, train_trunk=train_trunk, fitting=fitting)
        if members < 1 or not 0 <= sft_weight < float("inf"):
            raise ValueError(f"members must be >= 1 and sft_weight finite and >= 0; got {members} and {sft_weight}")
        if sft_weight > 0 and not train_trunk:
            raise ValueError("sft_weight regularizes a trained trunk; set train_trunk=true, or sft_weight=0")
        self.members, self.sft_weight = members, sft_weight

    def build_head(self, width: int) -> LinearHeads:
        """A linear head per member."""
        return LinearHeads(width, self.members)

    def auxiliary_loss(self, preferences: Sequence[Preference]) -> Tensor | float:
        """Language-modeling loss on the preferred responses, mean over tokens."""
        if self.sft_weight == 0:
            return 0.0
        groups: list[Group] = []
        for preference in preferences:
            comparison = preference.comparison
            preferred = comparison.a if preference.probability >= 0.5 else comparison.b
            groups.append((comparison.prompt.ids, (preferred.ids,)))
        # -(1 / tokens) sum log pi(y_w | x)
        return -self.sft_weight * torch.cat(response_logps(self._policy, groups)).mean()
