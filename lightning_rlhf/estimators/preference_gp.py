"""Gaussian processes on Bradley-Terry labels: Laplace's approximation, predictions, log evidence. Pure functions.

Notation: pair i has the reward gap ``f_i = r(a_i) - r(b_i)`` and the label ``p_i``, P(a preferred). The rewards are a
Gaussian process with kernel k, so that ``f ~ N(0, K)`` with

    K_ij = k(a_i, a_j) - k(a_i, b_j) - k(b_i, a_j) + k(b_i, b_j)

and the labels have the log-likelihood ``sum_i w_i (p_i log sigma(f_i) + (1 - p_i) log sigma(-f_i))``. Equations are
those of Rasmussen and Williams, "Gaussian Processes for Machine Learning" (GPML), chapter 3. All tensors are float64:
in float32 the Cholesky factor of a thousand pairs is too inexact for Newton's method to converge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


MOST_STEPS = 100
"""Newton steps after which `laplace` gives up; ten are many."""

MOST_HALVINGS = 40
"""Halvings of a Newton step; below 2^-40 the objective does not change."""


@dataclass(frozen=True)
class Laplace:
    """Gaussian approximation of the posterior of reward gaps, ``N(mode, (K^-1 + diag(curvature))^-1)``.

    Args:
        mode: f at the maximum of the posterior, nats; [pairs].
        slope: gradient of the log-likelihood at the mode, ``K^-1 f``; [pairs].
        curvature: W, the negative second derivative of the log-likelihood, >= 0; [pairs].
        factor: lower Cholesky factor of ``B = I + W^1/2 K W^1/2``; [pairs, pairs].
        log_evidence: Laplace's approximation of log p(labels | kernel), nats (GPML eq. 3.32).
    """

    mode: Tensor
    slope: Tensor
    curvature: Tensor
    factor: Tensor
    log_evidence: float


def laplace(gram: Tensor, probabilities: Tensor, weights: Tensor | None = None, *, tolerance: float = 1e-10) -> Laplace:
    """Find the mode of the posterior by Newton's method with step halving, from f = 0 (GPML algorithm 3.1).

    The log-likelihood is concave, so that there is one mode; halving makes every step an ascent.

    Args:
        gram: K, positive semidefinite, float64; [pairs, pairs].
        probabilities: p, in [0, 1]; [pairs].
        weights: w, >= 0: labels that each pair counts as. Default: one; [pairs].
        tolerance: increase of the log posterior at which it stops, nats.

    Raises:
        ValueError: if a tensor has another shape or data type, or a number is outside its range.
        RuntimeError: if Newton's method does not converge, since the Gram matrix is not positive semidefinite.
    """
    weights = torch.ones_like(probabilities) if weights is None else weights
    _check(gram, probabilities, weights)
    f, slope = torch.zeros_like(probabilities), torch.zeros_like(probabilities)
    value = float(_log_likelihood(f, probabilities, weights))
    for _ in range(MOST_STEPS):
        curvature, factor = _factor(gram, f, weights)
        root = curvature.sqrt()
        # a = b - W^1/2 B^-1 W^1/2 K b with b = W f + grad log p: the Newton step is f = K a
        b = curvature * f + weights * (probabilities - f.sigmoid())
        inner = torch.cholesky_solve((root * (gram @ b))[:, None], factor)[:, 0]
        direction = b - root * inner - slope
        size, increase = 1.0, 0.0
        for _ in range(MOST_HALVINGS):
            new_slope = slope + size * direction
            new_f = gram @ new_slope
            # log p(labels | f) - f^T K^-1 f / 2, with f = K a
            new_value = float(_log_likelihood(new_f, probabilities, weights) - new_slope @ new_f / 2)
            increase = new_value - value
            if increase >= 0:
                break
            size /= 2
        if increase >= 0:
            f, slope, value = new_f, new_slope, new_value
        # rounding alone can make the last step a descent
        if increase < tolerance:
            break
    else:
        raise RuntimeError("Newton's method did not converge: the Gram matrix is not positive semidefinite")
    curvature, factor = _factor(gram, f, weights)
    # log q(y) = log p(y | f) - f^T K^-1 f / 2 - log det(B) / 2, GPML eq. 3.32
    log_evidence = value - float(factor.diagonal().log().sum())
    return Laplace(f, weights * (probabilities - f.sigmoid()), curvature, factor, log_evidence)


def predict(fit: Laplace, cross: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior mean and covariance of rewards, [rewards] and [rewards, rewards] (GPML eqs. 3.21 and 3.24).

    Rewards are known up to a constant per prompt: differences within a prompt have a meaning.

    Args:
        fit: result of `laplace`.
        cross: prior covariance of rewards and gaps, ``k(y, a_i) - k(y, b_i)``; [rewards, pairs].
        prior: prior covariance of the rewards, k(y, y'); [rewards, rewards].
    """
    mean = cross @ fit.slope
    # k** - v^T v with L v = W^1/2 k*
    v = torch.linalg.solve_triangular(fit.factor, fit.curvature.sqrt()[:, None] * cross.T, upper=False)
    covariance = prior - v.T @ v
    return mean, (covariance + covariance.T) / 2


def leave_one_out(fit: Laplace) -> Tensor:
    """Mean of the gap of each pair in the posterior of all other labels, nats; [pairs].

    The site of a pair is taken out of the Gaussian posterior (the cavity of GPML eq. 3.56). With ``b = diag(B^-1)`` the
    posterior variance is ``(1 - b) / W``, and the cavity has the variance ``c = (1 - b) / (W b)`` and the mean
    ``f - c g``, g the slope.

    Args:
        fit: result of `laplace`.
    """
    inverse = torch.cholesky_inverse(fit.factor).diagonal()
    # W is 0 where a label is certain or has no weight; then its slope is 0 as well
    curvature = fit.curvature.clamp_min(torch.finfo(torch.float64).tiny)
    variance = (1 - inverse) / (curvature * inverse)
    return fit.mode - variance * fit.slope


def choose_variances(
    grams: Tensor,
    start: Tensor,
    probabilities: Tensor,
    groups: Sequence[Sequence[int]],
    *,
    ratio: float = 2.0,
    most: int = 2,
    weights: Tensor | None = None,
) -> Tensor:
    """Choose the variances of a sum of kernels by coordinate ascent in the log evidence; [kernels].

    A search without derivatives: each group in turn is multiplied by ``ratio^2`` or divided by it as long as that
    raises the log evidence of ``K = sum_j variance_j K_j``.

    Args:
        grams: K_j, the Gram matrices of gaps under each kernel, float64; [kernels, pairs, pairs].
        start: variances to start from, >= 0; [kernels].
        probabilities: as in `laplace`.
        groups: kernels whose variances are multiplied together.
        ratio: factor between neighboring standard deviations on the grid, > 1.
        most: steps on the grid between a group and its start, at most.
        weights: as in `laplace`.
    """
    steps = [0] * len(groups)
    found: dict[tuple[int, ...], float] = {}

    def variances(place: Sequence[int]) -> Tensor:
        result = start.clone()
        for group, step in zip(groups, place, strict=True):
            result[list(group)] *= ratio ** (2 * step)
        return result

    def evidence(place: Sequence[int]) -> float:
        key = tuple(place)
        if key not in found:
            gram = torch.einsum("k,knm->nm", variances(place), grams)
            found[key] = laplace(gram, probabilities, weights).log_evidence
        return found[key]

    improved = True
    while improved:
        improved = False
        for position in range(len(groups)):
            for direction in (-1, 1):
                moved = [*steps]
                moved[position] += direction
                # strictly: equal evidence leaves the start alone, and the search ends
                while abs(moved[position]) <= most and evidence(moved) > evidence(steps):
                    steps, improved = [*moved], True
                    moved[position] += direction
    return variances(steps)


def _log_likelihood(f: Tensor, probabilities: Tensor, weights: Tensor) -> Tensor:
    # p log sigma(f) + (1 - p) log sigma(-f) = p f - softplus(f)
    return (weights * (probabilities * f - F.softplus(f))).sum()


def _factor(gram: Tensor, f: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """W at f, and the Cholesky factor of ``I + W^1/2 K W^1/2``, whose eigenvalues are at least 1."""
    curvature = weights * f.sigmoid() * (-f).sigmoid()
    root = curvature.sqrt()
    inside = root[:, None] * gram * root
    inside.diagonal().add_(1.0)
    return curvature, torch.linalg.cholesky(inside)


def _check(gram: Tensor, probabilities: Tensor, weights: Tensor) -> None:
    count = len(probabilities)
    if gram.shape != (count, count) or weights.shape != (count,):
        raise ValueError(
            f"{count} labels need a Gram matrix of shape [{count}, {count}] and {count} weights; got "
            f"{list(gram.shape)} and {list(weights.shape)}"
        )
    if any(tensor.dtype != torch.float64 for tensor in (gram, probabilities, weights)):
        raise ValueError("Gram matrix, probabilities and weights must be float64")
    # not `any(outside)`: NaN must be refused too
    if not bool(((probabilities >= 0) & (probabilities <= 1)).all()):
        raise ValueError("probabilities must lie in [0, 1]")
    if not bool((weights >= 0).all()):
        raise ValueError("weights must be >= 0")
