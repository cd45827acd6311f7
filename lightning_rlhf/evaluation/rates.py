"""Shares of pairs or responses: their intervals, a test against chance, and a correction for length."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits


Z95 = 1.959963984540054
"""Standard deviations either side of the mean that hold 95 % of a normal distribution."""

RIDGE = 1e-4
"""Penalty on the slope of the length correction: too weak to be seen, and enough where lengths tell all verdicts."""


def wilson_interval(successes: float, count: float, z: float = Z95) -> tuple[float, float]:
    """Interval of a share by Wilson's score, in [0, 1]; NaN without trials.

    Wilson 1927. Unlike mean +- z standard errors it is never empty, also where all or none succeed. With soft
    successes (ties that count 1/2) it is a little too wide.

    Args:
        successes: number of successes, ties counted 1/2; in [0, count].
        count: number of trials.
        z: half width in standard deviations of a normal distribution; 1.96 gives 95 %.
    """
    if count <= 0:
        return math.nan, math.nan
    share = successes / count
    # (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    # rounding alone must not lift a bound over a share of exactly 0 or 1
    return min(max((middle - half) / scale, 0.0), share), max(min((middle + half) / scale, 1.0), share)


def two_sided_binomial_p(successes: int, count: int) -> float:
    """P-value of a fair coin: probability of a number of heads at least as far from count / 2; NaN without tosses.

    The test of RLAIF vs. RLHF (arXiv 2309.00267), appendix B, for which position a judge favors.
    """
    if count <= 0:
        return math.nan
    fewer = min(successes, count - successes)
    terms = [math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) for k in range(fewer + 1)]
    # p = 2 sum_{k <= fewer} C(n, k) / 2^n, in logarithms, since C(n, k) overflows for large n
    tail = torch.tensor(terms, dtype=torch.float64).logsumexp(0).item() - count * math.log(2)
    # at fewer = n / 2 both tails hold the middle term, and their sum is over 1
    return min(1.0, 2 * math.exp(tail))


def length_controlled_rate(wins: Tensor, ratios: Tensor) -> tuple[float, float, float]:
    """Rate that is left when both sides are equally long, and its interval of 95 %.

    RLAIF vs. RLHF (arXiv 2309.00267), appendix J: a logistic regression of the verdict on one feature, the ratio of
    lengths, read at ratio 1. For responses that are judged alone the ratio is that to the mean length of a reference.
    Where all ratios are 1, or all verdicts alike, that is the rate itself; where all ratios are one other number, no
    data tell length from quality, and it is NaN. Where the ratio separates wins from losses, the slope is held by a
    weak ridge.

    Args:
        wins: 1 where A is preferred (or the response is harmless), 0 where not, 1/2 for a tie; probabilities will do;
            [pairs].
        ratios: length of A divided by that of B, > 0; [pairs].

    Returns:
        The rate, the lower and the upper bound; bounds are NaN where the ratios do not vary.
    """
    wins, x = wins.double().flatten().cpu(), ratios.double().flatten().cpu() - 1.0
    if not len(wins):
        return math.nan, math.nan, math.nan
    rate = wins.mean().item()
    varies = bool((x != x[0]).any())
    if not varies or rate in (0.0, 1.0):
        # no fit: a constant ratio leaves the slope open, and equal verdicts send the intercept to infinity
        known = rate if varies or x[0] == 0 else math.nan
        return (known, *(wilson_interval(wins.sum().item(), len(wins)) if known == known else (math.nan, math.nan)))
    # far ratios would make the steps ill-conditioned; the intercept, at ratio 1, does not depend on the unit
    x = x / x.abs().max()
    # P(win) = sigma(w_0 + w_1 x), x ~ ratio - 1, so that the rate at equal lengths is sigma(w_0)
    features = torch.stack([torch.ones_like(x), x], 1)
    penalty = torch.tensor([0.0, RIDGE], dtype=torch.float64)
    weights = torch.zeros(2, dtype=torch.float64)

    def loss(at: Tensor) -> float:
        fit = binary_cross_entropy_with_logits(features @ at, wins, reduction="sum")
        return (fit + (penalty * at.square()).sum() / 2).item()

    hessian = torch.eye(2, dtype=torch.float64)
    for _ in range(200):
        p = (features @ weights).sigmoid()
        # Newton step: gradient X^T (p - y) + R w, Hessian X^T diag(p (1 - p)) X + R
        gradient = features.T @ (p - wins) + penalty * weights
        hessian = features.T @ ((p * (1 - p))[:, None] * features) + torch.diag(penalty)
        # where every verdict is sure, curvature vanishes in rounding
        step = torch.linalg.solve(hessian + 1e-12 * torch.eye(2, dtype=torch.float64), gradient)
        scale, before = 1.0, loss(weights)
        # a full step may overshoot where the verdicts are nearly separable; halve it until the loss falls
        while loss(weights - scale * step) > before and scale > 1e-10:
            scale /= 2
        weights = weights - scale * step
        if step.abs().max() * scale < 1e-10:
            break
    # interval: sigma(w_0 +- z se) with se^2 = (H^-1)_00; pinv, as the Hessian may be singular in rounding
    error = torch.linalg.pinv(hessian)[0, 0].clamp_min(0).sqrt()
    bounds = torch.stack([weights[0], weights[0] - Z95 * error, weights[0] + Z95 * error]).sigmoid().tolist()
    return bounds[0], bounds[1], bounds[2]
