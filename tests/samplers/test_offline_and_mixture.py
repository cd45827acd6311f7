"""Recorded pairs, and samplers made of samplers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import scipy.stats

from lightning_rlhf.generation.base import AbstractEngine
from lightning_rlhf.randomness import Key
from lightning_rlhf.samplers import (
    AbstractPairSampler,
    BestOfNSampler,
    MixtureSampler,
    OfflineSampler,
    PILAFSampler,
    TPILAFSampler,
    VanillaSampler,
)
from lightning_rlhf.types import Comparison, Prompt, RecordedPair, Response


CHOSEN = Response(ids=(1, 4), text="good", finish_reason="eos", source="dataset")
REJECTED = Response(ids=(2, 4), text="bad", finish_reason="eos", source="dataset")


def recorded_prompts(count: int, weight: float = 1.0) -> list[Prompt]:
    recorded = RecordedPair("good", "bad", probability=0.9, weight=weight)
    return [Prompt(i, (0,), "question", pair=(CHOSEN, REJECTED), recorded=recorded) for i in range(count)]


def test_recorded_pairs_come_in_either_order_and_say_so(toy_engine: Any) -> None:
    comparisons = OfflineSampler().sample(recorded_prompts(1000, weight=0.5), toy_engine, Key((1,)))
    for comparison in comparisons:
        first = comparison.meta["recorded_first"]
        assert (comparison.a, comparison.b) == ((CHOSEN, REJECTED) if first else (REJECTED, CHOSEN))
        assert (comparison.branch, comparison.weight, comparison.passes) == ("offline", 0.5, 0.0)
    num_first = sum(comparison.meta["recorded_first"] for comparison in comparisons)
    assert scipy.stats.binomtest(num_first, 1000, 0.5).pvalue > 1e-4
    assert toy_engine.calls == 0
    assert not OfflineSampler().needs_engine


def test_a_pair_without_a_recorded_weight_weighs_one(toy_engine: Any) -> None:
    prompt = Prompt(0, (0,), "question", pair=(CHOSEN, REJECTED))
    assert OfflineSampler().sample([prompt], toy_engine, Key((1,)))[0].weight == 1.0


def test_a_prompt_without_a_pair_is_named(toy_engine: Any) -> None:
    prompts = [*recorded_prompts(2), Prompt(2, (0,), "only a question")]
    with pytest.raises(ValueError, match=r"prompt 2 \('only a question'\) has no recorded pair.*VanillaSampler"):
        OfflineSampler().sample(prompts, toy_engine, Key((1,)))


def test_a_mixture_mixes_costs_and_needs() -> None:
    mixture = MixtureSampler([VanillaSampler(), PILAFSampler(), OfflineSampler()], weights=[1.0, 2.0, 1.0])
    assert mixture.passes_per_pair == pytest.approx((2 + 2 * 3 + 0) / 4)
    assert mixture.annotations_per_pair == 2.0
    assert mixture.needs_engine
    assert not MixtureSampler([OfflineSampler()]).needs_engine


def test_a_member_of_no_weight_draws_nothing(toy_engine: Any) -> None:
    mixture = MixtureSampler([OfflineSampler(), VanillaSampler(), OfflineSampler()], weights=[0.0, 3.0, 0.0])
    comparisons = mixture.sample([Prompt(i, (0,), "") for i in range(50)], toy_engine, Key((0,)))
    assert {comparison.meta["member"] for comparison in comparisons} == {1}


def test_members_observe_their_own_comparisons(toy_engine: Any) -> None:
    first, second = TPILAFSampler(), TPILAFSampler()
    mixture = MixtureSampler([first, second, VanillaSampler()])
    comparisons = mixture.sample([Prompt(i, (0,), "") for i in range(90)], toy_engine, Key((0,)))
    mixture.observe(comparisons)
    for member, sampler in enumerate((first, second)):
        own = {c.prompt.index for c in comparisons if c.meta["member"] == member and c.branch == "base"}
        assert {entry[0] for entry in sampler.state_dict()["prompts"]} == own
        assert own
    restarted = MixtureSampler([TPILAFSampler(), TPILAFSampler(), VanillaSampler()])
    restarted.load_state_dict(json.loads(json.dumps(mixture.state_dict())))
    assert restarted.state_dict() == mixture.state_dict()
    # frozen in its laws: the next round is the same, too
    prompts = [Prompt(i, (0,), "") for i in range(40)]
    assert restarted.sample(prompts, toy_engine, Key((1,))) == mixture.sample(prompts, toy_engine, Key((1,)))


def test_a_state_of_another_mixture_is_refused() -> None:
    state = MixtureSampler([VanillaSampler(), PILAFSampler()]).state_dict()
    with pytest.raises(ValueError, match="mixture of 2 samplers, this one has 1"):
        MixtureSampler([VanillaSampler()]).load_state_dict(state)


@pytest.mark.parametrize(
    ("samplers", "weights", "message"),
    [
        ([], None, "at least one sampler"),
        ([VanillaSampler()], [1.0, 2.0], "2 weights for 1 samplers"),
        ([VanillaSampler(), PILAFSampler()], [1.0, -1.0], ">= 0"),
        ([VanillaSampler(), PILAFSampler()], [0.0, 0.0], "not all zero"),
        ([VanillaSampler(), PILAFSampler()], [1.0, float("nan")], "finite"),
        ([MixtureSampler([VanillaSampler()])], None, "cannot hold a mixture"),
    ],
)
def test_a_mixture_that_makes_no_sense_is_refused(samplers: Any, weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixtureSampler(samplers, weights)


def test_a_member_that_loses_prompts_is_named(toy_engine: Any) -> None:
    class ForgetfulSampler(AbstractPairSampler):
        def sample(self, prompts: Sequence[Prompt], engine: AbstractEngine, key: Key) -> list[Comparison]:
            return VanillaSampler().sample(prompts[1:], engine, key)

    with pytest.raises(ValueError, match=r"ForgetfulSampler\.sample returned 2 comparisons for 3 prompts"):
        MixtureSampler([ForgetfulSampler()]).sample(recorded_prompts(3), toy_engine, Key((0,)))


def test_members_of_one_kind_draw_different_pairs(toy_engine: Any) -> None:
    """Two equal members are not two copies: each has a stream of its own."""
    prompts = [Prompt(i, (0,), "") for i in range(60)]
    left = MixtureSampler([BestOfNSampler(n=2), VanillaSampler()], weights=[1.0, 0.0])
    right = MixtureSampler([VanillaSampler(), BestOfNSampler(n=2)], weights=[0.0, 1.0])
    drawn = [[(c.a.ids, c.b.ids) for c in m.sample(prompts, toy_engine, Key((0,)))] for m in (left, right)]
    assert drawn[0] != drawn[1]
