"""Shares of pairs or responses: their intervals, a test against chance, and a correction for length."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from lightning_rlhf.annotation.intervals import Z95, two_sided_binomial_p, wilson_interval


__all__ = ["Z95", "length_controlled_rate", "two_sided_binomial_p", "wilson_interval"]

RIDGE = 1e-4
"""Penalty on the slope of the length correction: too weak to be seen, and enough where lengths tell all verdicts."""


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
