"""T-PILAF and weighted Vanilla: what they learn, when, and that they share one expected gradient."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest

from lightning_rlhf.randomness import Key
from lightning_rlhf.samplers import PILAFSampler, TPILAFSampler, WeightedVanillaSampler
from lightning_rlhf.types import Comparison, Prompt, Response


def pretend(index: int, delta: float, probability: float, branch: str = "base") -> Comparison:
    """A finished comparison as the ledger would give it back."""
    response = Response(ids=(4,), text="", finish_reason="eos")
    meta = {"delta": delta, "tilt_probability": probability, "tilt_over_beta": 1.0}
    return Comparison(Prompt(index, (0,), ""), response, response, branch=branch, meta=meta)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Sample mean and its standard error."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values)) / len(values)


def renumbered(comparisons: list[Comparison], index: int) -> list[Comparison]:
    """The comparisons as if all came from one prompt."""
    return [replace(c, prompt=replace(c.prompt, index=index)) for c in comparisons]


def test_zz_is_learned_for_each_prompt(make_world: Any) -> None:
    worlds = [make_world(beta=0.25), make_world(beta=0.25, ids=(0, 3))]
    sampler = TPILAFSampler(limit=50.0)
    drawn: list[Comparison] = []
    for index, world in enumerate(worlds):
        drawn += renumbered(sampler.sample(world.prompts(1200), world.engine(), Key((index,))), index)
    sampler.observe(drawn)
    exact = [world.zz() for world in worlds]
    assert abs(exact[0] - exact[1]) > 0.05  # the two prompts can be told apart
    for index in (0, 1):
        values = [math.cosh(c.meta["delta"]) for c in drawn if c.prompt.index == index and c.branch == "base"]
        _, error = mean_and_error(values)
        assert sampler.estimate.zz(index) == pytest.approx(exact[index], abs=5 * error + 0.01)
    assert sampler.estimate.zz(99) == sampler.estimate.zz_bar  # never seen: the mean over prompts


def test_the_next_round_uses_what_was_learned(world: Any) -> None:
    sampler = TPILAFSampler(prior_count=0.0)
    sampler.observe([pretend(0, math.acosh(2.0), 0.5), pretend(1, math.acosh(4.0), 0.5)])
    comparisons = sampler.sample(world.prompts(3), world.engine(), Key((0,)))
    # zz is 2, 4 and, for the prompt not seen, the mean 3
    assert [c.meta["tilt_probability"] for c in comparisons] == pytest.approx([2 / 3, 4 / 5, 3 / 4])
    assert [c.weight for c in comparisons] == pytest.approx([3 / 4, 5 / 4, 1.0])


def test_seldom_seen_policy_pairs_do_not_bias_the_mean_over_prompts() -> None:
    sampler = TPILAFSampler(prior_count=0.0, decay=0.0, limit=50.0)
    # two prompts with zz = 1 and 9: a fair sampler shows base pairs of them as 1/2 to 1/10
    sampler.estimate.observe([0, 1], [0.0, math.acosh(9.0)])
    round_ = [pretend(0, 0.0, 0.5)] * 5 + [pretend(1, math.acosh(9.0), 0.9)]
    sampler.observe(round_)
    assert sampler.estimate.zz_bar == pytest.approx(5.0)


def test_tilted_pairs_teach_nothing() -> None:
    sampler = TPILAFSampler()
    sampler.observe([pretend(0, 2.0, 0.5, branch="tilt")])
    assert sampler.estimate.zz_bar == 1.0


def test_estimates_stand_still_during_a_round(world: Any) -> None:
    for sampler in (TPILAFSampler(), WeightedVanillaSampler()):
        before = sampler.state_dict()
        comparisons = sampler.sample(world.prompts(50), world.engine(), Key((1,)))
        assert sampler.state_dict() == before
        sampler.observe(comparisons)
        assert sampler.state_dict() != before


def test_in_the_first_round_t_pilaf_is_pilaf(world: Any) -> None:
    first = TPILAFSampler().sample(world.prompts(200), world.engine(), Key((1,)))
    pilaf = PILAFSampler().sample(world.prompts(200), world.engine(), Key((1,)))
    assert [(c.a.ids, c.b.ids, c.branch, c.weight) for c in first] == [
        (c.a.ids, c.b.ids, c.branch, c.weight) for c in pilaf
    ]


@pytest.mark.parametrize("make", [TPILAFSampler, WeightedVanillaSampler])
def test_a_restart_from_plain_data_goes_on_alike(world: Any, make: Any) -> None:
    sampler = make()
    sampler.observe(sampler.sample(world.prompts(50), world.engine(), Key((0,))))
    restarted = make()
    restarted.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert restarted.state_dict() == sampler.state_dict()
    rounds = [s.sample(world.prompts(50), world.engine(), Key((1,))) for s in (sampler, restarted)]
    assert rounds[0] == rounds[1]
    assert any(c.weight != 1.0 for c in rounds[0])


def test_swapped_comparisons_teach_the_same(world: Any) -> None:
    for make in (TPILAFSampler, WeightedVanillaSampler):
        straight, swapped = make(), make()
        comparisons = straight.sample(world.prompts(50), world.engine(), Key((0,)))
        straight.observe(comparisons)
        swapped.observe([c.swap() for c in comparisons])
        assert straight.state_dict() == swapped.state_dict()
        assert straight.estimate.zz_bar > 1.1


def test_another_tilt_takes_the_place_of_beta_in_zz(world: Any, make_world: Any) -> None:
    # tilting by 0.2 a policy of beta 0.5 is what T-PILAF does to a policy of beta 0.2
    sampler = TPILAFSampler(tilt=0.2, limit=50.0)
    drawn = sampler.sample(world.prompts(1500), world.engine(), Key((0,)))
    sampler.observe(drawn)
    values = [math.cosh(0.4 * c.meta["delta"]) for c in drawn if c.branch == "base"]
    mean, error = mean_and_error(values)
    assert mean == pytest.approx(make_world(beta=0.2).zz(), abs=5 * error)
    assert sampler.estimate.zz_bar == pytest.approx(mean)


def test_one_pair_cannot_decide_all() -> None:
    sampler = TPILAFSampler(limit=2.0)
    sampler.observe([pretend(0, 40.0, 0.5)])
    assert sampler.estimate.zz(0) == pytest.approx(math.exp(2.0))


def test_weighted_vanilla_has_the_expected_pairs_of_t_pilaf(make_world: Any) -> None:
    """E[w 1{pair}] of weighted Vanilla is T-PILAF's symmetrised pair law; one token, where mixing logits is exact."""
    world = make_world(beta=0.5, length=1)
    policy, plus, minus = world.law(), world.law(mix=world.beta), world.law(mix=-world.beta)
    zz = world.zz()
    t_pilaf: dict[Any, float] = defaultdict(float)
    for a in policy:
        for b in policy:
            t_pilaf[min(a, b), max(a, b)] += (policy[a] * policy[b] + zz * plus[a] * minus[b]) / (1 + zz)
    sampler = WeightedVanillaSampler(limit=50.0)
    count = 8000
    sampler.observe([pretend(0, math.acosh(zz), 0.0)])
    comparisons = sampler.sample(world.prompts(count), world.engine(), Key((3,)))
    for (a, b), expected in t_pilaf.items():
        terms = [c.weight * ({c.a.ids, c.b.ids} == {a, b}) for c in comparisons]
        mean, error = mean_and_error(terms)
        assert mean == pytest.approx(expected, abs=5 * error + 1e-9)
    mean, error = mean_and_error([c.weight for c in comparisons])
    assert mean == pytest.approx(1.0, abs=5 * error)
    # a control: without the weights the pairs are not T-PILAF's
    vanilla = {pair: sum({c.a.ids, c.b.ids} == set(pair) for c in comparisons) / count for pair in t_pilaf}
    assert max(abs(vanilla[pair] - t_pilaf[pair]) for pair in t_pilaf) > 0.02


def test_weights_are_clipped(world: Any) -> None:
    sampler = WeightedVanillaSampler(limit=0.5)
    weights = [c.weight for c in sampler.sample(world.prompts(200), world.engine(), Key((1,)))]
    assert max(weights) == pytest.approx((1 + math.exp(0.5)) / 2)
    assert min(weights) >= 1.0


@pytest.mark.parametrize("tilt", [0.0, -0.1, math.inf, math.nan])
@pytest.mark.parametrize("make", [PILAFSampler, TPILAFSampler])
def test_a_tilt_that_is_none_is_refused(make: Any, tilt: float) -> None:
    with pytest.raises(ValueError, match="tilt must be a positive number"):
        make(tilt=tilt)


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="prior_count"):
        TPILAFSampler(prior_count=-1.0)
    with pytest.raises(ValueError, match="decay"):
        TPILAFSampler(decay=1.5)
    with pytest.raises(ValueError, match="limit"):
        WeightedVanillaSampler(limit=-1.0)
