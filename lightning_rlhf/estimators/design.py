"""Policy-weighted (V-optimal) design: choose the pairs whose labels lower the expected loss in J most. Pure functions.

Notation: ``delta`` is the implicit-reward gap of a pair and ``g`` its gradient in the parameters.

* Fisher information of the labeled pairs: ``I = sum_pairs sigma'(delta) g g^T``. The maximum-likelihood fit to the
  labels has covariance ``I^-1``.
* Policy covariance: ``Sigma = E_x Cov_{y ~ pi}[grad r(x, y)]``, which equals ``-beta Hess J`` at the optimum.
* Design criterion: ``E[J* - J] = tr(Sigma I^-1) / (2 beta)``. V-optimal design minimizes it (Han et al. 2026, arXiv
  2606.19607).
* Value of one more pair: adding ``t sigma'(delta) g g^T`` to I lowers the trace by
  ``t sigma'(delta) g^T I^-1 Sigma I^-1 g`` to first order in t.
"""

from __future__ import annotations

import torch
from torch import Tensor


TIE = 1e-4
"""Relative tolerance: two values closer than this count as equal."""


def policy_weight(information: Tensor, sigma: Tensor) -> Tensor:
    """Compute the weight matrix ``W = I^-1 Sigma I^-1``, symmetric; shape [..., dimensions, dimensions].

    Args:
        information: I, positive definite; shape [..., dimensions, dimensions].
        sigma: Sigma, positive semidefinite; same shape.
    """
    # W = I^-1 (I^-1 Sigma)^T, two solves with one Cholesky factor of I
    factor = torch.linalg.cholesky(information)
    half = torch.cholesky_solve(sigma, factor)
    weight = torch.cholesky_solve(half.transpose(-1, -2), factor)
    # the two solves round differently: averaging with the transpose restores symmetry
    return (weight + weight.transpose(-1, -2)) / 2


def pair_values(features: Tensor, rewards: Tensor, weight: Tensor) -> Tensor:
    """Compute the first-order value of every pair of a pool, ``sigma'(delta) g^T W g``; shape [..., pool, pool].

    Args:
        features: gradient of the implicit reward of each candidate; shape [..., pool, dimensions].
        rewards: implicit reward of each candidate, nats; shape [..., pool].
        weight: W, from `policy_weight`; broadcast over the leading dimensions of ``features``.
    """
    # with g = f_a - f_b:  g^T W g = f_a^T W f_a + f_b^T W f_b - f_a^T W f_b - f_b^T W f_a
    gram = features @ weight @ features.transpose(-1, -2)
    own = gram.diagonal(dim1=-2, dim2=-1)
    # clamp: for two equal candidates, rounding can give a small negative value
    form = (own[..., :, None] + own[..., None, :] - gram - gram.transpose(-1, -2)).clamp_min(0)
    delta = rewards[..., :, None] - rewards[..., None, :]
    # sigma'(delta) = sigma(delta) sigma(-delta), the curvature of the Bradley-Terry likelihood
    return delta.sigmoid() * (-delta).sigmoid() * form


def best_pair(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions of the pair with the largest value, the earlier candidate first; two tensors [...].

    The two candidates always differ. Values within a relative tolerance `TIE` of the maximum count as equal, and the
    first of them is chosen.

    Args:
        values: symmetric values of pairs, >= 0; shape [..., pool, pool].
    """
    size = values.shape[-1]
    # each pair once, above the diagonal; -1 is below every value
    upper = torch.ones(size, size, dtype=torch.bool, device=values.device).triu(1)
    flat = values.masked_fill(~upper, -1.0).flatten(-2)
    # a tolerance, since rounding depends on the batch: a plain argmax would make the choice depend on it, too
    index = (flat >= (1 - TIE) * flat.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)
    return index // size, index % size


def greedy_pairs(gaps: Tensor, slopes: Tensor, information: Tensor, sigma: Tensor, count: int) -> list[int]:
    """Choose the pairs to label greedily: each choice lowers ``tr(Sigma I^-1)`` most, given the earlier choices.

    I includes the pairs chosen so far, so that later choices cover other directions. Values within a relative
    tolerance `TIE` of the maximum count as equal, and the first is chosen. The time is
    O(pairs * dimensions * (dimensions + count)).

    Args:
        gaps: g, the gradient of each pair's implicit-reward gap; shape [pairs, dimensions].
        slopes: sigma'(delta) of each pair; shape [pairs].
        information: I before these pairs, positive definite; shape [dimensions, dimensions].
        sigma: Sigma, positive semidefinite; shape [dimensions, dimensions].
        count: number of pairs to choose, at most ``len(gaps)``.

    Returns:
        Positions of the chosen pairs, in the order of choice.
    """
    # fold sigma' into g, so that the information of a pair is g g^T
    gaps = gaps * slopes.sqrt()[:, None]
    # rows u = I^-1 g and Sigma u of every pair
    solved = torch.cholesky_solve(gaps.T, torch.linalg.cholesky(information)).T
    weighted = solved @ sigma
    available = torch.ones(len(gaps), dtype=torch.bool)
    chosen = []
    for _ in range(count):
        # exact decrease of the trace: u^T Sigma u / (1 + g^T u)
        decrease = (weighted * solved).sum(1) / (1 + (solved * gaps).sum(1))
        decrease = decrease.clamp_min(0).masked_fill(~available, -1.0)
        best = int((decrease >= (1 - TIE) * decrease.max()).to(torch.uint8).argmax())
        chosen.append(best)
        available[best] = False
        # Sherman-Morrison: (I + g g^T)^-1 = I^-1 - u u^T / (1 + g^T u), applied to every row
        direction, weighted_direction = solved[best].clone(), weighted[best].clone()
        coefficient = (gaps @ direction) / (1 + gaps[best] @ direction)
        solved = solved - coefficient[:, None] * direction
        weighted = weighted - coefficient[:, None] * weighted_direction
    return chosen
