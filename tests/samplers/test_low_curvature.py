"""The tilts beyond DPO: single responses towards low curvature, pairs by a reward model; laws by enumerating pools."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import permutations, product
from typing import Any

import pytest
import torch

from lightning_rlhf.estimators.singles import low_curvature, pool_probabilities
from lightning_rlhf.randomness import Key
from lightning_rlhf.rewards.base import AbstractReward, RewardOutput
from lightning_rlhf.samplers import LowCurvatureSampler, SingleSampler, SIRPILAFSampler
from lightning_rlhf.types import NO_RESPONSE, Prompt, Response


class Scaled(AbstractReward):
    """Rewards by the first token, on a scale of its own."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        return RewardOutput(torch.tensor([2.0 * r.ids[0] for r in responses]))


def inverse_curvature(u: float) -> float:
    return 2 + math.exp(u) + math.exp(-u)


@pytest.mark.parametrize("point", [0.0, 0.6])
def test_kept_responses_follow_the_law_of_resampling(world: Any, tools: Any, point: float) -> None:
    law = world.law()
    reward = {ids: world.implicit_reward(ids) for ids in law}
    expected: dict[Any, float] = defaultdict(float)
    for pool in product(law, repeat=3):
        p = law[pool[0]] * law[pool[1]] * law[pool[2]]
        weights = [inverse_curvature((reward[ids] - point) / 0.25) for ids in pool]
        for ids, weight in zip(pool, weights, strict=True):
            expected[ids] += p * weight / sum(weights)
    sampler = LowCurvatureSampler(n=3, temperature=0.25)
    sampler.load_state_dict({"point": point})
    comparisons = sampler.sample(world.prompts(1500), world.engine(), Key((1,)))
    tools.assert_follows([c.a.ids for c in comparisons], dict(expected))
    for c in comparisons[:20]:
        assert c.meta["reward"] == pytest.approx(reward[c.a.ids], abs=1e-5)
        assert (c.b, c.branch, c.passes, c.is_single) == (NO_RESPONSE, "low_curvature", 3.0, True)


def test_the_reference_point_is_the_mean_of_the_pools_of_the_last_round(world: Any) -> None:
    sampler, again = LowCurvatureSampler(n=4), LowCurvatureSampler(n=4)
    comparisons = sampler.sample(world.prompts(400), world.engine(), Key((3,)))
    sampler.observe(comparisons)
    law = world.law()
    mean = sum(p * world.implicit_reward(ids) for ids, p in law.items())
    # E[r] = beta KL > 0
    assert sampler.state_dict()["point"] == pytest.approx(mean, abs=0.05)
    assert mean > 0.05
    again.load_state_dict(sampler.state_dict())
    assert again.state_dict() == sampler.state_dict()
    sampler.observe([])
    assert again.state_dict() == sampler.state_dict()


def test_single_samples_follow_the_policy(world: Any, tools: Any) -> None:
    comparisons = SingleSampler().sample(world.prompts(1500), world.engine(), Key((4,)))
    tools.assert_follows([c.a.ids for c in comparisons], world.law())
    assert {(c.branch, c.passes, c.is_single) for c in comparisons} == {("single", 1.0, True)}


def test_large_pools_give_the_tilted_law_and_an_infinite_temperature_the_policy() -> None:
    generator = torch.Generator().manual_seed(0)
    log_policy = torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(-1)
    log_reference = torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(-1)
    rewards, point = 1.5 * (log_policy - log_reference), 0.4
    exact = low_curvature(log_policy, log_reference, 1.5, torch.tensor(point)).log_probability.exp()

    def distance(n: int, temperature: float, law: torch.Tensor) -> float:
        pools = torch.multinomial(log_policy.exp().expand(4000, -1), n, replacement=True, generator=generator)
        found = torch.zeros(5, dtype=torch.float64)
        kept = pool_probabilities(rewards[pools], point, temperature)
        found.index_add_(0, pools.flatten(), kept.flatten() / len(pools))
        return float((found - law).abs().sum() / 2)

    assert distance(64, 1.0, exact) < 0.02 < distance(1, 1.0, exact)
    assert distance(64, math.inf, log_policy.exp()) < 0.01


def test_a_reward_alone_tilts_pairs_and_needs_no_reference(world: Any, tools: Any) -> None:
    law = world.law()
    pairs: dict[Any, float] = defaultdict(float)
    for pool in product(law, repeat=3):
        p = law[pool[0]] * law[pool[1]] * law[pool[2]]
        weights = {(i, j): inverse_curvature(2.0 * (pool[i][0] - pool[j][0])) for i, j in permutations(range(3), 2)}
        for (i, j), weight in weights.items():
            pairs[pool[i], pool[j]] += p * weight / sum(weights.values())
    engine = world.engine()
    engine.reference = None
    comparisons = SIRPILAFSampler(n=3, reward=Scaled(), tilt="reward").sample(world.prompts(1500), engine, Key((2,)))
    tools.assert_follows(tools.ids_of(comparisons), dict(pairs))
    first = comparisons[0]
    assert first.meta == {"reward_gap": 2.0 * (first.a.ids[0] - first.b.ids[0])}


def test_arguments_are_checked() -> None:
    for wrong in ({"n": 1}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="LowCurvatureSampler needs"):
            LowCurvatureSampler(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="SIR-PILAF tilts by policy, or by reward where one is given"):
        SIRPILAFSampler(tilt="reward")
