"""SIR-PILAF: its pair law by enumerating pools, its limits Vanilla, T-PILAF and best-of-N, and the secant."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import permutations, product
from typing import Any

import pytest
import torch

from lightning_rlhf.estimators import (
    log_secant_slope,
    product_pair_distribution,
    tilted_pair_distribution,
    tpilaf_pair_distribution,
)
from lightning_rlhf.randomness import Key
from lightning_rlhf.rewards.base import AbstractReward, RewardOutput
from lightning_rlhf.samplers import SIRPILAFSampler
from lightning_rlhf.samplers.best_of_n import extremes
from lightning_rlhf.samplers.sir_pilaf import pair_probabilities, resampled_pair
from lightning_rlhf.types import Prompt, Response


class Scaled(AbstractReward):
    """Rewards by the first token, on a scale of its own."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        return RewardOutput(torch.tensor([2.0 * r.ids[0] for r in responses]))


def law_of_three(law: dict[Any, float], slope: Any) -> dict[Any, float]:
    """P(first, second) of pools of three, pairs of a pool in proportion to one over their slope."""
    pairs: dict[Any, float] = defaultdict(float)
    for pool in product(law, repeat=3):
        p = law[pool[0]] * law[pool[1]] * law[pool[2]]
        weights = {(i, j): 1 / slope(pool[i], pool[j]) for i, j in permutations(range(3), 2)}
        for (i, j), weight in weights.items():
            pairs[pool[i], pool[j]] += p * weight / sum(weights.values())
    return dict(pairs)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_pairs_follow_the_law_of_resampling(world: Any, tools: Any, temperature: float) -> None:
    reward = {ids: world.implicit_reward(ids) for ids in world.law()}

    def slope(a: Any, b: Any) -> float:
        probability = sigmoid((reward[a] - reward[b]) / temperature)
        return probability * (1 - probability)

    comparisons = SIRPILAFSampler(n=3, temperature=temperature).sample(world.prompts(1500), world.engine(), Key((1,)))
    tools.assert_follows(tools.ids_of(comparisons), law_of_three(world.law(), slope))
    for c in comparisons[:20]:
        assert c.meta["delta"] == pytest.approx(reward[c.a.ids] - reward[c.b.ids], abs=1e-5)
        assert (c.branch, c.passes, c.weight) == ("sir", 3.0, 1.0)


def test_a_reward_model_tilts_by_the_secant(world: Any, tools: Any) -> None:
    own = {ids: world.implicit_reward(ids) for ids in world.law()}

    def slope(a: Any, b: Any) -> float:
        delta, gap = own[a] - own[b], 2.0 * (a[0] - b[0])
        if abs(gap - delta) < 1e-9:
            return sigmoid(delta) * sigmoid(-delta)
        return (sigmoid(gap) - sigmoid(delta)) / (gap - delta)

    comparisons = SIRPILAFSampler(n=3, reward=Scaled()).sample(world.prompts(1500), world.engine(), Key((2,)))
    tools.assert_follows(tools.ids_of(comparisons), law_of_three(world.law(), slope))


def test_large_pools_give_t_pilafs_law_of_whole_responses() -> None:
    generator = torch.Generator().manual_seed(0)
    log_policy = torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(-1)
    log_reference = torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(-1)
    beta = 0.5
    reward = beta * (log_policy - log_reference)
    exact = tpilaf_pair_distribution(log_policy, log_reference, beta)

    def distance(n: int) -> float:
        pools = torch.multinomial(log_policy.exp().expand(4000, -1), n, replacement=True, generator=generator)
        probabilities = pair_probabilities(reward[pools], reward[pools], 1.0)
        law = torch.zeros(25, dtype=torch.float64)
        index = 5 * pools[:, :, None] + pools[:, None, :]
        law.index_add_(0, index.flatten(), probabilities.flatten() / len(pools))
        return float((law.reshape(5, 5) - exact).abs().sum() / 2)

    far, near = distance(2), distance(64)
    # of two responses there is one pair, and that is Vanilla's
    vanilla = product_pair_distribution(log_policy, log_policy)
    assert far == pytest.approx(float((vanilla - exact).abs().sum() / 2), abs=0.02)
    assert near < 0.02 < far / 3
    assert near < float((tilted_pair_distribution(log_policy, log_reference, beta, 0.5) - exact).abs().sum() / 2)


def test_temperatures_reach_from_random_pairs_to_best_of_n() -> None:
    rewards = torch.tensor([0.3, -1.0, 2.0, 0.1], dtype=torch.float64)
    random = pair_probabilities(rewards, rewards, math.inf)
    torch.testing.assert_close(random, (1 - torch.eye(4, dtype=torch.float64)) / 12)
    best, worst = extremes(rewards, Key((0,)))
    cold = pair_probabilities(rewards, rewards, 1e-3)
    torch.testing.assert_close(cold[best, worst] + cold[worst, best], torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("temperature", [1e-6, 1.0, math.inf])
def test_a_candidate_never_meets_itself(uniform: float, temperature: float) -> None:
    rewards = torch.tensor([300.0, -300.0, 0.0], dtype=torch.float64)
    first, second = resampled_pair(rewards, rewards, temperature, uniform)
    assert first != second and 0 <= first < 3 and 0 <= second < 3


def test_secant_slope_equals_its_definition_and_does_not_overflow() -> None:
    delta, target = torch.meshgrid(*2 * [torch.linspace(-6, 6, 25, dtype=torch.float64)], indexing="ij")
    slope = log_secant_slope(delta, target).exp()
    direct = (target.sigmoid() - delta.sigmoid()) / (target - delta)
    tangent = delta.sigmoid() * (-delta).sigmoid()
    torch.testing.assert_close(slope, torch.where(delta == target, tangent, direct))
    near = log_secant_slope(delta, delta + 1e-4).exp()
    torch.testing.assert_close(near, ((delta + 1e-4).sigmoid() - delta.sigmoid()) / 1e-4, rtol=1e-8, atol=0)
    extreme = torch.tensor([[1e5, 1e5], [-1e5, 1e5], [1e5, 0.0]], dtype=torch.float64)
    huge = log_secant_slope(*extreme.unbind(1))
    expected = torch.tensor([-1e5, -math.log(2e5), -math.log(2e5)], dtype=torch.float64)
    torch.testing.assert_close(huge, expected)


def test_arguments_are_checked() -> None:
    for wrong in ({"n": 1}, {"temperature": 0.0}, {"temperature": math.nan}):
        with pytest.raises(ValueError, match="SIR-PILAF needs"):
            SIRPILAFSampler(**wrong)  # type: ignore[arg-type]
