"""RSO: its pair law by enumerating pools and acceptances, its target in large pools, and its limits."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_rlhf.randomness import Key
from lightning_rlhf.rewards import LexiconReward
from lightning_rlhf.rewards.base import AbstractReward, RewardOutput
from lightning_rlhf.samplers import RSOSampler
from lightning_rlhf.samplers.rso import Proposal, accepted
from lightning_rlhf.types import Prompt, Response


class ByTokens(AbstractReward):
    """Rewards by the first token and the length."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        return RewardOutput(torch.tensor([reward_of(response.ids) for response in responses]))


def reward_of(ids: tuple[int, ...]) -> float:
    return 0.4 * ids[0] - 0.3 * len(ids)


def accepted_law(rewards: Sequence[float], count: int, temperature: float) -> dict[tuple[int, ...], float]:
    """P(positions in order of acceptance), by following every acceptance and rejection of every pass."""
    law: dict[tuple[int, ...], float] = defaultdict(float)

    def follow(found: tuple[int, ...], left: list[int], position: int, best: float, p: float) -> None:
        if len(found) == count:
            law[found] += p
            return
        if position == len(left):  # the next pass, over those that are left
            rest = [i for i in left if i not in found]
            follow(found, rest, 0, max(rewards[i] for i in rest), p)
            return
        chance = math.exp((rewards[left[position]] - best) / temperature)
        follow((*found, left[position]), left, position + 1, best, p * chance)
        if chance < 1:
            follow(found, left, position + 1, best, p * (1 - chance))

    follow((), list(range(len(rewards))), 0, max(rewards), 1.0)
    assert sum(law.values()) == pytest.approx(1.0)
    return dict(law)


@pytest.mark.parametrize(("proposal", "mix"), [("reference", -1.0), ("policy", 0.0)])
def test_pairs_follow_the_law_of_two_acceptances(world: Any, tools: Any, proposal: Proposal, mix: float) -> None:
    responses = world.law(mix)
    pairs: dict[Any, float] = defaultdict(float)
    for pool in product(responses, repeat=3):
        p = math.prod(responses[ids] for ids in pool)
        for (first, second), chance in accepted_law([reward_of(ids) for ids in pool], 2, 0.5).items():
            pairs[pool[first], pool[second]] += p * chance
    sampler = RSOSampler(ByTokens(), n=3, temperature=0.5, proposal=proposal)
    comparisons = sampler.sample(world.prompts(1500), world.engine(), Key((4,)))
    tools.assert_follows(tools.ids_of(comparisons), pairs)
    # the law is not that of two responses of the proposal
    with pytest.raises(AssertionError, match="p-value"):
        tools.assert_follows(tools.ids_of(comparisons), tools.product_law(responses, responses))
    for c in comparisons[:20]:
        assert (c.branch, c.passes, c.weight, c.a.source) == ("rso", 3.0, 1.0, proposal)
        assert c.meta["score_a"] == pytest.approx(reward_of(c.a.ids))
        assert c.meta["score_b"] == pytest.approx(reward_of(c.b.ids))


def frequencies(proposal: Tensor, rewards: Tensor, temperature: float, n: int, pools: int) -> Tensor:
    """Frequencies of ordered pairs of accepted responses over many pools; shape [responses, responses]."""
    generator = torch.Generator().manual_seed(n)
    counts = torch.zeros(len(proposal), len(proposal), dtype=torch.float64)
    for pool in torch.multinomial(proposal.expand(pools, -1), n, replacement=True, generator=generator):
        uniforms = torch.rand(2, n, generator=generator, dtype=torch.float64)
        first, second = pool[accepted(rewards[pool], 2, temperature, uniforms)]
        counts[first, second] += 1
    return counts / pools


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_large_pools_give_independent_pairs_of_the_optimal_policy(temperature: float) -> None:
    proposal = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    rewards = torch.tensor([0.0, -0.5, 0.4, 1.0], dtype=torch.float64)
    optimal = (proposal.log() + rewards / temperature).softmax(-1)
    target = optimal[:, None] * optimal
    small, large = (frequencies(proposal, rewards, temperature, n, 4000) for n in (3, 64))

    def distance(law: Tensor) -> float:
        return float((law - target).abs().sum() / 2)

    assert distance(large) < 0.03 < distance(small)
    # the finite pool falls short of the reward of the target
    expected = float(optimal @ rewards)
    assert float(proposal @ rewards) < float(small.sum(1) @ rewards) < expected - 0.05
    assert float(large.sum(0) @ rewards) == pytest.approx(expected, abs=0.03)


def test_passes_repeat_over_the_remainder() -> None:
    rewards = torch.tensor([0.0, 20.0, 10.0, -30.0], dtype=torch.float64)
    uniforms = torch.full((4, 4), 0.5, dtype=torch.float64)
    # each pass accepts its best response alone
    assert accepted(rewards, 4, 0.5, uniforms) == [1, 2, 0, 3]
    # and in a pass they are taken in the order of the pool, up to the count
    assert accepted(rewards, 3, 1e9, uniforms) == [0, 1, 2]
    law = accepted_law([0.0, 1.0, 0.5], 2, 1.0)
    generator = torch.Generator().manual_seed(0)
    counts: dict[tuple[int, ...], int] = defaultdict(int)
    for _ in range(4000):
        uniforms = torch.rand(2, 3, generator=generator, dtype=torch.float64)
        counts[tuple(accepted(torch.tensor([0.0, 1.0, 0.5]), 2, 1.0, uniforms))] += 1
    assert counts.keys() == {pair for pair, p in law.items() if p > 1e-3}
    for pair, p in law.items():
        assert counts[pair] / 4000 == pytest.approx(p, abs=0.03)


def test_the_temperature_goes_from_the_first_two_to_the_best_two(world: Any) -> None:
    prompts, key = world.prompts(30), Key((6,))
    first_two = RSOSampler(ByTokens(), n=2, temperature=math.inf).sample(prompts, world.engine(), key)
    greedy = RSOSampler(ByTokens(), n=5, temperature=1e-9).sample(prompts, world.engine(), key)
    any_two = RSOSampler(ByTokens(), n=5, temperature=math.inf).sample(prompts, world.engine(), key)
    assert [(c.a.ids, c.b.ids) for c in any_two] == [(c.a.ids, c.b.ids) for c in first_two]
    for near, far in zip(greedy, any_two, strict=True):
        assert near.meta["score_a"] >= near.meta["score_b"] - 1e-9
        assert near.meta["score_a"] >= max(far.meta["score_a"], far.meta["score_b"]) - 1e-9


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n": 1}, "n >= 2 and temperature > 0; got 1 and 0.5"),
        ({"temperature": 0.0}, "n >= 2 and temperature > 0; got 64 and 0.0"),
        ({"temperature": math.nan}, "n >= 2 and temperature > 0; got 64 and nan"),
        ({"proposal": "initial"}, "proposal must be one of reference, policy; got 'initial'"),
    ],
)
def test_arguments_out_of_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RSOSampler(LexiconReward(), **wrong)
