"""A reward around another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_rlhf.rewards.base import (
    AbstractReward,
    RewardOutput,
    RoundSamples,
    check_rows,
    columns_read,
    learns_from_samples,
    metrics_of,
)
from lightning_rlhf.runtime.plugins import check_plugin
from lightning_rlhf.types import Prompt


class AbstractWrappedReward(AbstractReward):
    """A reward that asks another one, to which it hands on everything but `score`.

    Args:
        reward: the other reward.
    """

    def __init__(self, reward: AbstractReward) -> None:
        check_plugin(f"{type(self).__name__}.reward", reward, AbstractReward)
        self.reward = reward

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Let the reward check the rows."""
        check_rows(self.reward, prompts)

    def columns_read(self, names: Sequence[str]) -> set[str]:
        """Columns that the reward reads."""
        return columns_read(self.reward, names)

    @property
    def learns_from_samples(self) -> bool:
        """Whether the reward learns from the responses of a round."""
        return learns_from_samples(self.reward)

    def learn(self, samples: RoundSamples) -> None:
        """Let the reward learn from the responses of a round."""
        if self.learns_from_samples:
            self.reward.learn(samples)

    def metrics(self) -> Mapping[str, float]:
        """Metrics of the reward."""
        return metrics_of(self.reward)

    def observe(self, output: RewardOutput) -> None:
        """Let the reward learn from a round."""
        self.reward.observe(output)

    def earned(self, output: RewardOutput) -> Tensor:
        """Rewards of a round in training, as the reward has them."""
        return self.reward.earned(output)

    def state_dict(self) -> dict[str, object]:
        """State of the reward."""
        return self.reward.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of `state_dict`."""
        self.reward.load_state_dict(state)
