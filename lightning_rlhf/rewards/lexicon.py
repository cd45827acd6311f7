"""Sentiment by a word list: an oracle reward that needs no model and no network."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lightning_rlhf.rewards.base import AbstractReward, RewardOutput
from lightning_rlhf.types import Prompt, Response


class LexiconReward(AbstractReward):
    """Rewards friendly words: the VADER compound sentiment of the response, times a scale.

    VADER (Hutto and Gilbert 2014) adds up the valences of the words it knows, minds negation, emphasis and punctuation,
    and squashes the sum into [-1, 1]. The prompt is not read; a response without any known word scores 0. The same text
    gets the same number on every machine, which makes it a good oracle for experiments.

    Args:
        scale: reward of a compound sentiment of 1, > 0; rewards lie in [-scale, scale]. With Bradley-Terry labels
            it sets how decided the oracle is: at scale 1 the friendliest answer beats the unfriendliest with P = 0.88.
    """

    def __init__(self, scale: float = 1.0) -> None:
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"LexiconReward needs a finite scale > 0; got {scale}")
        # imported here: only runs with this reward need the package
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "LexiconReward needs the package vaderSentiment, which is not installed; "
                "run: pip install vaderSentiment"
            ) from error
        self.scale = scale
        self._analyzer = SentimentIntensityAnalyzer()

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        """Score each response by its words; the prompts are not read."""
        del prompts
        compound = [self._analyzer.polarity_scores(response.text)["compound"] for response in responses]
        return RewardOutput(mean=self.scale * torch.tensor(compound, dtype=torch.float64))
