"""Whitening: features without correlations, by statistics of responses that nobody labeled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


LEAST_SHRINKAGE = 0.01
"""Weight of the identity in the covariance, at least: directions without variance must not be blown up."""


@dataclass(frozen=True)
class Whitening:
    """A linear map that gives features unit covariance, or goes part of the way, and then a mean squared norm.

    Args:
        center: mean feature per unit of length; [width].
        factor: lower Cholesky factor of the shrunk covariance C, or of C^power; [width, width].
        scale: factor of the whitened features.
    """

    center: Tensor
    factor: Tensor
    scale: float

    def __call__(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Whitened features, [rows, width]; arguments as in `fit_whitening`."""
        centered = features.double() - lengths.double()[:, None] * self.center
        # with L L^T = C^power: L^-1 z has covariance L^-1 C L^-T, the identity at power 1
        whitened: Tensor = torch.linalg.solve_triangular(self.factor, centered.T, upper=False).T
        return self.scale * whitened


def fit_whitening(features: Tensor, lengths: Tensor, squared_norm: float, power: float = 1.0) -> Whitening:
    """Fit a whitening of sums over tokens.

    The covariance is shrunk towards a multiple of the identity by the oracle approximating shrinkage of Chen et al.
    (2010), eq. 23, so that fewer samples than dimensions are enough.

    Args:
        features: sums over the tokens of each sample; [samples, width].
        lengths: tokens of each sample; ones for features that are no sums; [samples].
        squared_norm: mean squared norm of the whitened features over the samples.
        power: exponent of the covariance, in [0, 1]: inner products are ``z^T C^-power z'``. 1 whitens, 0 only centers
            and scales.
    """
    features, lengths = features.double(), lengths.double()
    count, width = features.shape
    # per token, so that longer responses do not differ by the mean embedding alone
    center = features.sum(0) / lengths.sum().clamp_min(1.0)
    centered = features - lengths[:, None] * center
    covariance = centered.T @ centered / max(count, 1)
    trace, squares = float(covariance.trace()), float(covariance.square().sum())
    if trace <= 0:
        # no sample differs from another
        return Whitening(center, torch.eye(width, dtype=torch.float64), 1.0)
    # rho = ((1 - 2/p) tr(S^2) + tr(S)^2) / ((n + 1 - 2/p) (tr(S^2) - tr(S)^2 / p)), at most 1
    spread = (count + 1 - 2 / width) * (squares - trace**2 / width)
    shrinkage = min(1.0, ((1 - 2 / width) * squares + trace**2) / spread) if spread > 0 else 1.0
    shrinkage = max(shrinkage, LEAST_SHRINKAGE)
    shrunk = (1 - shrinkage) * covariance
    shrunk.diagonal().add_(shrinkage * trace / width)
    unscaled = Whitening(center, torch.linalg.cholesky(_power(shrunk, power)), 1.0)
    mean = float(unscaled(features, lengths).square().sum(1).mean())
    return Whitening(center, unscaled.factor, (squared_norm / mean) ** 0.5)


def _power(matrix: Tensor, power: float) -> Tensor:
    """Power of a positive definite matrix."""
    if power == 1:
        return matrix
    values, vectors = torch.linalg.eigh(matrix)
    # V diag(e^power) V^T
    powered: Tensor = (vectors * values.pow(power)) @ vectors.T
    return powered
