"""Best and worst of n at several temperatures: the pair law by enumeration, ranks by a labeler, labels and costs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch

from lightning_rlhf.estimators import mean_win_probability
from lightning_rlhf.generation.base import Request
from lightning_rlhf.labelers import AbstractLabeler, MixedLabeler, RewardLabeler
from lightning_rlhf.randomness import Key
from lightning_rlhf.rewards import LexiconReward
from lightning_rlhf.rewards.base import AbstractReward, RewardOutput
from lightning_rlhf.samplers import BestWorstSampler
from lightning_rlhf.samplers.draws import pool_requests
from lightning_rlhf.types import Comparison, Label, Prompt, Response


KEY = Key((5,))


class ByTokens(AbstractReward):
    """Rewards by the tokens; several responses tie."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        return RewardOutput(torch.tensor([reward_of(response.ids) for response in responses]))


def reward_of(ids: tuple[int, ...]) -> float:
    return 0.5 * (ids[0] // 2) + 0.25 * len(ids)


class Constant(AbstractReward):
    """The same reward for all."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        return RewardOutput(torch.zeros(len(responses)))


def best_worst_law(laws: Sequence[dict[Any, float]]) -> dict[Any, float]:
    """P(best, worst) of candidates with a law each, over all pools, ties broken fairly."""
    pairs: dict[Any, float] = defaultdict(float)
    for pool in product(*laws):
        p = math.prod(law[ids] for law, ids in zip(laws, pool, strict=True))
        scores = [reward_of(ids) for ids in pool]
        tops = [i for i, score in enumerate(scores) if score == max(scores)]
        bottoms = [i for i, score in enumerate(scores) if score == min(scores)]
        choices = [(i, j) for i in tops for j in bottoms if i != j]
        for i, j in choices:
            pairs[pool[i], pool[j]] += p / len(choices)
    return dict(pairs)


# -- mean probability to win -------------------------------------------------------------------------------------------


def test_bradley_terry_wins_rank_as_the_rewards_do() -> None:
    rewards = torch.randn(50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means = mean_win_probability(torch.sigmoid(rewards[:, :, None] - rewards[:, None, :]))
    assert torch.equal(means.argsort(-1), rewards.argsort(-1))
    torch.testing.assert_close(means.sum(-1), torch.full((50,), 4.0, dtype=torch.float64))


def test_a_circle_ties_and_both_orders_are_averaged() -> None:
    circle = torch.tensor([[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]])
    torch.testing.assert_close(mean_win_probability(circle), torch.full((3,), 0.5, dtype=torch.float64))
    # a judge that adds 0.2 to whatever is shown first: (0.9 + 1 - 0.5) / 2 = 0.7
    biased = torch.tensor([[math.nan, 0.9], [0.5, math.nan]])
    torch.testing.assert_close(mean_win_probability(biased), torch.tensor([0.7, 0.3], dtype=torch.float64))


def test_missing_verdicts_are_left_out_of_the_mean() -> None:
    wins = torch.full((3, 3), math.nan)
    # one order alone
    wins[0, 1] = 0.8
    means = mean_win_probability(wins)
    torch.testing.assert_close(means[:2], torch.tensor([0.8, 0.2], dtype=torch.float64))
    assert means[2].isnan()


# -- the distribution of the pairs -------------------------------------------------------------------------------------


def test_pairs_follow_the_law_of_candidates_at_two_temperatures(world: Any, tools: Any) -> None:
    laws = [world.law(temperature=t) for t in (1.0, 0.4, 1.0)]
    expected = best_worst_law(laws)
    sampler = BestWorstSampler(ByTokens(), n=3, temperatures=[1.0, 0.4])
    comparisons = sampler.sample(world.prompts(2000), world.engine(), KEY)
    tools.assert_follows(tools.ids_of(comparisons), expected)
    # one temperature for all gives another law
    with pytest.raises(AssertionError, match="p-value"):
        tools.assert_follows(tools.ids_of(comparisons), best_worst_law([laws[0]] * 3))
    for c in comparisons[:20]:
        assert (c.branch, c.passes, c.a.source) == ("best_worst", 3.0, "policy")
        assert (c.meta["score_a"], c.meta["reward_b"]) == (reward_of(c.a.ids), reward_of(c.b.ids))


def test_the_best_of_n_stays_within_its_bound_on_the_kl(world: Any) -> None:
    policy = world.law()
    for n in (2, 3, 4):
        best: dict[Any, float] = defaultdict(float)
        for (first, _), p in best_worst_law([policy] * n).items():
            best[first] += p
        kl = sum(p * math.log(p / policy[ids]) for ids, p in best.items() if p > 0)
        # arXiv 2405.07863: KL(best of n || policy) <= log n - (n - 1) / n
        assert 0 < kl <= math.log(n) - (n - 1) / n


def test_a_request_has_its_own_temperature(world: Any, tools: Any) -> None:
    engine = world.engine(temperature=2.0)
    prompts = world.prompts(1500)
    for temperature in (None, 0.5):
        requests = [Request(p, KEY.fold(p.index), temperature=temperature) for p in prompts]
        found = [response.ids for response in engine.generate(requests)]
        tools.assert_follows(found, world.law(temperature=temperature or 2.0))
    # whatever the others in its batch have
    mixed = [Request(p, KEY.fold(p.index), temperature=0.5 if p.index % 2 else None) for p in prompts]
    together = [response.ids for response in engine.generate(mixed)]
    assert together[1::2] == found[1::2]
    with pytest.raises(ValueError, match="temperature of a request must be > 0; got 0"):
        Request(prompts[0], KEY, temperature=0.0)


# -- scores and labels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [0.0, 0.1, 5.0])
def test_the_length_penalty_is_part_of_the_rank(world: Any, penalty: float) -> None:
    prompts, engine = world.prompts(60), world.engine()
    sampler = BestWorstSampler(ByTokens(), n=4, length_penalty=penalty)
    made = sampler.sample(prompts, engine, KEY)
    pool = engine.generate(pool_requests(prompts, 4, KEY, temperatures=(1.0, 0.7)))
    for i, (comparison, label) in enumerate(zip(made, sampler.verdicts(made), strict=True)):
        scores = [reward_of(r.ids) - penalty * len(r.text) for r in pool[4 * i : 4 * i + 4]]
        assert comparison.meta["score_a"] == pytest.approx(max(scores), abs=1e-6)
        assert comparison.meta["score_b"] == pytest.approx(min(scores), abs=1e-6)
        assert comparison.meta["reward_a"] == pytest.approx(reward_of(comparison.a.ids))
        assert label is not None
        tied = max(scores) - min(scores) < 1e-6
        assert (label.status, label.probability, label.cost) == (("tie", None, 2.0) if tied else ("ok", 1.0, 2.0))
        if not tied:
            assert label.meta == {name: comparison.meta[name] for name in ("reward_a", "reward_b")}


def test_equal_rewards_are_dropped(world: Any) -> None:
    sampler = BestWorstSampler(Constant(), n=3)
    made = sampler.sample(world.prompts(20), world.engine(), KEY)
    assert [label.status for label in sampler.verdicts(made) if label is not None] == ["tie"] * 20
    # longer responses have lower scores
    concise = BestWorstSampler(Constant(), n=3, length_penalty=0.01)
    kept = concise.sample(world.prompts(20), world.engine(), KEY)
    for comparison, label in zip(kept, concise.verdicts(kept), strict=True):
        assert label is not None
        assert (label.probability == 1.0) == (len(comparison.a.text) < len(comparison.b.text))


class Noting(AbstractLabeler):
    """Another labeler's labels, with a note of the pairs; none for responses that begin with a token."""

    def __init__(self, refused: int = -1) -> None:
        self.labeler, self.refused = RewardLabeler(ByTokens(), rule="soft", cost=0.5), refused
        self.asked: list[Comparison] = []

    def label(self, comparisons: Sequence[Comparison], key: Key) -> list[Label]:
        self.asked.extend(comparisons)
        labels = self.labeler.label(comparisons, key)
        return [
            Label(None, "refused", cost=0.5, meta={"fault": "no comment"})
            if self.refused in (pair.a.ids[0], pair.b.ids[0])
            else label
            for pair, label in zip(comparisons, labels, strict=True)
        ]


def test_a_labeler_ranks_by_the_mean_probability_to_win(world: Any) -> None:
    prompts, engine, noting = world.prompts(40), world.engine(), Noting()
    sampler = BestWorstSampler(labeler=noting, n=4)
    made = sampler.sample(prompts, engine, KEY)
    pool = engine.generate(pool_requests(prompts, 4, KEY, temperatures=(1.0, 0.7)))
    asked = 0
    for i, (comparison, label) in enumerate(zip(made, sampler.verdicts(made), strict=True)):
        candidates = pool[4 * i : 4 * i + 4]
        # the mean over the three others, by brute force; equal texts share a win
        wins = []
        for own in candidates:
            gaps = [reward_of(own.ids) - reward_of(r.ids) if own.text != r.text else 0.0 for r in candidates]
            wins.append((sum(1 / (1 + math.exp(-gap)) for gap in gaps) - 0.5) / 3)
        assert comparison.meta["reward_a"] == pytest.approx(max(wins))
        assert comparison.meta["reward_b"] == pytest.approx(min(wins))
        texts = [r.text for r in candidates]
        different = sum(texts[a] != texts[b] for a in range(4) for b in range(a))
        asked += different
        assert label is not None
        assert label.cost == pytest.approx(0.5 * different)
        assert (label.status == "tie") == (max(wins) - min(wins) < 1e-4)
    # each pair of different texts once
    assert len(noting.asked) == asked


def test_a_candidate_without_verdicts_is_in_no_pair(world: Any) -> None:
    prompts, engine = world.prompts(60), world.engine()
    first = max(world.law(), key=world.law().get)[0]
    sampler = BestWorstSampler(labeler=Noting(refused=first), n=3)
    made = sampler.sample(prompts, engine, KEY)
    statuses = set()
    for comparison, label in zip(made, sampler.verdicts(made), strict=True):
        assert label is not None
        statuses.add(label.status)
        if label.status == "invalid":
            assert label.meta["fault"] == "the candidates have no verdicts (no comment)"
        elif label.status == "ok":
            assert first not in (comparison.a.ids[0], comparison.b.ids[0])
    assert {"ok", "invalid"} <= statuses


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "set one of reward and labeler"),
        ({"reward": LexiconReward(), "labeler": RewardLabeler(LexiconReward())}, "set one of reward and labeler"),
        ({"reward": LexiconReward(), "n": 1}, "n must be at least 2"),
        ({"reward": LexiconReward(), "temperatures": []}, r"one or more numbers > 0; got \[\]"),
        ({"reward": LexiconReward(), "temperatures": [1.0, 0.0]}, r"one or more numbers > 0; got \[1.0, 0.0\]"),
        ({"reward": LexiconReward(), "length_penalty": math.nan}, "length_penalty must be >= 0; got nan"),
        (
            {"labeler": MixedLabeler(RewardLabeler(LexiconReward()), RewardLabeler(LexiconReward()))},
            "MixedLabeler labels whole rounds: use LLMLabeler",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BestWorstSampler(**wrong)
