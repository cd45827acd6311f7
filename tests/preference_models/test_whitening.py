"""Whitening by unlabeled samples, also by fewer than there are dimensions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_rlhf.preference_models.whitening import fit_whitening


def correlated(count: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # variances from 1 to 4 along random axes
    axes = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    mixing = torch.linspace(1, 2, width, dtype=torch.float64)[:, None] * axes
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing + 3.0


def test_whitened_features_have_mean_zero_equal_variances_and_the_chosen_norm() -> None:
    samples = correlated(40_000, 4)
    ones = torch.ones(len(samples))
    white = fit_whitening(samples, ones, squared_norm=8.0)(samples, ones)
    torch.testing.assert_close(white.mean(0), torch.zeros(4, dtype=torch.float64), atol=1e-10, rtol=0)
    # 8 over 4 dimensions; shrinkage leaves a trace of the correlations
    torch.testing.assert_close(white.T.cov(), 2 * torch.eye(4, dtype=torch.float64), atol=0.1, rtol=0)
    assert abs(float(white.square().sum(1).mean()) - 8.0) < 1e-9


def test_sums_lose_the_mean_of_each_token() -> None:
    tokens = correlated(600, 3).reshape(200, 3, 3)
    lengths = torch.tensor([1.0, 2.0, 3.0]).repeat(67)[:200]
    kept = torch.arange(3)[None] < lengths[:, None]
    sums = (tokens * kept[..., None]).sum(1)
    whitening = fit_whitening(sums, lengths, 4.0)
    torch.testing.assert_close(whitening.center, tokens[kept].mean(0))
    # a response of mean tokens has no feature, however long it is
    average = 7 * whitening.center[None]
    assert float(whitening(average, torch.tensor([7.0])).abs().max()) < 1e-9


def test_fewer_samples_than_dimensions_are_safe() -> None:
    samples, fresh = correlated(5, 30), correlated(200, 30)[5:]
    ones = torch.ones(len(fresh))
    white = fit_whitening(samples, ones[:5], 4.0)(fresh, ones)
    # directions that no sample had are not blown up: fresh responses have norms like the samples
    assert 1.0 < float(white.square().sum(1).mean()) < 40.0


def test_features_without_variance_stay_as_they_are() -> None:
    same = torch.full((10, 3), 2.0)
    assert float(fit_whitening(same, torch.ones(10), 4.0)(same, torch.ones(10)).abs().max()) == 0


def test_gram_matrices_do_not_depend_on_the_basis_of_features() -> None:
    samples = correlated(50, 6)
    ones = torch.ones(50)
    rotation = torch.linalg.qr(correlated(6, 6, seed=1))[0]
    grams = []
    for features in (samples, samples @ rotation, 10 * samples):
        white = fit_whitening(features, ones, 4.0)(features, ones)
        grams.append(white @ white.T)
    torch.testing.assert_close(grams[0], grams[1])
    torch.testing.assert_close(grams[0], grams[2])


@pytest.mark.parametrize("power", [0.0, 0.25, 0.5])
def test_a_power_below_one_leaves_part_of_the_variances(power: float) -> None:
    """With covariance C of the samples, up to shrinkage, the whitened ones have C^(1 - power) up to a factor."""
    samples = correlated(40_000, 4)
    ones = torch.ones(len(samples))
    white = fit_whitening(samples, ones, 8.0, power)(samples, ones)
    found, before = torch.linalg.eigvalsh(white.T.cov()), torch.linalg.eigvalsh(samples.T.cov())
    expected = before ** (1 - power)
    torch.testing.assert_close(found / found.sum(), expected / expected.sum(), atol=0.01, rtol=0)
    assert abs(float(white.square().sum(1).mean()) - 8.0) < 1e-9


def test_power_zero_only_centers_and_scales() -> None:
    samples = correlated(50, 6)
    ones = torch.ones(50)
    white = fit_whitening(samples, ones, 4.0, 0.0)(samples, ones)
    centered = samples - samples.mean(0)
    gram, expected = white @ white.T, centered @ centered.T
    torch.testing.assert_close(gram, expected * (gram.trace() / expected.trace()))
