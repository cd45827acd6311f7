"""Weights of pairs by how much better one response is: Reward Difference Optimization (arXiv 2408.09385)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


WeightRule = Literal["clip", "abs", "sigmoid"]
"""How a difference of rewards becomes a weight, see `difference_weight`."""


def antisymmetric_difference(forward: Tensor, backward: Tensor) -> Tensor:
    """D(a, b) = (f(x, a, b) - f(x, b, a)) / 2, which changes its sign when the responses change places; any shape.

    Half the sum of f over both orders is a preference for a place; the difference cancels it.

    Args:
        forward: f(x, a, b), a score of a text that holds both responses; carries gradient.
        backward: f(x, b, a), the score with the responses exchanged; carries gradient.
    """
    return (forward - backward) / 2


def difference_weight(difference: Tensor, label: Tensor, rule: WeightRule = "clip") -> Tensor:
    """Coefficient R of a pair in the loss, >= 0, before normalization; shape [pairs].

    With d = difference * sign(label - 1/2), the lead of the response that the label prefers:

    - ``clip``: max(0, d). A pair whose label the difference contradicts gets 0. A tie gets 0 too.
    - ``abs``: abs(difference), whatever the label.
    - ``sigmoid``: sigma(d).

    RDO (arXiv 2408.09385) multiplies the loss of a pair by R = r(chosen) - r(rejected). Without the clip, R is negative
    where label and difference disagree, and the loss is maximized there.

    Args:
        difference: D(a, b), [pairs].
        label: P(a preferred) in [0, 1], [pairs].
        rule: how the difference becomes a weight.
    """
    if rule == "abs":
        return difference.abs()
    lead = difference * torch.sign(label - 0.5)
    return lead.sigmoid() if rule == "sigmoid" else lead.clamp(min=0.0)


def effective_sample_size(weights: Tensor) -> Tensor:
    """Kish's effective sample size (sum w)^2 / sum w^2: pairs of equal weight that vary as much; scalar, float64.

    It is the number of pairs where all weights are equal, and 0 where all are 0.

    Args:
        weights: weights, >= 0, [pairs].
    """
    weights = weights.double()
    squares = weights.square().sum()
    # 0 / 0 where no pair counts
    return torch.where(squares > 0, weights.sum().square() / squares.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
