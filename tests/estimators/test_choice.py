"""The variance of a choice, against sampling and limits; Gaussian samples, against their moments."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_rlhf.estimators import choice_variance, gaussian_samples


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_choice_variance_agrees_with_sampling() -> None:
    mean, std = double(0.0, 1.0, -3.0, 4.0, 0.5), double(0.5, 2.0, 1.5, 6.0, 25.0)
    z = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sampled = torch.sigmoid(mean[:, None] + std[:, None] * z).var(1)
    # relative standard error of a variance of 4e5 samples is at most about 0.4 % here
    torch.testing.assert_close(choice_variance(mean, std**2), sampled, rtol=0.015, atol=0)


def test_choice_variance_in_its_limits() -> None:
    mean = double(-2.0, 0.0, 1.0)
    assert choice_variance(mean, torch.zeros(3)).abs().max() < 1e-30
    # a small variance: v sigma'(m)^2, with a relative error of the order of v
    slope = mean.sigmoid() * (-mean).sigmoid()
    torch.testing.assert_close(choice_variance(mean, torch.full((3,), 1e-6)) / 1e-6, slope**2, rtol=1e-5, atol=0)
    # a large one: sigma becomes a step, p (1 - p) with p = Phi(m / std)
    p = 0.5 * (1 + math.erf(100 / 100 / math.sqrt(2)))
    assert abs(float(choice_variance(double(100.0), double(100.0**2))) - p * (1 - p)) < 0.005
    # no shift of the gap away from 0 makes a choice less certain
    falling = choice_variance(torch.arange(8.0), torch.full((8,), 2.0))
    assert (falling.diff() < 0).all()


def test_gaussian_samples_have_mean_and_covariance_even_where_responses_are_equal() -> None:
    factor = double(1.0, 1.0, -0.5)[:, None]
    covariance = factor @ factor.T + torch.diag(double(0.0, 0.0, 1.0))
    normals = torch.randn(200_000, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    samples = gaussian_samples(double(1.0, 1.0, 0.0), covariance, normals)
    torch.testing.assert_close(samples.mean(0), double(1.0, 1.0, 0.0), rtol=0, atol=0.02)
    torch.testing.assert_close(samples.T.cov(), covariance, rtol=0, atol=0.02)
    # responses 0 and 1 are equal: so are their rewards in every sample
    torch.testing.assert_close(samples[:, 0], samples[:, 1], rtol=0, atol=1e-6)
