"""Nash-MD's pairs against their enumerated distribution, and SPIN's recorded completions."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_rlhf.randomness import Key
from lightning_rlhf.samplers import NashMDSampler, SelfPlaySampler, cost_table
from lightning_rlhf.types import Prompt, Response


CHOSEN = Response(ids=(1, 4), text="good", finish_reason="eos", source="dataset")
REJECTED = Response(ids=(2, 4), text="bad", finish_reason="eos", source="dataset")


@pytest.mark.parametrize("mixture", [0.3, 0.8])
def test_nash_md_pairs_the_policy_with_the_mixture(world: Any, tools: Any, mixture: float) -> None:
    comparisons = NashMDSampler(mixture).sample(world.prompts(2500), world.engine(), Key((1,)))
    # softmax((1 - m) h_theta + m h_ref), enumerated from plain forward passes
    distribution = tools.product_law(world.law(), world.law(mix=-mixture))
    tools.assert_follows(tools.ids_of(comparisons), distribution)
    with pytest.raises(AssertionError, match="chi-square"):
        tools.assert_follows(tools.ids_of(comparisons), tools.product_law(world.law(mix=-mixture), world.law()))
    assert {(c.branch, c.passes) for c in comparisons} == {("nash_md", 3.0)}


@pytest.mark.parametrize("mixture", [0.0, 1.0, -0.5, float("nan")])
def test_nash_md_refuses_weights_outside_of_the_mixture(mixture: float) -> None:
    with pytest.raises(ValueError, match="mixture must be between 0 and 1"):
        NashMDSampler(mixture)


def test_self_play_prefers_the_recorded_completion(world: Any, tools: Any) -> None:
    recorded = Prompt(0, world.ids, "some text", pair=(CHOSEN, REJECTED))
    supervised = Prompt(1, world.ids, "some text", completion=REJECTED)
    sampler = SelfPlaySampler()
    pairs = sampler.sample([recorded, supervised], world.engine(), Key((2,)))
    assert [pair.a for pair in pairs] == [CHOSEN, REJECTED]
    assert [pair.b.source for pair in pairs] == ["policy", "policy"]
    assert [(label.probability, label.cost) for label in sampler.verdicts(pairs) if label] == [(1.0, 0.0)] * 2
    # the sampled responses follow the policy
    many = [Prompt(i, world.ids, "some text", completion=CHOSEN) for i in range(2500)]
    sampled = [pair.b.ids for pair in sampler.sample(many, world.engine(), Key((3,)))]
    tools.assert_follows(sampled, world.law())


def test_self_play_names_the_row_without_a_completion(world: Any) -> None:
    with pytest.raises(ValueError, match=r"prompt 7 \('some text'\) has no recorded completion.*VanillaSampler"):
        SelfPlaySampler().sample(world.prompts(1, start=7), world.engine(), Key((4,)))


def test_costs_are_in_the_table() -> None:
    table = cost_table([NashMDSampler(), SelfPlaySampler()])
    assert "| Nash-MD (Munos 2023) | π_θ | π_θ^(1−m) π_ref^m | 3 | 2 |" in table
    assert "| SPIN (Chen 2024) | data | π_θ | 1 | 0 |" in table
