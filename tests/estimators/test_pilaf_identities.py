"""The identities of T-PILAF (arXiv 2502.04270, theorems 1 and 2) in float64, by enumeration of small response sets.

Two families of policies: tabular (one logit per prompt and response) and log-linear (random features, shared by
prompts). Samplers and weights carry no gradient, and labels enter in expectation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lightning_rlhf.estimators import (
    differences,
    expected_dpo_loss,
    mix_logits,
    objective_j,
    pair_weight,
    product_pair_distribution,
    tilt_probability,
    tilted_distributions,
    tilted_pair_distribution,
    tpilaf_pair_distribution,
    vanilla_pair_weight,
)


PROMPTS, RESPONSES, FEATURES = 3, 6, 4
BETAS = [0.1, 0.5, 1.0]


@dataclass
class Problem:
    """A policy family with parameters ``theta``, a reference, and a beta."""

    log_policy_of: Callable[[Tensor], Tensor]
    theta: Tensor
    log_reference: Tensor
    beta: float

    @property
    def log_policy(self) -> Tensor:
        return self.log_policy_of(self.theta).detach()

    @property
    def implicit_reward(self) -> Tensor:
        return self.beta * (self.log_policy - self.log_reference)

    def zz(self) -> Tensor:
        return tilted_distributions(self.log_policy, self.log_reference, self.beta).zz()

    def tpilaf(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pair law, weights per pair, and Zbar."""
        zz = self.zz()
        weights = pair_weight(zz, zz.mean())[:, None, None]
        return tpilaf_pair_distribution(self.log_policy, self.log_reference, self.beta), weights, 1 + zz.mean()

    def loss_of(self, pair_distribution: Tensor, weights: Tensor | float, p_star: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda theta: expected_dpo_loss(
            self.log_policy_of(theta), self.log_reference, self.beta, pair_distribution, weights, p_star
        ).mean()

    def j_of(self, reward: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda theta: objective_j(self.log_policy_of(theta), self.log_reference, reward, self.beta).mean()

    def gradient(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        theta = self.theta.clone().requires_grad_()
        return torch.autograd.grad(function(theta), theta)[0].flatten()

    def scores(self) -> Tensor:
        """Gradients of log pi_theta(y|x); shape [prompts, responses, parameters]."""
        jacobian = torch.autograd.functional.jacobian(self.log_policy_of, self.theta)
        return jacobian.reshape(PROMPTS, RESPONSES, -1)


def problem(family: str, beta: float, seed: int = 0, at_reference: bool = False, spread: float = 1.0) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    base = normal(PROMPTS, RESPONSES).log_softmax(-1)
    if family == "tabular":
        theta, features = spread * normal(PROMPTS, RESPONSES), None
    else:
        theta, features = spread * normal(FEATURES), normal(PROMPTS, RESPONSES, FEATURES)

    def log_policy_of(parameters: Tensor) -> Tensor:
        logits = parameters if features is None else features @ parameters
        return (base + logits).log_softmax(-1)

    return Problem(log_policy_of, torch.zeros_like(theta) if at_reference else theta, base, beta)


def direction(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(PROMPTS, RESPONSES, generator=generator, dtype=torch.float64)


def relative(error: Tensor, scale: Tensor) -> float:
    return (error.norm() / scale.norm()).item()


def residual(case: Problem, reward: Tensor) -> float:
    """Norm of ``grad L + (beta / Zbar) grad J`` under T-PILAF and true Bradley-Terry labels."""
    law, weights, z_bar = case.tpilaf()
    p_star = torch.sigmoid(differences(reward))
    loss_gradient = case.gradient(case.loss_of(law, weights, p_star))
    return (loss_gradient + case.beta / z_bar * case.gradient(case.j_of(reward))).norm().item()


families = pytest.mark.parametrize("family", ["tabular", "log-linear"])
betas = pytest.mark.parametrize("beta", BETAS)


@families
@betas
def test_pair_law_is_the_on_policy_law_tilted_by_inverse_curvature(family: str, beta: float) -> None:
    for seed in range(5):
        case = problem(family, beta, seed, spread=2.0)
        law, zz = tpilaf_pair_distribution(case.log_policy, case.log_reference, beta), case.zz()
        base = product_pair_distribution(case.log_policy, case.log_policy)
        delta = differences(case.implicit_reward)
        curvature = torch.sigmoid(delta) * torch.sigmoid(-delta)
        tilted = base / (2 * curvature * (1 + zz)[:, None, None])
        assert (law - tilted).abs().max() < 1e-14
        assert (law.sum((-1, -2)) - 1).abs().max() < 1e-14
        assert ((base * torch.cosh(delta)).sum((-1, -2)) / zz - 1).abs().max() < 1e-14
        assert (zz > 1).all()
        assert (tilt_probability(zz) > 0.5).all()
        # and it is not the law of practical PILAF, nor Vanilla's
        for probability in (0.0, 0.5):
            other = tilted_pair_distribution(case.log_policy, case.log_reference, beta, probability)
            assert (law - other).abs().max() > 1e-6


@families
@betas
def test_tilted_laws_follow_their_definition(family: str, beta: float) -> None:
    case = problem(family, beta)
    laws = tilted_distributions(case.log_policy, case.log_reference, beta)
    policy, reward = case.log_policy.exp(), case.implicit_reward
    for sign, log_law, log_z in ((1, laws.log_plus, laws.log_z_plus), (-1, laws.log_minus, laws.log_z_minus)):
        z = (policy * torch.exp(sign * reward)).sum(-1)
        torch.testing.assert_close(log_z.exp(), z, rtol=1e-14, atol=0)
        torch.testing.assert_close(log_law.exp(), policy * torch.exp(sign * reward) / z[:, None], rtol=1e-13, atol=0)
    # pi+ ~ pi_theta^(1+beta) pi_ref^(-beta)
    power = ((1 + beta) * case.log_policy - beta * case.log_reference).log_softmax(-1)
    torch.testing.assert_close(laws.log_plus, power, rtol=1e-13, atol=1e-13)


@families
@betas
def test_gradient_is_exactly_aligned_for_linearised_labels(family: str, beta: float) -> None:
    # For any reward, however far from the policy's: p = sigma(delta) + sigma'(delta) (delta* - delta).
    for seed in range(5):
        case, reward = problem(family, beta, seed), 3 * direction(seed)
        delta, delta_star = differences(case.implicit_reward), differences(reward)
        p_linear = torch.sigmoid(delta) + torch.sigmoid(delta) * torch.sigmoid(-delta) * (delta_star - delta)
        law, weights, z_bar = case.tpilaf()
        loss_gradient = case.gradient(case.loss_of(law, weights, p_linear))
        expected = -beta / z_bar * case.gradient(case.j_of(reward))
        assert relative(loss_gradient - expected, expected) < 1e-12


@families
@betas
def test_remainder_has_its_closed_form(family: str, beta: float) -> None:
    # grad L = -(beta/Zbar) (grad J + T2), T2 = E_x E_{a,b ~ pi} [kappa (s_a - s_b) / 2]
    case, reward = problem(family, beta), 2 * direction(0)
    delta, delta_star, scores = differences(case.implicit_reward), differences(reward), case.scores()
    curvature = torch.sigmoid(delta) * torch.sigmoid(-delta)
    kappa = (torch.sigmoid(delta_star) - torch.sigmoid(delta)) / curvature - (delta_star - delta)
    base = product_pair_distribution(case.log_policy, case.log_policy)
    score_differences = scores[:, :, None] - scores[:, None, :]
    t2 = ((base * kappa / 2)[..., None] * score_differences).sum((1, 2)).mean(0)
    law, weights, z_bar = case.tpilaf()
    loss_gradient = case.gradient(case.loss_of(law, weights, torch.sigmoid(delta_star)))
    expected = -beta / z_bar * (case.gradient(case.j_of(reward)) + t2)
    assert relative(loss_gradient - expected, expected) < 1e-12
    assert relative(t2, expected) > 1e-3


@families
def test_misalignment_falls_by_four_per_halving_of_the_reward_error(family: str) -> None:
    for seed in range(3):
        case = problem(family, 0.5, seed)
        errors = [residual(case, case.implicit_reward + epsilon * direction(seed)) for epsilon in (2e-3, 1e-3, 5e-4)]
        assert errors[0] / errors[1] == pytest.approx(4, abs=0.1)
        assert errors[1] / errors[2] == pytest.approx(4, abs=0.1)


@families
def test_vanilla_stays_misaligned_for_small_reward_errors(family: str) -> None:
    case = problem(family, 1.0, spread=2.0)
    reward = case.implicit_reward + 1e-4 * direction(0)
    gradient_j = case.gradient(case.j_of(reward))
    p_star = torch.sigmoid(differences(reward))

    def cosine(law: Tensor, weights: Tensor | float) -> float:
        gradient = -case.gradient(case.loss_of(law, weights, p_star))
        return torch.nn.functional.cosine_similarity(gradient, gradient_j, 0).item()

    law, weights, _ = case.tpilaf()
    assert cosine(law, weights) > 1 - 1e-6
    assert cosine(product_pair_distribution(case.log_policy, case.log_policy), 1.0) < 0.999


@families
@betas
def test_everything_coincides_where_policy_equals_reference(family: str, beta: float) -> None:
    case = problem(family, beta, at_reference=True)
    laws = tilted_distributions(case.log_policy, case.log_reference, beta)
    torch.testing.assert_close(laws.log_plus, case.log_reference, rtol=0, atol=1e-15)
    torch.testing.assert_close(laws.log_minus, case.log_reference, rtol=0, atol=1e-15)
    assert (laws.zz() - 1).abs().max() < 1e-15
    vanilla = product_pair_distribution(case.log_policy, case.log_policy)
    hybrid = product_pair_distribution(case.log_policy, case.log_reference)
    pilaf = tilted_pair_distribution(case.log_policy, case.log_reference, beta, 0.5)
    law, weights, z_bar = case.tpilaf()
    for other in (law, hybrid, pilaf):
        assert (other - vanilla).abs().max() < 1e-15
    assert (weights - 1).abs().max() < 1e-15
    assert z_bar.item() == pytest.approx(2, rel=1e-15)
    # The constant is beta/2, and the remainder is third order: it falls by 8.
    errors = [residual(case, epsilon * direction(0)) for epsilon in (2e-2, 1e-2, 5e-3)]
    assert errors[0] / errors[1] == pytest.approx(8, abs=0.1)
    assert errors[1] / errors[2] == pytest.approx(8, abs=0.1)
    reward = 1e-4 * direction(0)
    loss_gradient = case.gradient(case.loss_of(law, 1.0, torch.sigmoid(differences(reward))))
    gradient_j = case.gradient(case.j_of(reward))
    assert relative(loss_gradient + beta / 2 * gradient_j, beta / 2 * gradient_j) < 1e-7


@families
@betas
def test_weighted_vanilla_pairs_have_the_expected_gradient_of_tpilaf(family: str, beta: float) -> None:
    case, p_star = problem(family, beta), torch.sigmoid(differences(2 * direction(3)))
    law, weights, z_bar = case.tpilaf()
    base = product_pair_distribution(case.log_policy, case.log_policy)
    pair_weights = vanilla_pair_weight(differences(case.implicit_reward), case.zz().mean())
    tpilaf = case.gradient(case.loss_of(law, weights, p_star))
    weighted = case.gradient(case.loss_of(base, pair_weights, p_star))
    plain = case.gradient(case.loss_of(base, 1.0, p_star))
    assert relative(weighted - tpilaf, tpilaf) < 1e-13
    assert relative(plain - tpilaf, tpilaf) > 1e-3
    # weights average one, and are the inverse curvature of the likelihood up to a constant
    assert (base * pair_weights).sum((-1, -2)).mean().item() == pytest.approx(1, rel=1e-14)
    delta = differences(case.implicit_reward)
    inverse = 1 / (2 * torch.sigmoid(delta) * torch.sigmoid(-delta) * z_bar)
    torch.testing.assert_close(pair_weights, inverse, rtol=1e-13, atol=0)


@betas
def test_curvature_and_asymptotic_covariance_at_the_optimum(beta: float) -> None:
    # theta is theta*, that is r* = r_theta (log-linear policies, so that Sigma is invertible).
    case = problem("log-linear", beta)
    reward, policy, zz = case.implicit_reward, case.log_policy.exp(), case.zz()
    law, weights, z_bar = case.tpilaf()
    p_star = torch.sigmoid(differences(reward))
    slopes = beta * case.scores()
    centered = slopes - (policy[..., None] * slopes).sum(1, keepdim=True)
    covariances = torch.einsum("xy,xyi,xyj->xij", policy, centered, centered)
    sigma = covariances.mean(0)

    def hessian(function: Callable[[Tensor], Tensor]) -> Tensor:
        value = torch.autograd.functional.hessian(function, case.theta)
        assert isinstance(value, Tensor)
        return value

    assert case.gradient(case.loss_of(law, weights, p_star)).norm() < 1e-14
    assert case.gradient(case.j_of(reward)).norm() < 1e-13
    hessian_loss = hessian(case.loss_of(law, weights, p_star))
    assert relative(hessian_loss - sigma / z_bar, sigma / z_bar) < 1e-12
    hessian_j = hessian(case.j_of(reward))
    assert relative(hessian_j + sigma / beta, sigma / beta) < 1e-12

    # Covariance of the score of one labeled pair, by enumeration of prompts, pairs and both labels.
    slope_differences = slopes[:, :, None] - slopes[:, None, :]
    delta = differences(reward)
    second_moment = weights**2 * law * torch.sigmoid(delta) * torch.sigmoid(-delta) / PROMPTS
    score_covariance = torch.einsum("xab,xabi,xabj->ij", second_moment, slope_differences, slope_differences)
    tilted = ((1 + zz)[:, None, None] * covariances).mean(0)
    assert relative(score_covariance - tilted / z_bar**2, score_covariance) < 1e-12
    inverse = torch.linalg.inv(hessian_loss)
    omega = inverse @ score_covariance @ inverse
    expected = torch.linalg.inv(sigma) @ tilted @ torch.linalg.inv(sigma)
    assert relative(omega - expected, expected) < 1e-11
    bound = (1 + zz).max() * torch.linalg.inv(sigma)
    assert torch.linalg.eigvalsh(bound - omega).min() > -1e-10 * bound.norm()

    # Maximum likelihood without w(x) on the same pairs is never worse, and differs once zz depends on the prompt.
    information = torch.einsum(
        "xab,xabi,xabj->ij",
        law * torch.sigmoid(delta) * torch.sigmoid(-delta) / PROMPTS,
        slope_differences,
        slope_differences,
    )
    torch.testing.assert_close(information, (covariances / (1 + zz)[:, None, None]).mean(0), rtol=1e-12, atol=1e-14)
    assert torch.linalg.eigvalsh(omega - torch.linalg.inv(information)).min() > -1e-10 * omega.norm()


def test_gap_of_maximum_likelihood_on_sampled_pairs_matches_theorem_two() -> None:
    """n E[J* - J(theta_hat)] -> d (1 + zz) / (2 beta) for one prompt: sample pairs and labels, fit, measure; seeded."""
    beta, pairs, repetitions = 0.5, 3000, 400
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(RESPONSES, FEATURES, generator=generator, dtype=torch.float64)
    log_reference = torch.randn(RESPONSES, generator=generator, dtype=torch.float64).log_softmax(-1)
    theta = torch.randn(FEATURES, generator=generator, dtype=torch.float64)
    log_policy = (log_reference + features @ theta).log_softmax(-1)
    reward = beta * (log_policy - log_reference)
    law = tpilaf_pair_distribution(log_policy, log_reference, beta)

    draws = torch.multinomial(law.flatten(), repetitions * pairs, replacement=True, generator=generator)
    a, b = draws // RESPONSES, draws % RESPONSES
    wins = torch.bernoulli(torch.sigmoid(reward[a] - reward[b]), generator=generator).reshape(repetitions, pairs)
    slopes = beta * (features[a] - features[b]).reshape(repetitions, pairs, FEATURES)
    fitted = theta.expand(repetitions, FEATURES).clone()
    for _ in range(6):  # Newton's method on a strictly convex loss, started at the truth
        p = torch.sigmoid(torch.einsum("rnd,rd->rn", slopes, fitted))
        gradient = torch.einsum("rn,rnd->rd", p - wins, slopes)
        hessian = torch.einsum("rn,rnd,rne->rde", p * (1 - p), slopes, slopes)
        step = torch.linalg.solve(hessian, gradient)
        fitted -= step
    assert step.abs().max() < 1e-9

    log_fitted = (log_reference + fitted @ features.T).log_softmax(-1)
    gaps = objective_j(log_policy, log_reference, reward, beta) - objective_j(log_fitted, log_reference, reward, beta)
    assert gaps.min() > 0
    predicted = FEATURES * (1 + tilted_distributions(log_policy, log_reference, beta).zz().item()) / (2 * beta)
    standard_error = pairs * gaps.std().item() / repetitions**0.5
    assert pairs * gaps.mean().item() == pytest.approx(predicted, abs=5 * standard_error + 0.05 * predicted)


@betas
def test_mixed_logits_of_one_token_sample_the_exact_tilt(beta: float) -> None:
    # Logits, not log-probabilities: normalizers of the two models cancel.
    policy, reference = 3 * direction(0) + 5, 2 * direction(1) - 7
    laws = tilted_distributions(policy.log_softmax(-1), reference.log_softmax(-1), beta)
    for sign, log_law in ((1, laws.log_plus), (-1, laws.log_minus)):
        mixed = mix_logits(policy, reference, torch.full((PROMPTS,), sign * beta, dtype=torch.float64))
        total_variation = (mixed.softmax(-1) - log_law.exp()).abs().sum(-1) / 2
        assert total_variation.max() < 1e-14


def test_a_beta_of_zero_gives_the_policy() -> None:
    case = problem("tabular", 0.0)
    laws = tilted_distributions(case.log_policy, case.log_reference, 0.0)
    for log_law in (laws.log_plus, laws.log_minus):
        assert (log_law - case.log_policy).abs().max() < 1e-15
    assert (laws.zz() - 1).abs().max() < 1e-15
    policy, reference = direction(0), direction(1)
    assert torch.equal(mix_logits(policy, reference, torch.zeros(PROMPTS)), policy)


def test_j_of_the_papers_table_two_is_reward_minus_a_tenth_of_kl() -> None:
    # Rows of Table 2 (iterative DPO): reward, KL, J. They fix beta = 0.1.
    table = [(-10.16, 35.20, -13.68), (-10.13, 32.38, -13.37), (-10.51, 22.86, -12.80), (-9.80, 25.01, -12.30)]
    for reward, kl, j in table:
        # a law over two outcomes with exactly this KL to a reference that gives the chosen outcome probability exp(-KL)
        log_policy = torch.tensor([0.0, -torch.inf], dtype=torch.float64)
        log_reference = torch.tensor([-kl, 0.0], dtype=torch.float64)
        rewards = torch.tensor([reward, 0.0], dtype=torch.float64)
        assert objective_j(log_policy, log_reference, rewards, beta=0.1).item() == pytest.approx(j, abs=0.0051)
