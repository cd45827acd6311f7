"""Infomax and Thompson sampling: the pairs against brute force and exact laws, under a posterior that is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_rlhf.preference_models import AbstractPreferenceModel, ModelStart, Posterior
from lightning_rlhf.randomness import Key
from lightning_rlhf.samplers import AbstractModelSampler, InfomaxSampler, ThompsonSampler
from lightning_rlhf.samplers.draws import pool_requests
from lightning_rlhf.samplers.thompson import most_uncertain, second_best
from lightning_rlhf.types import Preference, Prompt, Response


MEAN = torch.tensor([0.0, 0.6, -0.4, 0.2], dtype=torch.float64)
FACTOR = torch.tensor([[1.0, 0.0], [0.5, 1.5], [-1.0, 0.3], [0.2, -2.0]], dtype=torch.float64)
COVARIANCE = FACTOR @ FACTOR.T


class TokenModel(AbstractPreferenceModel):
    """Rewards that depend on the first token, as the responses of the toy engine do."""

    def __init__(self) -> None:
        self.calls = 0

    def setup(self, start: ModelStart) -> None:
        del start

    def fit(self, preferences: Sequence[Preference]) -> None:
        del preferences

    def posterior(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> Posterior:
        self.calls += 1
        assert len(prompts) == len(responses)
        index = torch.tensor([response.ids[0] for response in responses])
        # a constant per prompt is not identified: no choice may depend on it
        constant = torch.tensor([float(prompt.index) for prompt in prompts], dtype=torch.float64)
        return Posterior(MEAN[index] + constant, COVARIANCE[index][:, index])


def fitted(sampler: AbstractModelSampler) -> AbstractModelSampler:
    sampler.preference_model = TokenModel()
    return sampler


def prompts(count: int, start: int = 0) -> list[Prompt]:
    return [Prompt(index=start + i, ids=(1,), text="some text") for i in range(count)]


def independent(mean: Tensor, std: Tensor) -> Posterior:
    return Posterior(mean, torch.diag(std**2))


def samplers() -> list[AbstractModelSampler]:
    return [InfomaxSampler(n=6), ThompsonSampler(n=6), ThompsonSampler(n=6, second="variance")]


@pytest.mark.parametrize("references", [0, 2])
def test_infomax_pairs_what_sampling_finds_most_uncertain(toy_engine: Any, references: int) -> None:
    sampler, key = fitted(InfomaxSampler(n=5, references=references)), Key((1,))
    z = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rewards = MEAN + z @ FACTOR.T
    variances = {
        (a, b): float(torch.sigmoid(rewards[:, a] - rewards[:, b]).var()) for a, b in combinations(range(4), 2)
    }
    for comparison in sampler.sample(prompts(40), toy_engine, key):
        requests = pool_requests([comparison.prompt], 5, key)
        requests[5 - references :] = [replace(request, mix=-1.0) for request in requests[5 - references :]]
        pool = toy_engine.generate(requests)
        tokens = sorted({response.ids[0] for response in pool})
        chosen = tuple(sorted((comparison.a.ids[0], comparison.b.ids[0])))
        if len(tokens) > 1:
            assert chosen == max(combinations(tokens, 2), key=variances.__getitem__)
            gap = FACTOR[chosen[0]] - FACTOR[chosen[1]]
            assert comparison.meta["gap_std"] == pytest.approx(float(gap.norm()))
        assert (comparison.passes, sampler.passes_per_pair) == (5.0, 5.0)


def test_double_thompson_has_its_exact_law(tools: Any) -> None:
    posterior = independent(
        torch.tensor([0.0, 0.5, -0.3], dtype=torch.float64), torch.tensor([1.0, 0.6, 1.5], dtype=torch.float64)
    )
    normal = torch.distributions.Normal(posterior.mean, posterior.covariance.diagonal().sqrt())
    grid = torch.linspace(-10, 10, 4001, dtype=torch.float64)[:, None]
    below, density = normal.cdf(grid), normal.log_prob(grid).exp()
    # P(i is best) = integral of p_i(x) prod_{j != i} P_j(x)
    best = [float((density[:, i] * below.prod(1) / below[:, i]).nan_to_num().sum() * 0.005) for i in range(3)]
    law = {(i, j): best[i] * best[j] / (1 - best[i]) for i in range(3) for j in range(3) if i != j}
    assert sum(law.values()) == pytest.approx(1.0, abs=1e-6)
    sampler = ThompsonSampler(n=3)
    tools.assert_follows([sampler.choose(posterior, Key((7, i))) for i in range(4000)], law)


def test_thompson_samples_the_winner_of_two_correlated_responses() -> None:
    covariance = torch.tensor([[2.0, 1.5], [1.5, 1.25]], dtype=torch.float64)
    posterior = Posterior(torch.tensor([0.3, 0.0], dtype=torch.float64), covariance)
    first = [ThompsonSampler(n=2).choose(posterior, Key((3, i)))[0] for i in range(4000)]
    # P(first is 0) = Phi(0.3 / std of the gap), std^2 = 2 + 1.25 - 3
    expected = 0.5 * (1 + math.erf(0.3 / 0.5 / math.sqrt(2)))
    assert abs(first.count(0) / 4000 - expected) < 5 * math.sqrt(expected * (1 - expected) / 4000)


def test_where_all_samples_agree_the_second_response_is_random() -> None:
    certain = independent(torch.tensor([0.0, 9.0, 1.0, 2.0], dtype=torch.float64), torch.full((4,), 1e-3))
    pairs = [ThompsonSampler(n=4).choose(certain, Key((i,))) for i in range(600)]
    assert {first for first, _ in pairs} == {1}
    counts = [sum(second == i for _, second in pairs) for i in range(4)]
    assert counts[1] == 0
    assert min(counts[0], counts[2], counts[3]) > 140  # 200 +- 12 each
    assert second_best(torch.tensor([2, 2, 0, 1]), 1) == (2, 0)
    assert [second_best(torch.tensor([1, 1]), spare) for spare in range(3)] == [(1, 0), (1, 2), (1, 3)]


def test_baits_pairs_the_first_with_the_most_uncertain_gap() -> None:
    posterior = Posterior(MEAN, COVARIANCE)
    for first in range(4):
        gaps = [float((FACTOR[i] - FACTOR[first]).norm()) for i in range(4)]
        assert most_uncertain(posterior, first) == gaps.index(max(gaps))
    assert most_uncertain(independent(MEAN, torch.zeros(4)), 2) != 2
    for i in range(20):
        first, second = ThompsonSampler(n=4, second="variance").choose(posterior, Key((i,)))
        assert second == most_uncertain(posterior, first)


@pytest.mark.parametrize("number", range(3))
def test_pairs_depend_neither_on_chunks_nor_on_the_order_of_prompts(toy_engine: Any, number: int, tools: Any) -> None:
    sampler, key = fitted(samplers()[number]), Key((5,))
    whole = sampler.sample(prompts(24), toy_engine, key)
    first, *others = (sampler.sample(prompts(8, start), toy_engine, key) for start in (0, 8, 16))
    assert [*first, *others[0], *others[1]] == whole
    assert sampler.sample(prompts(24)[::-1], toy_engine, key)[::-1] == whole
    assert tools.ids_of(sampler.sample(prompts(24), toy_engine, Key((6,)))) != tools.ids_of(whole)


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("knows", [True, False])
def test_a_response_meets_an_equal_one_only_where_all_are_equal(toy_engine: Any, number: int, knows: bool) -> None:
    sampler, key = samplers()[number], Key((2,))
    if knows:
        fitted(sampler)
    sampler.n = 3
    equal = 0
    for comparison in sampler.sample(prompts(200), toy_engine, key):
        pool = toy_engine.generate(pool_requests([comparison.prompt], 3, key))
        all_equal = len({response.text for response in pool}) == 1
        assert comparison.has_equal_responses == all_equal
        equal += all_equal
        assert comparison.branch == ("posterior" if knows and not all_equal else "base")
    assert equal > 0


def test_references_are_samples_of_the_reference(world: Any, tools: Any) -> None:
    comparisons = InfomaxSampler(n=3, references=1).sample(world.prompts(4000), world.engine(), Key((8,)))
    # without a model the pair is the first two different responses: (policy, policy), or the reference where those are
    # equal
    assert {c.a.source for c in comparisons} == {"policy"}
    assert {c.b.source for c in comparisons} == {"policy", "reference"}
    only_two = InfomaxSampler(n=2, references=1).sample(world.prompts(4000), world.engine(), Key((8,)))
    tools.assert_follows(tools.ids_of(only_two), tools.product_law(world.law(), world.law(-1.0)))


def test_without_a_model_the_pair_is_the_start_of_the_pool(toy_engine: Any) -> None:
    key = Key((4,))
    for comparison in InfomaxSampler(n=2).sample(prompts(20), toy_engine, key):
        assert [comparison.a, comparison.b] == toy_engine.generate(pool_requests([comparison.prompt], 2, key))


def test_one_call_of_engine_and_model_per_chunk(toy_engine: Any) -> None:
    sampler = InfomaxSampler(n=4)
    sampler.preference_model = model = TokenModel()
    sampler.sample(prompts(10), toy_engine, Key((1,)))
    assert (toy_engine.calls, model.calls) == (1, 1)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        InfomaxSampler(n=1)
    with pytest.raises(ValueError, match="references must be from 0 to n=4; got 5"):
        InfomaxSampler(n=4, references=5)
    with pytest.raises(ValueError, match="must be one of double, variance"):
        ThompsonSampler(second="best")  # type: ignore[arg-type]
