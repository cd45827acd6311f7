"""Which pair is worth a label: policy-weighted (V-optimal) design, as pure functions.

After n labels the maximum-likelihood fit has the covariance I^-1, with the information ``I = sum sigma'(delta) g g'``
over labelled pairs, ``g`` the gradient of the pair's implicit-reward gap delta; and the expected loss in J is
``tr(Sigma I^-1) / (2 beta)``, with ``Sigma = E_x Cov_{y ~ pi}[grad r]``, minus beta times the Hessian of J. Adding
``t`` of a pair's information lowers the trace by ``t sigma'(delta) g' I^-1 Sigma I^-1 g`` to first order.
"""

from __future__ import annotations

import torch
from torch import Tensor


TIE = 1e-4
"""Share by which two values must differ to be told apart."""


def policy_weight(information: Tensor, sigma: Tensor) -> Tensor:
    """``I^-1 Sigma I^-1``, symmetric; shape [..., dimensions, dimensions].

    Args:
        information: I, positive definite.
        sigma: Sigma, positive semidefinite.
    """
    factor = torch.linalg.cholesky(information)
    half = torch.cholesky_solve(sigma, factor)
    weight = torch.cholesky_solve(half.transpose(-1, -2), factor)
    return (weight + weight.transpose(-1, -2)) / 2


def pair_values(features: Tensor, rewards: Tensor, weight: Tensor) -> Tensor:
    """What each pair of a pool promises, ``sigma'(delta) g' W g``; shape [..., pool, pool].

    Args:
        features: gradient of the implicit reward of each candidate; shape [..., pool, dimensions].
        rewards: implicit reward of each candidate; shape [..., pool].
        weight: W, from `policy_weight`; broadcast over the leading dimensions of ``features``.
    """
    gram = features @ weight @ features.transpose(-1, -2)
    own = gram.diagonal(dim1=-2, dim2=-1)
    # rounding can take the form of two equal candidates below zero
    form = (own[..., :, None] + own[..., None, :] - gram - gram.transpose(-1, -2)).clamp_min(0)
    delta = rewards[..., :, None] - rewards[..., None, :]
    return delta.sigmoid() * (-delta).sigmoid() * form


def best_pair(values: Tensor) -> tuple[Tensor, Tensor]:
    """The pair of greatest value, always two different candidates, the earlier one first; two tensors [...].

    Values within a share `TIE` of the greatest are equal, and the first of them is taken: two equal candidates differ
    by rounding, which depends on the batch they were computed in.

    Args:
        values: symmetric values of pairs; shape [..., pool, pool].
    """
    size = values.shape[-1]
    upper = torch.ones(size, size, dtype=torch.bool, device=values.device).triu(1)
    flat = values.masked_fill(~upper, -1.0).flatten(-2)
    index = (flat >= (1 - TIE) * flat.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)
    return index // size, index % size


def greedy_pairs(gaps: Tensor, slopes: Tensor, information: Tensor, sigma: Tensor, count: int) -> list[int]:
    """Choose which of many pairs to label, one after the other: each lowers ``tr(Sigma I^-1)`` most.

    The fall is exact, ``sigma'(delta) g' I^-1 Sigma I^-1 g / (1 + sigma'(delta) g' I^-1 g)``, and I counts the pairs
    that were chosen before, so that the next one looks elsewhere. Values within a share `TIE` of the greatest are
    equal, and the first is taken. The time is O(pairs * dimensions * (dimensions + count)).

    Args:
        gaps: g, the gradient of each pair's gap in implicit reward; shape [pairs, dimensions].
        slopes: sigma'(delta) of each pair; shape [pairs].
        information: I before these pairs, positive definite; shape [dimensions, dimensions].
        sigma: Sigma, positive semidefinite.
        count: pairs to choose, at most as many as there are.
    """
    gaps = gaps * slopes.sqrt()[:, None]
    solved = torch.cholesky_solve(gaps.T, torch.linalg.cholesky(information)).T
    weighted = solved @ sigma
    left = torch.ones(len(gaps), dtype=torch.bool)
    chosen = []
    for _ in range(count):
        fall = (weighted * solved).sum(1) / (1 + (solved * gaps).sum(1))
        fall = fall.clamp_min(0).masked_fill(~left, -1.0)
        best = int((fall >= (1 - TIE) * fall.max()).to(torch.uint8).argmax())
        chosen.append(best)
        left[best] = False
        # I + g g' has the inverse I^-1 - u u' / (1 + g' u) with u = I^-1 g
        direction, image = solved[best].clone(), weighted[best].clone()
        share = (gaps @ direction) / (1 + gaps[best] @ direction)
        solved = solved - share[:, None] * direction
        weighted = weighted - share[:, None] * image
    return chosen
