"""Rewards: (prompt, response) -> how good the response is. A plug-in folder: subclass `AbstractReward`."""

from lightning_rlhf.rewards.base import AbstractReward, RewardOutput, checked_score
from lightning_rlhf.rewards.combine import combine, disagreement, standardised
from lightning_rlhf.rewards.lexicon import LexiconReward
from lightning_rlhf.rewards.llm import LLMScoreReward
from lightning_rlhf.rewards.model import RewardModelReward


__all__ = [
    "AbstractReward",
    "LLMScoreReward",
    "LexiconReward",
    "RewardModelReward",
    "RewardOutput",
    "checked_score",
    "combine",
    "disagreement",
    "standardised",
]
