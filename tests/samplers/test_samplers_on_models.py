"""What samplers write beside the pairs: log-probabilities, implicit rewards, weights; and that chunks do not matter."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from lightning_rlhf.labelers import RewardLabeler
from lightning_rlhf.randomness import Key
from lightning_rlhf.rewards.base import AbstractReward, RewardOutput
from lightning_rlhf.samplers import (
    AbstractPairSampler,
    BestOfNSampler,
    BestWorstSampler,
    HybridSampler,
    MixtureSampler,
    OfflineSampler,
    PILAFSampler,
    PolicyWeightedSampler,
    RSOSampler,
    SIRPILAFSampler,
    TPILAFSampler,
    VanillaSampler,
    WeightedVanillaSampler,
)
from lightning_rlhf.types import Comparison, Prompt, RecordedPair, Response


class TokenReward(AbstractReward):
    """Rewards by the first token."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        return RewardOutput(torch.tensor([float(response.ids[0]) for response in responses]))


SAMPLERS: dict[str, Callable[[], AbstractPairSampler]] = {
    "vanilla": VanillaSampler,
    "best_of_n": lambda: BestOfNSampler(n=3),
    "best_worst": lambda: BestWorstSampler(TokenReward(), n=3),
    "best_worst_labeler": lambda: BestWorstSampler(labeler=RewardLabeler(TokenReward(), rule="soft"), n=3),
    "hybrid": HybridSampler,
    "pilaf": PILAFSampler,
    "t_pilaf": TPILAFSampler,
    "weighted_vanilla": WeightedVanillaSampler,
    "policy_weighted": lambda: PolicyWeightedSampler(n=4, dim=8),
    "policy_weighted_tilted": lambda: PolicyWeightedSampler(n=4, dim=8, tilt=0.5),
    "rso": lambda: RSOSampler(TokenReward(), n=4, temperature=1.0),
    "rso_policy": lambda: RSOSampler(TokenReward(), n=4, temperature=1.0, proposal="policy"),
    "sir_pilaf": lambda: SIRPILAFSampler(n=4),
    "offline": OfflineSampler,
    "mixture": lambda: MixtureSampler([VanillaSampler(), TPILAFSampler(), BestOfNSampler(n=2)]),
}
every_sampler = pytest.mark.parametrize("name", SAMPLERS)


def prompts_with_pairs(world: Any, count: int) -> list[Prompt]:
    """Prompts of different lengths, with recorded pairs for the sampler that wants them."""
    pair = tuple(Response(ids=(i, 4), text="ab"[i], finish_reason="eos", source="dataset") for i in (0, 1))
    recorded = RecordedPair(chosen="a", rejected="b", weight=2.5)
    return [Prompt(i, (0, 2, 1)[: 1 + i % 3], "text", pair=pair, recorded=recorded) for i in range(count)]  # type: ignore[arg-type]


def essence(comparison: Comparison) -> tuple[Any, ...]:
    """The sampled pairs, without the numbers that rounding may touch."""
    a, b = comparison.a, comparison.b
    return comparison.prompt.index, a.ids, a.source, b.ids, b.source, comparison.branch, comparison.passes


@every_sampler
def test_pairs_do_not_depend_on_how_a_round_is_cut_on_the_toy_engine(world: Any, toy_engine: Any, name: str) -> None:
    prompts, key = prompts_with_pairs(world, 24), Key((1, 2))
    whole = SAMPLERS[name]().sample(prompts, toy_engine, key)
    sampler = SAMPLERS[name]()
    chunks = sampler.sample(prompts[:8], toy_engine, key) + sampler.sample(prompts[8:], toy_engine, key)
    assert chunks == whole
    # two ranks, each with every other prompt
    ranks = [SAMPLERS[name]().sample(prompts[rank::2], toy_engine, key) for rank in (0, 1)]
    assert [comparison for pair in zip(*ranks, strict=True) for comparison in pair] == whole


@every_sampler
def test_pairs_do_not_depend_on_how_a_round_is_cut_on_models(world: Any, name: str) -> None:
    prompts, key = prompts_with_pairs(world, 8), Key((1, 3))
    whole = SAMPLERS[name]().sample(prompts, world.engine(), key)
    sampler, engine = SAMPLERS[name](), world.engine(rows=3)
    chunks = sampler.sample(prompts[:4], engine, key) + sampler.sample(prompts[4:], engine, key)
    assert [essence(c) for c in chunks] == [essence(c) for c in whole]
    for left, right in zip(chunks, whole, strict=True):
        assert left.weight == pytest.approx(right.weight, abs=1e-5)
        assert left.meta == pytest.approx(right.meta, abs=1e-5)


@every_sampler
def test_rounds_differ_and_keys_repeat(world: Any, toy_engine: Any, name: str) -> None:
    prompts, sampler = prompts_with_pairs(world, 40), SAMPLERS[name]()
    first = sampler.sample(prompts, toy_engine, Key((0, 0)))
    assert sampler.sample(prompts, toy_engine, Key((0, 0))) == first
    assert sampler.sample(prompts, toy_engine, Key((0, 1))) != first


@every_sampler
def test_comparisons_carry_plain_notes_in_the_order_of_the_prompts(world: Any, toy_engine: Any, name: str) -> None:
    prompts = prompts_with_pairs(world, 12)
    comparisons = SAMPLERS[name]().sample(prompts, toy_engine, Key((5,)))
    assert [c.prompt for c in comparisons] == prompts
    for comparison in comparisons:
        assert json.loads(json.dumps(comparison.meta)) == comparison.meta
        assert all(type(value) in (int, float, str, bool) for value in comparison.meta.values())


@every_sampler
def test_an_empty_chunk_gives_no_comparisons(toy_engine: Any, name: str) -> None:
    assert SAMPLERS[name]().sample([], toy_engine, Key((0,))) == []


@every_sampler
def test_a_chunk_is_one_engine_call_per_sampler(world: Any, toy_engine: Any, name: str) -> None:
    SAMPLERS[name]().sample(prompts_with_pairs(world, 30), toy_engine, Key((0,)))
    assert toy_engine.calls == {"offline": 0, "mixture": 3}.get(name, 1)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "offline"])
def test_reported_log_probabilities_are_those_of_a_fresh_forward_pass(world: Any, name: str) -> None:
    comparisons = SAMPLERS[name]().sample(world.prompts(60), world.engine(rows=7), Key((6,)))
    reported = 0
    for response in [r for c in comparisons for r in (c.a, c.b)]:
        for which, logps in (("policy", response.policy_logps), ("reference", response.reference_logps)):
            if logps is not None:
                assert logps == pytest.approx(world.logps(which, response.ids), abs=1e-5)
                reported += 1
    assert reported >= 120


@pytest.mark.parametrize("name", ["t_pilaf", "weighted_vanilla", "best_of_n"])
def test_delta_is_the_difference_of_implicit_rewards(world: Any, name: str) -> None:
    for comparison in SAMPLERS[name]().sample(world.prompts(60), world.engine(), Key((7,))):
        delta = world.implicit_reward(comparison.a.ids) - world.implicit_reward(comparison.b.ids)
        assert comparison.meta["delta"] == pytest.approx(delta, abs=1e-5)
