"""The tabular world against autograd, enumeration and Monte Carlo; the figures of docs/pilaf.md in order and sign."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from lightning_rlhf.estimators.tabular import differences, expected_dpo_loss, tilted_distributions
from lightning_rlhf.worlds.arms import AbstractArm, DistributionArm, PoolArm, ResampledArm, SecantArm, categorical
from lightning_rlhf.worlds.distributions import SAMPLERS, best_of_n, pilaf, secant, t_pilaf, vanilla, weighted_vanilla
from lightning_rlhf.worlds.learning import iterative, labeled, online, overfitted_start
from lightning_rlhf.worlds.likelihood import maximum_likelihood
from lightning_rlhf.worlds.tabular import TabularWorld, deviation


@pytest.fixture(scope="module")
def world() -> TabularWorld:
    return TabularWorld.draw([0, 1, 2], num_prompts=3, num_responses=6, dim=4, beta=0.5, spread=2.0)


@pytest.fixture(scope="module")
def parameters(world: TabularWorld) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(world.num_worlds, world.dim, generator=generator, dtype=torch.float64)


def test_gradient_of_j_and_of_the_loss_agree_with_autograd(world: TabularWorld, parameters: torch.Tensor) -> None:
    leaf = parameters.clone().requires_grad_()
    world.objective(leaf).j.sum().backward()
    torch.testing.assert_close(world.gradient_j(parameters), leaf.grad)
    pairs = t_pilaf(world.log_policy(parameters), world.log_reference, world.beta)
    leaf = parameters.clone().requires_grad_()
    p_star = differences(world.reward).sigmoid()
    log_policy = world.log_policy(leaf)
    loss = expected_dpo_loss(log_policy, world.log_reference, world.beta, pairs.probability, pairs.weight, p_star)
    loss.mean(-1).sum().backward()
    torch.testing.assert_close(world.expected_gradient(parameters, pairs), leaf.grad)


def test_hessian_of_j_is_minus_sigma_over_beta_at_the_optimum() -> None:
    world = TabularWorld.draw([5], num_prompts=2, num_responses=5, dim=3, beta=0.5)
    best = torch.linalg.lstsq(world.features[0].flatten(0, 1), world.reward[0].flatten()[:, None]).solution.T
    torch.testing.assert_close(world.gradient_j(best), torch.zeros_like(best), atol=1e-9, rtol=0)
    torch.testing.assert_close(world.objective(best).j, world.best_j())
    hessian = torch.autograd.functional.hessian(lambda w: world.objective(w[None]).j.sum(), best[0])
    torch.testing.assert_close(hessian, -world.covariance(best)[0] / world.beta)


def test_information_is_the_expected_curvature_of_a_pair(world: TabularWorld, parameters: torch.Tensor) -> None:
    pairs = pilaf(world.log_policy(parameters), world.log_reference, world.beta)
    expected = torch.zeros(world.dim, world.dim, dtype=torch.float64)
    num_prompts, size = world.features.shape[1:3]
    for x, a, b in product(range(num_prompts), range(size), range(size)):
        gap = world.features[0, x, a] - world.features[0, x, b]
        delta = float(gap @ parameters[0])
        slope = 1 / (2 * math.cosh(delta / 2)) ** 2
        expected += pairs.probability[0, x, a, b] * slope * torch.outer(gap, gap) / num_prompts
    torch.testing.assert_close(world.information(parameters, pairs)[0], expected)


@pytest.mark.parametrize("name", SAMPLERS)
def test_pair_laws_are_symmetric_laws_with_mean_weight_one(
    world: TabularWorld, parameters: torch.Tensor, name: str
) -> None:
    pairs = SAMPLERS[name](world.log_policy(parameters), world.log_reference, world.beta)
    torch.testing.assert_close(pairs.probability, pairs.probability.transpose(-1, -2))
    torch.testing.assert_close(pairs.probability.sum((-1, -2)), torch.ones(3, 3, dtype=torch.float64))
    mean = (pairs.probability * pairs.weight).sum((-1, -2)).mean(-1)
    torch.testing.assert_close(mean, torch.ones(3, dtype=torch.float64))


def test_best_of_n_distribution_by_enumeration() -> None:
    log_policy = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
    log_reference = torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=torch.float64).log()
    reward = log_policy - log_reference
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for draws in product(range(4), repeat=3):
        best, worst = max(draws, key=lambda i: reward[i]), min(draws, key=lambda i: reward[i])
        expected[best, worst] += log_policy[list(draws)].sum().exp()
    found = best_of_n(log_policy, log_reference, beta=0.7, n=3).probability
    torch.testing.assert_close(found, (expected + expected.T) / 2)
    # at the reference all rewards tie, and the pair is a random one
    at_reference = best_of_n(log_policy, log_policy, beta=0.7).probability
    torch.testing.assert_close(at_reference, vanilla(log_policy, log_policy, 0.7).probability)


def test_secant_law_aligns_the_gradient_exactly(world: TabularWorld, parameters: torch.Tensor) -> None:
    log_policy = world.log_policy(parameters)
    pairs = secant(log_policy, world.log_reference, world.beta, world.reward)
    cosine = torch.cosine_similarity(-world.expected_gradient(parameters, pairs), world.gradient_j(parameters))
    torch.testing.assert_close(cosine, torch.ones(3, dtype=torch.float64))
    # T-PILAF's slope is the secant's where the policy is right
    own = world.beta * (log_policy - world.log_reference)
    right = secant(log_policy, world.log_reference, world.beta, own)
    torch.testing.assert_close(right.probability, t_pilaf(log_policy, world.log_reference, world.beta).probability)


def test_a_reward_fitted_to_the_labels_gives_the_secant_of_the_truth_in_the_end() -> None:
    world = TabularWorld.draw([0, 1], beta=0.5, spread=2.0, num_prompts=4)
    fitted, exact = SecantArm(), SecantArm(true_reward=True)
    parameters = world.origin()
    # prompts tell nothing of the truth yet: the law is that of a reward of zero
    fitted.reset(world)
    start = fitted.pair_distribution(world, parameters).probability
    torch.testing.assert_close(start, vanilla(world.log_reference, world.log_reference, 0.5).probability)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    numbers = torch.stack([torch.rand(2, 20000, generator=g, dtype=torch.float64) for g in generators])
    prompts = (numbers[:, 0] * 4).long()
    drawn = DistributionArm(vanilla).draw(world, parameters, prompts, generators)
    fitted.learn(*labeled(world, prompts, drawn, numbers[:, 1]))
    laws = [arm.pair_distribution(world, parameters).probability for arm in (fitted, exact)]
    assert float((laws[0] - laws[1]).abs().sum((-1, -2)).max()) / 2 < 0.02
    assert float((start - laws[1]).abs().sum((-1, -2)).max()) / 2 > 0.1


def test_resampling_two_draws_is_vanilla_and_many_are_t_pilaf() -> None:
    world = TabularWorld.draw([3], beta=0.5, spread=2.0, num_prompts=1, num_responses=4)
    parameters = torch.randn(1, world.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_policy = world.log_policy(parameters)
    prompts = torch.zeros(1, 20000, dtype=torch.int64)

    def distance(arm: AbstractArm, law: torch.Tensor) -> float:
        pairs = arm.draw(world, parameters, prompts, [torch.Generator().manual_seed(1)])
        counts = torch.zeros(16, dtype=torch.float64)
        counts.index_add_(0, 4 * pairs.first[0] + pairs.second[0], pairs.weight[0] / prompts.shape[1])
        return float((counts.reshape(4, 4) - law[0, 0]).abs().sum() / 2)

    wanted = [law(log_policy, world.log_reference, 0.5).probability for law in (vanilla, t_pilaf)]
    assert distance(ResampledArm(n=2), wanted[0]) < 0.02 < distance(ResampledArm(n=2), wanted[1])
    assert distance(ResampledArm(n=64), wanted[1]) < 0.02 < distance(ResampledArm(n=64), wanted[0])


def test_t_pilaf_is_better_aligned_than_vanilla_on_the_learners_path_only() -> None:
    world = TabularWorld.draw(list(range(20)), beta=0.5, spread=2.0, num_prompts=2)
    truth = torch.linalg.lstsq(world.features.flatten(1, 2), world.reward.flatten(1)[..., None]).solution.squeeze(-1)

    def misalignment(sampler: str, parameters: torch.Tensor) -> float:
        pairs = SAMPLERS[sampler](world.log_policy(parameters), world.log_reference, world.beta)
        ascent, exact = -world.expected_gradient(parameters, pairs), world.gradient_j(parameters)
        return float((1 - torch.cosine_similarity(ascent, exact)).mean())

    near = {name: misalignment(name, 0.75 * truth) for name in ("Vanilla", "PILAF", "T-PILAF", "Weighted Vanilla")}
    assert near["T-PILAF"] < near["PILAF"] < near["Vanilla"]
    assert near["T-PILAF"] < near["Vanilla"] / 4
    assert near["Weighted Vanilla"] == pytest.approx(near["T-PILAF"], rel=1e-6)
    # badly wrong: the second order wins (docs/pilaf.md)
    wrong = 2 * truth.roll(1, 0)
    assert misalignment("T-PILAF", wrong) > misalignment("Vanilla", wrong)


def test_asymptotic_gap_is_what_maximum_likelihood_loses() -> None:
    num_labels, repeats = 1500, 300
    world = TabularWorld.draw([3], num_prompts=3, num_responses=6, dim=4, beta=0.5)
    truth = torch.linalg.lstsq(world.features[0].flatten(0, 1), world.reward[0].flatten()[:, None]).solution.T
    predicted = float(world.asymptotic_gap(truth, vanilla(world.log_policy(truth), world.log_reference, world.beta)))
    copies = TabularWorld(
        *(t.expand(repeats, *t.shape[1:]) for t in (world.features, world.log_reference, world.reward)), 0.5
    )
    generators = [torch.Generator().manual_seed(i) for i in range(repeats)]
    prompts = torch.stack([torch.randint(3, (num_labels,), generator=g) for g in generators])
    start = truth.expand(repeats, -1)
    drawn = DistributionArm(vanilla).draw(copies, start, prompts, generators)
    uniforms = torch.stack([torch.rand(num_labels, generator=g, dtype=torch.float64) for g in generators])
    gaps, labels = labeled(copies, prompts, drawn, uniforms)
    fitted = maximum_likelihood(gaps, labels, drawn.weight, start, ridge=1e-9)
    loss = num_labels * (world.best_j() - copies.objective(fitted).j)
    error = float(loss.std()) / repeats**0.5
    assert float(loss.mean()) == pytest.approx(predicted, abs=4 * error + 0.05 * predicted)


def test_categorical_draws_follow_the_law() -> None:
    law = torch.tensor([[[0.1, 0.2, 0.7], [0.0, 1.0, 0.0]]], dtype=torch.float64)
    drawn = categorical(law, torch.tensor([[0, 1]]), 20_000, [torch.Generator().manual_seed(0)])
    frequency = torch.bincount(drawn[0, 0], minlength=3) / 20_000
    torch.testing.assert_close(frequency.double(), law[0, 0], atol=0.015, rtol=0)
    assert set(drawn[0, 1].tolist()) == {1}


def test_worlds_have_the_spread_that_was_asked_for() -> None:
    world = TabularWorld.draw([7, 8], spread=3.0)
    assert [float(deviation(world.reward[i], world.log_reference[i])) for i in (0, 1)] == pytest.approx([3.0, 3.0])
    with pytest.raises(ValueError, match="beta > 0"):
        TabularWorld.draw([0], beta=0.0)


def test_runs_of_a_seed_do_not_depend_on_the_other_seeds() -> None:
    alone = iterative(TabularWorld.draw([4], beta=0.5), PoolArm(4), [4], rounds=2, pairs=32, first=32)
    among = iterative(TabularWorld.draw([3, 4], beta=0.5), PoolArm(4), [3, 4], rounds=2, pairs=32, first=32)
    assert float(alone.objectives[-1].j) == pytest.approx(float(among.objectives[-1].j[1]), abs=1e-9)


def test_online_learning_approaches_the_best_policy_and_all_arms_start_alike() -> None:
    seeds = list(range(6))
    world = TabularWorld.draw(seeds, beta=0.5, spread=2.0)
    traces = {
        n: online(world, DistributionArm(SAMPLERS[n]), seeds, steps=120, evaluate_every=60)
        for n in ("Vanilla", "PILAF")
    }
    for trace in traces.values():
        gaps = [float((world.best_j() - found.j).mean()) for found in trace.objectives]
        assert gaps[-1] < 0.1 * gaps[0]
        torch.testing.assert_close(trace.objectives[0].j, traces["Vanilla"].objectives[0].j)
        assert trace.labels[-1] == 120 * 16


def test_an_overfitted_start_is_far_and_poor() -> None:
    seeds = list(range(8))
    world = TabularWorld.draw(seeds, beta=0.5, spread=2.0)
    start = overfitted_start(world, seeds, pairs=12)
    fitted = world.objective(start)
    optimum = online(world, DistributionArm(vanilla), seeds, steps=120).objectives[-1]
    assert bool((fitted.kl.mean() > optimum.kl.mean()) & (fitted.j.mean() < optimum.j.mean()))


def test_the_chosen_pair_of_a_pool_teaches_more_than_a_random_one() -> None:
    """Policy-weighted choice ends nearer to the optimum than the first two of the same pools, in every regime."""
    seeds = list(range(20))
    for beta, spread in ((0.1, 2.0), (0.5, 2.0), (1.0, 4.0)):
        world = TabularWorld.draw(seeds, beta=beta, spread=spread)
        losses = {}
        for chooses in (True, False):
            trace = iterative(world, PoolArm(8, chooses=chooses), seeds, rounds=4)
            losses[chooses] = float((world.best_j() - trace.objectives[-1].j).mean())
        assert losses[True] < 0.8 * losses[False]


def test_information_per_label_of_the_chosen_pair_is_never_below_the_pools_random_pair() -> None:
    """In expectation, at the truth: tr(Sigma I^-1) with I from chosen pairs, against I from random pairs."""
    seeds = list(range(10))
    world = TabularWorld.draw(seeds, beta=0.5, spread=2.0)
    truth = torch.linalg.lstsq(world.features.flatten(1, 2), world.reward.flatten(1)[..., None]).solution.squeeze(-1)
    loss = {}
    for chooses in (True, False):
        arm = PoolArm(8, chooses=chooses)
        arm.reset(world)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for _ in range(40):
            prompts = torch.stack([torch.randint(8, (16,), generator=g) for g in generators])
            arm.draw(world, truth, prompts, generators)
        solved = torch.linalg.solve(arm.information, world.covariance(truth))
        loss[chooses] = solved.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert bool((loss[True] < loss[False]).all())


def test_pool_of_the_tilted_laws_is_half_plus_half_minus() -> None:
    world = TabularWorld.draw([0], num_prompts=1, num_responses=4, dim=2, beta=1.0)
    parameters = torch.tensor([[2.0, -1.0]], dtype=torch.float64)
    arm = PoolArm(2, tilted=True, chooses=False)
    arm.reset(world)
    prompts = torch.zeros(1, 20_000, dtype=torch.int64)
    drawn = arm.draw(world, parameters, prompts, [torch.Generator().manual_seed(0)])
    laws = tilted_distributions(world.log_policy(parameters), world.log_reference, 1.0)
    for found, law in ((drawn.first, laws.log_plus), (drawn.second, laws.log_minus)):
        frequency = torch.bincount(found[0], minlength=4) / 20_000
        torch.testing.assert_close(frequency.double(), law[0, 0].exp(), atol=0.015, rtol=0)


def test_weighted_vanilla_has_the_gradient_of_t_pilaf(world: TabularWorld, parameters: torch.Tensor) -> None:
    laws = [law(world.log_policy(parameters), world.log_reference, world.beta) for law in (weighted_vanilla, t_pilaf)]
    mine, theirs = (world.expected_gradient(parameters, law) for law in laws)
    torch.testing.assert_close(mine, theirs)
