"""LexiconReward is VADER, times a scale."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_rlhf.rewards import AbstractReward, LexiconReward, RewardOutput, checked_score
from lightning_rlhf.types import Prompt, Response


pytest.importorskip("vaderSentiment")

PROMPT = Prompt(index=3, ids=(1,), text="Say something.")


def response(text: str) -> Response:
    return Response(ids=(1, 2), text=text, finish_reason="eos")


def score(reward: AbstractReward, *texts: str) -> torch.Tensor:
    return checked_score(reward, [PROMPT] * len(texts), [response(text) for text in texts])


def test_one_word_scores_as_the_lexicon_and_the_formula_say() -> None:
    """VADER: "good" has valence 1.9 and "bad" -2.5 in the lexicon; compound = v / sqrt(v^2 + 15), to four decimals."""
    expected = [round(valence / math.sqrt(valence**2 + 15), 4) for valence in (1.9, -2.5)]
    torch.testing.assert_close(score(LexiconReward(), "good", "bad"), torch.tensor(expected, dtype=torch.float64))


def test_unknown_words_and_silence_score_zero() -> None:
    torch.testing.assert_close(score(LexiconReward(), "", "xyzzy plugh"), torch.zeros(2, dtype=torch.float64))


def test_negation_turns_the_sign() -> None:
    praise, negated = score(LexiconReward(), "This is good.", "This is not good.")
    assert negated < 0 < praise


def test_scale_multiplies_and_bounds() -> None:
    gush = "love love love wonderful great happy superb excellent " * 5
    plain, scaled = score(LexiconReward(), gush), score(LexiconReward(scale=4.0), gush)
    torch.testing.assert_close(scaled, 4.0 * plain)
    assert 3.9 < scaled.item() <= 4.0


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_scale_must_be_positive_and_finite(scale: float) -> None:
    with pytest.raises(ValueError, match="finite scale > 0"):
        LexiconReward(scale)


def test_an_empty_batch_has_no_rewards() -> None:
    assert score(LexiconReward()).shape == (0,)


class ConstantReward(AbstractReward):
    """Returns what it is told to."""

    def __init__(self, mean: torch.Tensor) -> None:
        self.mean = mean

    def score(self, prompts: object, responses: object) -> RewardOutput:
        return RewardOutput(self.mean)


def test_checked_score_names_the_prompt_of_a_reward_that_is_not_finite() -> None:
    with pytest.raises(ValueError, match=r"ConstantReward.score returned nan for prompt 3, response 'b'"):
        score(ConstantReward(torch.tensor([0.0, math.nan])), "a", "b")


def test_checked_score_counts_the_rewards() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 1\) for 2 responses"):
        score(ConstantReward(torch.zeros(2, 1)), "a", "b")
