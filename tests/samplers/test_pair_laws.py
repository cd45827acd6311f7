"""Every sampler's pairs against its exact law, enumerated from plain forward passes of the real models."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import scipy.stats

from lightning_rlhf.randomness import Key
from lightning_rlhf.samplers import (
    HybridSampler,
    MixtureSampler,
    PILAFSampler,
    TPILAFSampler,
    VanillaSampler,
    WeightedVanillaSampler,
)
from lightning_rlhf.types import Comparison


COUNT = 2500


def blend(first: dict[Any, float], second: dict[Any, float], share: float) -> dict[Any, float]:
    """The law that follows ``second`` with probability ``share``."""
    return {pair: (1 - share) * first[pair] + share * second[pair] for pair in first}


@pytest.fixture(scope="module")
def laws(world: Any, tools: Any) -> dict[str, Any]:
    """Exact distributions of pairs."""
    policy, reference = world.law(), world.law(mix=-1.0)
    plus, minus = world.law(mix=world.beta), world.law(mix=-world.beta)
    return {
        "vanilla": tools.product_law(policy, policy),
        "hybrid": tools.product_law(policy, reference),
        "tilt": tools.product_law(plus, minus),
    }


@pytest.fixture(scope="module")
def pilaf_pairs(world: Any) -> list[Comparison]:
    """Pairs sampled by PILAF."""
    return PILAFSampler().sample(world.prompts(COUNT), world.engine(), Key((1,)))


def test_the_world_tells_the_laws_apart(pilaf_pairs: list[Comparison], laws: dict[str, Any], tools: Any) -> None:
    """A control: the tests of this file can fail, even when only two laws are exchanged."""
    drawn = tools.ids_of(pilaf_pairs)
    swapped = {(b, a): p for (a, b), p in laws["tilt"].items()}
    for wrong in (laws["vanilla"], blend(laws["vanilla"], swapped, 0.5), blend(laws["vanilla"], laws["tilt"], 0.7)):
        with pytest.raises(AssertionError, match="chi-square"):
            tools.assert_follows(drawn, wrong)


def test_vanilla_draws_two_independent_responses_of_the_policy(world: Any, laws: dict[str, Any], tools: Any) -> None:
    comparisons = VanillaSampler().sample(world.prompts(COUNT), world.engine(), Key((2,)))
    tools.assert_follows(tools.ids_of(comparisons), laws["vanilla"])
    assert {(c.a.source, c.b.source, c.branch, c.passes) for c in comparisons} == {("policy", "policy", "base", 2.0)}


def test_hybrid_draws_from_policy_and_reference_in_this_order(world: Any, laws: dict[str, Any], tools: Any) -> None:
    comparisons = HybridSampler().sample(world.prompts(COUNT), world.engine(), Key((3,)))
    tools.assert_follows(tools.ids_of(comparisons), laws["hybrid"])
    assert {(c.a.source, c.b.source, c.branch) for c in comparisons} == {("policy", "reference", "hybrid")}


def test_pilaf_is_half_vanilla_half_tilted(pilaf_pairs: list[Comparison], laws: dict[str, Any], tools: Any) -> None:
    comparisons = pilaf_pairs
    tools.assert_follows(tools.ids_of(comparisons), blend(laws["vanilla"], laws["tilt"], 0.5))
    # and each branch by itself
    tools.assert_follows(tools.ids_of(c for c in comparisons if c.branch == "base"), laws["vanilla"])
    tools.assert_follows(tools.ids_of(c for c in comparisons if c.branch == "tilt"), laws["tilt"])
    num_tilted = sum(c.branch == "tilt" for c in comparisons)
    assert scipy.stats.binomtest(num_tilted, COUNT, 0.5).pvalue > 1e-4


def test_pilaf_takes_a_tilt_other_than_beta(world: Any, tools: Any) -> None:
    comparisons = PILAFSampler(tilt=0.15).sample(world.prompts(COUNT), world.engine(), Key((5,)))
    law = tools.product_law(world.law(mix=0.15), world.law(mix=-0.15))
    tools.assert_follows(tools.ids_of(c for c in comparisons if c.branch == "tilt"), law)


def test_t_pilaf_tilts_with_probability_zz_over_one_plus_zz(world: Any, laws: dict[str, Any], tools: Any) -> None:
    sampler = TPILAFSampler()
    sampler.estimate.observe([10**6], [math.acosh(4.0)])  # zz = 4 everywhere: p = 4/5
    comparisons = sampler.sample(world.prompts(COUNT), world.engine(), Key((6,)))
    tools.assert_follows(tools.ids_of(comparisons), blend(laws["vanilla"], laws["tilt"], 0.8))
    num_tilted = sum(c.branch == "tilt" for c in comparisons)
    assert scipy.stats.binomtest(num_tilted, COUNT, 0.8).pvalue > 1e-4
    assert all(c.meta["tilt_probability"] == pytest.approx(0.8) for c in comparisons)


def test_weighted_vanilla_samples_the_pairs_of_vanilla(world: Any, tools: Any) -> None:
    drawn = [
        s.sample(world.prompts(300), world.engine(), Key((7,))) for s in (VanillaSampler(), WeightedVanillaSampler())
    ]
    assert tools.ids_of(drawn[0]) == tools.ids_of(drawn[1])


def test_a_mixture_follows_its_members(world: Any, laws: dict[str, Any], tools: Any) -> None:
    sampler = MixtureSampler([VanillaSampler(), HybridSampler(), PILAFSampler()], weights=[1.0, 2.0, 5.0])
    comparisons = sampler.sample(world.prompts(COUNT), world.engine(), Key((8,)))
    pilaf = blend(laws["vanilla"], laws["tilt"], 0.5)
    law = {
        pair: laws["vanilla"][pair] / 8 + laws["hybrid"][pair] * 2 / 8 + pilaf[pair] * 5 / 8 for pair in laws["vanilla"]
    }
    tools.assert_follows(tools.ids_of(comparisons), law)
    counts = Counter(c.meta["member"] for c in comparisons)
    expected = [COUNT / 8, COUNT * 2 / 8, COUNT * 5 / 8]
    assert scipy.stats.chisquare([counts[i] for i in range(3)], expected).pvalue > 1e-4
    # were the member's coin the mixture's coin, PILAF as the last member would never see heads
    tilted = [c.branch == "tilt" for c in comparisons if c.meta["member"] == 2]
    assert scipy.stats.binomtest(sum(tilted), len(tilted), 0.5).pvalue > 1e-4


@pytest.mark.parametrize("sampler", [PILAFSampler(), TPILAFSampler()], ids=["pilaf", "t_pilaf"])
def test_branches_never_cross(world: Any, sampler: Any) -> None:
    comparisons = sampler.sample(world.prompts(1000), world.engine(), Key((9,)))
    kinds = Counter((c.branch, c.a.source, c.b.source, c.passes) for c in comparisons)
    assert set(kinds) == {("base", "policy", "policy", 2.0), ("tilt", "plus", "minus", 4.0)}
    assert sum(c.passes for c in comparisons) / 1000 == pytest.approx(sampler.passes_per_pair, abs=0.15)


@pytest.mark.parametrize(
    "sampler",
    [VanillaSampler(), HybridSampler(), PILAFSampler(), TPILAFSampler(), WeightedVanillaSampler()],
    ids=lambda sampler: type(sampler).__name__,
)
def test_without_a_difference_between_the_models_all_samplers_are_vanilla(
    make_world: Any, tools: Any, sampler: Any
) -> None:
    world = make_world(same=True)
    comparisons = sampler.sample(world.prompts(1200), world.engine(), Key((10,)))
    tools.assert_follows(tools.ids_of(comparisons), tools.product_law(world.law(), world.law()))
    assert all(c.weight == pytest.approx(1.0) for c in comparisons)


@pytest.mark.parametrize(("temperature", "top_p"), [(0.6, 1.0), (1.0, 0.8), (1.7, 0.7)])
def test_temperature_and_nucleus_act_on_the_mixed_law(world: Any, tools: Any, temperature: float, top_p: float) -> None:
    engine = world.engine(temperature=temperature, top_p=top_p)
    comparisons = PILAFSampler().sample(world.prompts(2000), engine, Key((11,)))
    comparisons += HybridSampler().sample(world.prompts(1000), engine, Key((12,)))
    responses = [response for c in comparisons for response in (c.a, c.b)]
    for source, mix in (("policy", 0.0), ("reference", -1.0), ("plus", world.beta), ("minus", -world.beta)):
        law = world.law(mix=mix, temperature=temperature, top_p=top_p)
        tools.assert_follows([response.ids for response in responses if response.source == source], law)
