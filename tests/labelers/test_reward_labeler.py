"""RewardLabeler follows Bradley-Terry, whatever the batching; RecordedLabeler repeats the data row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_rlhf.labelers import RecordedLabeler, RewardLabeler
from lightning_rlhf.labelers.reward import Rule, verdict
from lightning_rlhf.randomness import Key
from lightning_rlhf.rewards import AbstractReward, RewardOutput
from lightning_rlhf.types import Comparison, Prompt, RecordedPair, Response


class TextReward(AbstractReward):
    """The number that the response says; counts the calls."""

    def __init__(self) -> None:
        self.calls = 0

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        self.calls += 1
        return RewardOutput(torch.tensor([float(response.text) for response in responses]))


def comparison(index: int, a: float, b: float, salt: int = 0) -> Comparison:
    """A comparison whose responses say their rewards; ``salt`` makes other tokens of the same rewards."""
    first = Response(ids=(1, salt), text=str(a), finish_reason="eos")
    second = Response(ids=(2, salt), text=str(b), finish_reason="eos")
    return Comparison(Prompt(index, (0,), f"prompt {index}"), first, second)


KEY = Key((0, 7))


def test_soft_labels_are_bradley_terry() -> None:
    (label,) = RewardLabeler(TextReward(), rule="soft").label([comparison(0, 1.5, 0.5)], KEY)
    assert label.probability == pytest.approx(1 / (1 + math.exp(-1.0)), abs=1e-12)
    assert label.meta == {"reward_a": 1.5, "reward_b": 0.5}
    assert label.status == "ok"
    assert label.cost == 1.0


def test_argmax_calls_only_equal_rewards_a_tie() -> None:
    comparisons = [comparison(0, 1.0, 0.0), comparison(1, 0.0, 1.0), comparison(2, 0.25, 0.25)]
    labels = RewardLabeler(TextReward(), rule="argmax", cost=0.5).label(comparisons, KEY)
    assert [label.probability for label in labels] == [1.0, 0.0, 0.5]
    assert [label.cost for label in labels] == [0.5, 0.5, 0.5]


def test_labels_are_sampled_anew_for_other_responses_and_other_attempts() -> None:
    """Bernoulli labels at P = 0.5: whatever names the random number, 64 pairs that differ in it differ in labels."""
    labeler = RewardLabeler(TextReward())
    pair = comparison(3, 0.0, 0.0)

    def probabilities(comparisons: Sequence[Comparison], key: Key = KEY) -> set[float | None]:
        return {label.probability for label in labeler.label(comparisons, key)}

    others = [Response((9, salt), "0.0", "eos") for salt in range(64)]
    assert probabilities([pair] * 64) in ({0.0}, {1.0})
    assert probabilities([replace(pair, a=other) for other in others]) == {0.0, 1.0}
    assert probabilities([replace(pair, b=other) for other in others]) == {0.0, 1.0}
    assert {p for attempt in range(64) for p in probabilities([pair], KEY.fold(attempt))} == {0.0, 1.0}


def test_bernoulli_labels_have_the_frequency_of_bradley_terry() -> None:
    """4000 labels at P = sigmoid(1) = 0.731: within 4 standard errors (0.028) of it, and every label is hard."""
    labels = RewardLabeler(TextReward()).label([comparison(i, 1.0, 0.0) for i in range(4000)], KEY)
    probabilities = [label.probability for label in labels]
    assert set(probabilities) == {0.0, 1.0}
    assert sum(1 for p in probabilities if p == 1.0) / 4000 == pytest.approx(1 / (1 + math.exp(-1.0)), abs=0.028)


def test_bernoulli_labels_do_not_depend_on_chunks_or_order() -> None:
    comparisons = [comparison(i, 0.1 * i, 0.5) for i in range(32)]
    labeler = RewardLabeler(TextReward())
    whole = labeler.label(comparisons, KEY)
    chunks = [label for start in range(0, 32, 5) for label in labeler.label(comparisons[start : start + 5], KEY)]
    backwards = labeler.label(comparisons[::-1], KEY)[::-1]
    assert whole == chunks == backwards


def test_the_same_prompt_twice_gets_draws_of_its_own() -> None:
    """With one shared uniform all 64 verdicts on equal rewards would agree; they do with probability 2^-63."""
    labels = RewardLabeler(TextReward()).label([comparison(5, 0.0, 0.0, salt) for salt in range(64)], KEY)
    assert len({label.probability for label in labels}) == 2


def test_rounds_draw_anew() -> None:
    comparisons = [comparison(i, 0.0, 0.0) for i in range(64)]
    labeler = RewardLabeler(TextReward())
    assert labeler.label(comparisons, Key((0, 1))) != labeler.label(comparisons, Key((0, 2)))


def test_a_chunk_is_scored_in_one_call_and_an_empty_one_in_none() -> None:
    reward = TextReward()
    labeler = RewardLabeler(reward)
    labeler.label([comparison(i, 0.0, 1.0) for i in range(3)], KEY)
    assert labeler.label([], KEY) == []
    assert reward.calls == 1


def test_a_reward_that_is_not_finite_is_an_error_not_a_label() -> None:
    with pytest.raises(ValueError, match=r"TextReward.score returned inf for prompt 9, response 'inf'"):
        RewardLabeler(TextReward()).label([comparison(9, 0.0, math.inf)], KEY)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="bernoulli, soft, argmax; got 'hard'"):
        RewardLabeler(TextReward(), rule="hard")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cost of a label must be >= 0; got -1"):
        RewardLabeler(TextReward(), cost=-1)


@given(
    st.floats(-1e6, 1e6),
    st.floats(-1e6, 1e6),
    st.sampled_from(get_args(Rule)),
    st.floats(0.0, 1.0, exclude_max=True),
)
def test_verdicts_are_probabilities_and_the_better_answer_never_loses_a_soft_one(
    a: float, b: float, rule: Rule, uniform: float
) -> None:
    probability = verdict(a, b, rule, uniform)
    assert 0.0 <= probability <= 1.0
    if rule != "bernoulli":
        assert (probability - 0.5) * (a - b) >= 0
        assert probability + verdict(b, a, rule, uniform) == pytest.approx(1.0)


def recorded(probability: float, meta: dict[str, object]) -> Comparison:
    pair = RecordedPair("1", "0", probability=probability)
    return replace(comparison(4, 1.0, 0.0), meta=meta, prompt=Prompt(4, (0,), "prompt 4", recorded=pair))


def test_recorded_labels_follow_the_side_of_the_chosen_response() -> None:
    comparisons = [recorded(0.9, {"recorded_first": True}), recorded(0.9, {"recorded_first": False})]
    labels = RecordedLabeler().label(comparisons, KEY)
    assert [label.probability for label in labels] == [0.9, pytest.approx(0.1)]
    assert [label.cost for label in labels] == [0.0, 0.0]


def test_a_prompt_without_a_recorded_pair_is_an_error() -> None:
    with pytest.raises(ValueError, match="prompt 2 has no recorded pair"):
        RecordedLabeler().label([comparison(2, 1.0, 0.0)], KEY)


def test_a_recorded_label_is_not_put_on_sampled_responses() -> None:
    with pytest.raises(ValueError, match=r"expected meta\['recorded_first'\].*prompt 4; got None"):
        RecordedLabeler().label([recorded(1.0, {"delta": 0.3})], KEY)
