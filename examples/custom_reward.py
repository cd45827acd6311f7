"""A reward of your own: short and polite answers are good answers.

Run it from this folder, or with this folder on PYTHONPATH:

    lightning-rlhf fit --config quickstart --data.labeler=RewardLabeler --data.labeler.reward=custom_reward.MyReward
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_rlhf.rewards.base import AbstractReward, RewardOutput
from lightning_rlhf.types import Prompt, Response


class MyReward(AbstractReward):
    """Rewards polite words and takes something off for every word.

    Args:
        polite: words that earn 1 each.
        price: taken off for each word of the answer, >= 0.
    """

    def __init__(self, polite: tuple[str, ...] = ("please", "thanks", "sorry", "welcome"), price: float = 0.05) -> None:
        self.polite = frozenset(polite)
        self.price = price

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        """Score each response by itself; the prompt plays no part."""
        words = [[word.strip(".,!?") for word in response.text.lower().split()] for response in responses]
        rewards = [sum(word in self.polite for word in answer) - self.price * len(answer) for answer in words]
        return RewardOutput(mean=torch.tensor(rewards, dtype=torch.float64))
