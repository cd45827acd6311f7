"""Ranks of several responses from comparisons of two at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_win_probability(wins: Tensor) -> Tensor:
    """Mean probability of each response to win against the others; float64, shape [..., n].

    A pairwise preference model ranks n responses by it (RLHF Workflow, arXiv 2405.07863). Both orders of a pair are
    averaged, ``(P(i, j) + 1 - P(j, i)) / 2``, so that the means over all responses add up to n / 2. Under a
    Bradley-Terry model it orders responses as their rewards do; where preferences are a circle all responses tie.

    Args:
        wins: P(i preferred to j), in [0, 1]; NaN where there is no verdict, and on the diagonal, which is not read.
            Shape [..., n, n]. A pair without a verdict in either order is left out of the means.

    Returns:
        Means over the verdicts of each response; NaN for one without any.
    """
    probabilities = wins.double()
    # P(i, j) and 1 - P(j, i) are two verdicts on the same pair
    orders = torch.stack([probabilities, 1.0 - probabilities.transpose(-1, -2)])
    both = orders.nanmean(0)
    itself = torch.eye(wins.size(-1), dtype=torch.bool, device=wins.device)
    return both.masked_fill(itself, torch.nan).nanmean(-1)
