"""Best-of-N: its pair law by enumerating all triples of candidates, and how ties are broken."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_rlhf.randomness import Key
from lightning_rlhf.rewards.base import AbstractReward, RewardOutput
from lightning_rlhf.samplers import BestOfNSampler
from lightning_rlhf.samplers.best_of_n import TIE, extremes
from lightning_rlhf.types import Prompt, Response


class CountReward(AbstractReward):
    """Rewards tokens with even ids; many responses tie."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        assert len(prompts) == len(responses)
        return RewardOutput(torch.tensor([sum(i % 2 == 0 for i in r.ids) for r in responses], dtype=torch.float64))


def best_of_three_law(law: dict[Any, float], score: dict[Any, float]) -> dict[Any, float]:
    """P(best, worst) of three samples, over all triples, ties broken fairly."""
    pairs: dict[Any, float] = defaultdict(float)
    for triple in product(law, repeat=3):
        p = law[triple[0]] * law[triple[1]] * law[triple[2]]
        scores = [score[ids] for ids in triple]
        best = [i for i in range(3) if scores[i] == max(scores)]
        worst = [i for i in range(3) if scores[i] == min(scores)]
        choices = [(i, j) for i in best for j in worst if i != j]
        for i, j in choices:
            pairs[triple[i], triple[j]] += p / len(choices)
    return dict(pairs)


def test_implicit_rewards_rank_the_candidates(world: Any, tools: Any) -> None:
    law = world.law()
    score = {ids: round(world.implicit_reward(ids), 5) for ids in law}
    assert len(set(score.values())) == len(score)  # distinct responses do not tie
    comparisons = BestOfNSampler(n=3).sample(world.prompts(1500), world.engine(), Key((1,)))
    tools.assert_follows(tools.ids_of(comparisons), best_of_three_law(law, score))
    for comparison in comparisons:
        assert comparison.meta["delta"] >= 0
        assert (comparison.branch, comparison.passes) == ("best_of_n", 3.0)


def test_a_reward_ranks_the_candidates_and_ties_are_broken_fairly(world: Any, tools: Any) -> None:
    law = world.law()
    score = {ids: float(sum(i % 2 == 0 for i in ids)) for ids in law}
    comparisons = BestOfNSampler(n=3, reward=CountReward()).sample(world.prompts(1500), world.engine(), Key((2,)))
    tools.assert_follows(tools.ids_of(comparisons), best_of_three_law(law, score))
    assert all(c.meta["score_a"] == score[c.a.ids] and c.meta["score_b"] == score[c.b.ids] for c in comparisons)
    assert comparisons[0].a.reference_logps is None  # the reference was not asked for nothing


def test_at_the_reference_all_candidates_tie_and_the_pair_is_random(make_world: Any, tools: Any) -> None:
    world = make_world(same=True)
    comparisons = BestOfNSampler(n=4).sample(world.prompts(1000), world.engine(), Key((3,)))
    tools.assert_follows(tools.ids_of(comparisons), tools.product_law(world.law(), world.law()))


def test_two_candidates_of_the_same_prompt_are_different_samples(toy_engine: Any, world: Any) -> None:
    comparisons = BestOfNSampler(n=2).sample(world.prompts(200), toy_engine, Key((4,)))
    assert any(c.a.ids != c.b.ids for c in comparisons)
    assert any(c.a.ids == c.b.ids for c in comparisons)  # as independent samples will


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=8), st.integers(0, 10**6), st.sampled_from([1.0, TIE * 0.6]))
def test_extremes_are_two_positions_of_highest_and_lowest_score(scores: list[int], seed: int, unit: float) -> None:
    tensor = unit * torch.tensor(scores, dtype=torch.float64)
    best, worst = extremes(tensor, Key((seed,)))
    assert best != worst
    assert tensor[best] >= tensor.max() - TIE
    assert tensor[worst] <= tensor.min() + TIE


def test_every_tied_pair_is_equally_likely() -> None:
    counts: dict[tuple[int, int], int] = defaultdict(int)
    for seed in range(3000):
        counts[extremes(torch.zeros(3), Key((seed,)))] += 1
    assert len(counts) == 6
    # 500 +- 20 each; five standard deviations
    assert all(abs(count - 500) < 102 for count in counts.values())


def test_one_candidate_is_refused() -> None:
    with pytest.raises(ValueError, match="n must be at least 2"):
        BestOfNSampler(n=1)


def test_a_reward_that_is_not_finite_names_the_prompt(toy_engine: Any, world: Any) -> None:
    class BrokenReward(AbstractReward):
        def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
            return RewardOutput(torch.full((len(responses),), float("nan")))

    with pytest.raises(ValueError, match=r"BrokenReward\.score returned nan for prompt 17"):
        BestOfNSampler(n=2, reward=BrokenReward()).sample(world.prompts(1, start=17), toy_engine, Key((0,)))
