"""Laplace's approximation of a Gaussian process on Bradley-Terry labels, against brute force."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_rlhf.estimators.preference_gp import choose_variances, laplace, leave_one_out, predict


def problem(pairs: int, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """A Gram matrix, soft labels and weights."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(pairs, pairs + 2, generator=generator, dtype=torch.float64)
    probabilities = torch.rand(pairs, generator=generator, dtype=torch.float64)
    weights = 0.5 + torch.rand(pairs, generator=generator, dtype=torch.float64)
    return scale * features @ features.T / pairs, probabilities, weights


def log_posterior(f: Tensor, gram: Tensor, probabilities: Tensor, weights: Tensor) -> Tensor:
    """log p(labels | f) - f^T K^-1 f / 2, written as in the definition; f is [..., pairs]."""
    likelihood = weights * (probabilities * F.logsigmoid(f) + (1 - probabilities) * F.logsigmoid(-f))
    return likelihood.sum(-1) - (f @ torch.linalg.inv(gram) * f).sum(-1) / 2


def grid(gram: Tensor, probabilities: Tensor, weights: Tensor, points: int = 401) -> tuple[Tensor, Tensor, float]:
    """All f on a grid of one or two dimensions, their posterior probabilities, and the exact log evidence."""
    width = 12 * float(gram.diagonal().max().sqrt())
    axis = torch.linspace(-width / 2, width / 2, points, dtype=torch.float64)
    f = torch.cartesian_prod(*[axis] * len(gram)).reshape(-1, len(gram))
    log_density = log_posterior(f, gram, probabilities, weights)
    # integral of N(f; 0, K) p(labels | f) by the trapezoidal rule, which is exact to rounding for smooth tails
    constant = -torch.logdet(2 * math.pi * gram) / 2 + len(gram) * torch.log(axis[1] - axis[0])
    return f, log_density.softmax(0), float(log_density.logsumexp(0) + constant)


def test_mode_and_curvature_are_those_of_the_log_posterior() -> None:
    gram, probabilities, weights = problem(6, scale=5.0)
    fit = laplace(gram, probabilities, weights)
    mode = fit.mode.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(log_posterior(mode, gram, probabilities, weights), mode)
    assert float(gradient.abs().max()) < 1e-6
    hessian = torch.autograd.functional.hessian(
        lambda f: log_posterior(f, gram, probabilities, weights), fit.mode, vectorize=True
    )
    torch.testing.assert_close(torch.diag(fit.curvature), -hessian - torch.linalg.inv(gram))
    torch.testing.assert_close(gram @ fit.slope, fit.mode, atol=1e-6, rtol=1e-6)


def test_far_from_the_mode_halved_steps_converge() -> None:
    # certain labels that contradict each other under a strong prior: whole Newton steps overshoot
    gram = 400 * torch.tensor([[1.0, 0.999], [0.999, 1.0]], dtype=torch.float64)
    probabilities = torch.tensor([1.0, 0.0], dtype=torch.float64)
    fit = laplace(gram, probabilities, torch.tensor([50.0, 1.0], dtype=torch.float64))
    mode = fit.mode.clone().requires_grad_()
    value = log_posterior(mode, gram, probabilities, torch.tensor([50.0, 1.0], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(value, mode)
    assert float(gradient.abs().max()) < 1e-4


@pytest.mark.parametrize("pairs", [1, 2])
def test_log_evidence_is_near_the_integral(pairs: int) -> None:
    gram, probabilities, weights = problem(pairs, seed=1)
    exact = grid(gram, probabilities, weights)[2]
    assert laplace(gram, probabilities, weights).log_evidence == pytest.approx(exact, abs=0.02)


def test_log_evidence_is_exact_to_first_order_for_a_weak_prior() -> None:
    # for K -> 0, E[sigma(f)] -> 1/2
    gram = torch.tensor([[1e-4]], dtype=torch.float64)
    exact = grid(gram, torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))[2]
    assert exact == pytest.approx(math.log(0.5), abs=1e-6)
    fit = laplace(gram, torch.ones(1, dtype=torch.float64))
    assert fit.log_evidence == pytest.approx(exact, abs=1e-8)


def test_predictions_are_near_the_moments_of_the_exact_posterior() -> None:
    # two gaps and three rewards, jointly Gaussian: r(a), r(b), r(c), with labels of a - b and b - c
    generator = torch.Generator().manual_seed(3)
    root = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    prior = 0.2 * root @ root.T
    differences = torch.tensor([[1.0, -1.0, 0.0], [0.0, 1.0, -1.0]], dtype=torch.float64)
    gram, cross = differences @ prior @ differences.T, prior @ differences.T
    probabilities, weights = torch.tensor([1.0, 0.3], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    f, masses, _ = grid(gram, probabilities, weights)
    # E[r] = A E[f], Cov[r] = prior - A K A^T + A Cov[f] A^T with A = cross K^-1
    weight = cross @ torch.linalg.inv(gram)
    center = masses @ f
    spread = (masses[:, None] * (f - center)).T @ (f - center)
    mean, covariance = predict(laplace(gram, probabilities, weights), cross, prior)
    torch.testing.assert_close(mean, weight @ center, atol=0.03, rtol=0.05)
    expected = prior - weight @ gram @ weight.T + weight @ spread @ weight.T
    torch.testing.assert_close(covariance, expected, atol=0.03, rtol=0.05)
    assert float(mean[0] - mean[1]) > 0.2


def test_without_labels_the_posterior_is_the_prior() -> None:
    empty = torch.zeros(0, 0, dtype=torch.float64)
    fit = laplace(empty, torch.zeros(0, dtype=torch.float64))
    prior = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    mean, covariance = predict(fit, torch.zeros(2, 0, dtype=torch.float64), prior)
    assert mean.tolist() == [0, 0]
    torch.testing.assert_close(covariance, prior)
    assert fit.log_evidence == 0


def test_a_weight_of_two_is_the_same_label_twice() -> None:
    gram = torch.tensor([[1.5]], dtype=torch.float64)
    once = laplace(gram, torch.tensor([0.8], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64))
    twice = laplace(gram.expand(2, 2).contiguous(), torch.tensor([0.8, 0.8], dtype=torch.float64))
    assert float(once.mode) == pytest.approx(float(twice.mode[0]), abs=1e-8)
    assert once.log_evidence == pytest.approx(twice.log_evidence, abs=1e-8)


def test_evidence_finds_the_kernel_that_made_the_labels() -> None:
    generator = torch.Generator().manual_seed(5)
    true, noise = (torch.randn(120, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.tensor([2.0, -2.0, 1.0], dtype=torch.float64)
    probabilities = (torch.rand(120, generator=generator, dtype=torch.float64) < (true @ weight).sigmoid()).double()
    grams = torch.stack([true @ true.T, noise @ noise.T])
    start = torch.tensor([0.25, 0.25], dtype=torch.float64)
    found = choose_variances(grams, start, probabilities, [(0,), (1,)])
    assert found[0] == 4.0
    assert found[1] < 0.25

    def evidence(variances: Tensor) -> float:
        return laplace(torch.einsum("k,knm->nm", variances, grams), probabilities).log_evidence

    # a maximum on the grid: one step back has less evidence, and the start less still
    assert evidence(found) > evidence(found * torch.tensor([0.25, 1.0])) > evidence(start)
    for factor in (0.25, 4.0):
        assert evidence(found) >= evidence(found * torch.tensor([1.0, factor]))
    together = choose_variances(grams, start, probabilities, [(0, 1)])
    assert together[0] == together[1] != 0.25


def test_bad_input_is_refused() -> None:
    gram, probabilities, weights = problem(3)
    with pytest.raises(ValueError, match="shape"):
        laplace(gram[:2], probabilities)
    with pytest.raises(ValueError, match="float64"):
        laplace(gram.float(), probabilities)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        laplace(gram, probabilities + float("nan"))
    with pytest.raises(ValueError, match=">= 0"):
        laplace(gram, probabilities, -weights)


def test_leaving_one_out_is_a_fit_without_it() -> None:
    """The mean of the cavity against the mean of a fit to all other pairs."""
    gram, probabilities, _ = problem(40, scale=4.0)
    labels = probabilities.round()
    fit = laplace(gram, labels)
    refitted = []
    for place in range(len(labels)):
        others = torch.arange(len(labels)) != place
        without = laplace(gram[others][:, others], labels[others])
        refitted.append(predict(without, gram[[place]][:, others], gram[[place]][:, [place]])[0])
    exact = torch.cat(refitted)
    # the approximation leaves the curvature of the other pairs as it is
    error = (leave_one_out(fit) - exact).abs().max()
    assert error < 0.05 * (fit.mode - exact).abs().max()
