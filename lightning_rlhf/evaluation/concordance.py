"""Agreement of several raters who rank the same responses."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rlhf.evaluation.metrics import MeanWithError


def average_ranks(ratings: Tensor) -> Tensor:
    """Ranks 1 to n along the last dimension, the smallest rating first; tied ratings share the mean of their ranks."""
    # rank_i = #{j: r_j < r_i} + (#{j: r_j = r_i} + 1) / 2, pairs [..., n, n] summed over j
    below = (ratings.unsqueeze(-2) < ratings.unsqueeze(-1)).double().sum(-1)
    equal = (ratings.unsqueeze(-2) == ratings.unsqueeze(-1)).double().sum(-1)
    return below + (equal + 1) / 2


def kendalls_w(ratings: Tensor) -> Tensor:
    """Kendall's coefficient of concordance, 1 for raters who agree and 0 for ranks that cancel; [...].

    W = 12 S / (m^2 (n^3 - n)) for m raters of n responses, with S the sum of squared deviations of the rank sums;
    Kendall and Babington Smith 1939. Ties are corrected for in the denominator. NaN if every rater ties everything.

    Args:
        ratings: ratings or ranks, [..., raters, responses].
    """
    ranks = average_ranks(ratings.double())
    raters, items = ranks.shape[-2:]
    rank_sums = ranks.sum(-2)
    # S = sum_i (R_i - mean R)^2 with the rank sums R, [..., responses]
    spread = (rank_sums - rank_sums.mean(-1, keepdim=True)).square().sum(-1)
    # sum of t^3 - t over groups of t ties: every response contributes its group's t^2 - 1
    group = (ratings.unsqueeze(-2) == ratings.unsqueeze(-1)).double().sum(-1)
    ties = (group.square() - 1).sum((-1, -2))
    # W = 12 S / (m^2 (n^3 - n) - m sum (t^3 - t))
    return 12 * spread / (raters**2 * (items**3 - items) - raters * ties)


def pair_agreement(truth: Tensor, scores: Tensor, groups: Tensor) -> tuple[float, int]:
    """Share of pairs within groups that scores order as the truth does, a tie of the scores counting one half.

    Args:
        truth: true reward of each response, [B]; pairs with a tie do not count.
        scores: reward by the scores that are tested, [B].
        groups: the prompt that each answers, [B].

    Returns:
        The share, NaN if there is no pair, and the number of pairs.
    """
    first, second = torch.triu_indices(len(truth), len(truth), offset=1)
    kept = (groups[first] == groups[second]) & (truth[first] != truth[second])
    first, second = first[kept], second[kept]
    alike = torch.sign(truth[first] - truth[second]) * torch.sign(scores[first] - scores[second])
    # alike is 1, 0 or -1: share = (mean + 1) / 2 counts a tie one half
    return (alike.double().mean().item() + 1) / 2, len(first)


class KendallsW(MeanWithError):
    """Mean of Kendall's W over prompts, each rated by several raters, and its standard error; see `kendalls_w`."""

    def update(self, values: Tensor) -> None:
        """Take in ratings, [prompts, raters, responses]."""
        w = kendalls_w(values)
        # prompts on which every rater ties everything have no W, and would turn the mean into NaN
        super().update(w[~torch.isnan(w)])
