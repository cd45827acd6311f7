"""A reward that is worth less where it is unsure: UP-RLHF's guard against over-optimization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_rlhf.rewards.base import AbstractReward, RewardOutput, as_output
from lightning_rlhf.rewards.wrapped import AbstractWrappedReward
from lightning_rlhf.types import Prompt, Response


class UncertaintyPenalty(AbstractWrappedReward):
    """Another reward minus ``weight * (u - mean u)``, where u is its standard deviation.

    UP-RLHF, Zhai et al. 2024 (arXiv 2401.00243). The mean is taken over all training responses up to the present round,
    so that the penalty moves no reward on average. It counts in training alone: the ledger, and metrics on held-out
    answers, keep the reward itself.

    Args:
        reward: a reward that reports how unsure it is, such as an ensemble.
        weight: price of a unit of standard deviation, >= 0.
    """

    def __init__(self, reward: AbstractReward, weight: float = 1.0) -> None:
        # a negative weight would reward disagreement; NaN fails the comparison, too
        if not 0 <= weight < float("inf"):
            raise ValueError(f"UncertaintyPenalty needs a finite weight >= 0; got {weight}")
        super().__init__(reward)
        self.weight = weight
        self._count, self._sum = 0, 0.0

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        """Score each response, without the penalty."""
        output = as_output(self.reward, self.reward.score(prompts, responses), len(responses))
        # no ensemble: there is no u
        if output.std is None:
            raise ValueError(
                f"UncertaintyPenalty needs a reward that reports its std, and {type(self.reward).__name__} does not; "
                f"use an ensemble, or leave the penalty out"
            )
        return output

    def observe(self, output: RewardOutput) -> None:
        """Take the standard deviations of a round into their mean."""
        assert output.std is not None
        self._count += output.std.numel()
        self._sum += output.std.double().sum().item()
        self.reward.observe(output)

    def earned(self, output: RewardOutput) -> Tensor:
        """The reward less the penalty."""
        assert output.std is not None and self._count
        # r - weight (u - mean u)
        return self.reward.earned(output) - self.weight * (output.std - self._sum / self._count)

    def state_dict(self) -> dict[str, object]:
        """Number and sum of the standard deviations seen."""
        return {"count": self._count, "sum": self._sum, "reward": self.reward.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of `state_dict`."""
        self._count, self._sum = state["count"], state["sum"]
        self.reward.load_state_dict(state["reward"])
