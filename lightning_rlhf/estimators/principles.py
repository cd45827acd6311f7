"""Preferences by principles: SALMON (arXiv 2310.05910) as functions of tensors.

A principle p gives a pair a score s_p, positive if a fits it better. A *sign* says how a principle is used: 1 as it is,
-1 negated, 0 not at all.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def order_consistent(forward: Tensor, reverse: Tensor) -> Tensor:
    """Score of each principle from both orders of presentation, 0 where they disagree; any shape.

    Args:
        forward: logit of "a is better" with a shown first.
        reverse: logit of "a is better" with b shown first.
    """
    # s_p = (l_forward + l_reverse) / 2 where the two have one sign; a logit of 0 agrees with none
    return torch.where(forward * reverse > 0, (forward + reverse) / 2, torch.zeros_like(forward))


def variance_scaled(scores: Tensor) -> Tensor:
    """Scores divided by the variance of each principle over the pairs, [pairs, principles].

    A principle that the judge is always sure about would otherwise decide every pair. Variances are population ones,
    over all pairs; a principle without variance gets 0.

    Args:
        scores: s_p of each pair, [pairs, principles].
    """
    variance = scores.var(0, correction=0)
    return torch.where(variance > 0, scores / variance.clamp(min=torch.finfo(scores.dtype).tiny), 0.0)


def dominant_score(scores: Tensor, signs: Tensor) -> Tensor:
    """Signed score of the principle with the largest absolute score among those in use, [...]; 0 is a tie.

    Negating all principles changes its sign.

    Args:
        scores: s_p, [..., principles].
        signs: use of each principle, -1, 0 or 1, [..., principles].
    """
    signed = scores * signs
    # argmax_p |s_p|
    place = signed.abs().argmax(-1, keepdim=True)
    return signed.gather(-1, place).squeeze(-1)


def geometric_count(uniform: float, stop: float, most: int) -> int:
    """A number from 1 to ``most`` of the geometric distribution P(k) ~ (1 - stop)^(k - 1), conditioned on that range.

    Args:
        uniform: a uniform random number from [0, 1).
        stop: parameter of the geometric distribution, in (0, 1).
        most: largest number, >= 1.
    """
    # P(K <= k) = (1 - q^k) / (1 - q^most) with q = 1 - stop; the inverse at u
    rest = 1 - uniform * (1 - (1 - stop) ** most)
    return min(max(math.ceil(math.log(rest) / math.log(1 - stop)), 1), most)


def principle_signs(uniforms: Tensor, principles: int, *, stop: float, most: int, negated: float) -> Tensor:
    """Random use of principles: a geometric number of them, each negated with some probability; [principles].

    Args:
        uniforms: uniform random numbers from [0, 1), [1 + 2 * principles].
        principles: how many there are, >= 1.
        stop: see `geometric_count`.
        most: most principles in use, >= 1.
        negated: probability that a principle is negated, in [0, 1].
    """
    count = geometric_count(float(uniforms[0]), stop, min(most, principles))
    ranks, coins = uniforms[1 : 1 + principles], uniforms[1 + principles : 1 + 2 * principles]
    signs = torch.zeros(principles, dtype=torch.float64)
    # the principles with the smallest numbers are a uniform subset
    chosen = ranks.argsort()[:count]
    signs[chosen] = torch.where(coins[chosen] < negated, -1.0, 1.0).double()
    return signs


def weighted_subset(uniforms: Tensor, weights: Tensor, count: int) -> list[int]:
    """Places of a sample without replacement, each next one in proportion to its weight; in order of selection.

    Efraimidis and Spirakis 2006: the largest of u^(1/w).

    Args:
        uniforms: uniform random numbers from [0, 1), [n].
        weights: weights, >= 0, [n]; those of 0 are never taken.
        count: size of the sample; all with a positive weight if there are fewer.
    """
    # log u / w orders as u^(1/w) does; 1 - u lies in (0, 1]
    keys = torch.log1p(-uniforms) / weights
    order = keys.argsort(descending=True).tolist()
    return [place for place in order if weights[place] > 0][:count]
