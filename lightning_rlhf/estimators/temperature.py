"""Temperature of the probabilities of one labeler, so that they mean as much as those of another one."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.1, 100.0
"""Bounds of a fitted temperature: few pairs on which all agree would make it 0."""
MOST_FACTOR = 10.0
"""Bound of a fitted factor of reward gaps, and of its inverse."""
SURE = 1e-6
"""Probabilities count as at least so far from 0 and 1, whose logits are infinite."""


def tempered(probability: Tensor, temperature: float) -> Tensor:
    """Probabilities at another temperature, sigmoid(logit(p) / T); 1/2 stays 1/2. Float64, in the shape of the input.

    Args:
        probability: probabilities in [0, 1].
        temperature: T, > 0; above 1 the probabilities become less sure.
    """
    if temperature == 1.0:
        return probability.double()
    return torch.sigmoid(_logits(probability) / temperature)


def fit_temperature(probability: Tensor, target: Tensor, weight: Tensor | None = None) -> float:
    """Temperature at which probabilities predict targets best (Guo et al. 2017, "temperature scaling").

    Minimizes the cross-entropy sum_i w_i H(y_i, sigmoid(z_i / T)), z = logit(p), over T in
    [`LEAST_TEMPERATURE`, `MOST_TEMPERATURE`]. It is convex in 1 / T.

    Args:
        probability: probabilities to be calibrated, in [0, 1], [pairs].
        target: probabilities of the other labeler for the same event, in [0, 1], [pairs].
        weight: weights >= 0, such as inverse propensities, [pairs]; default: 1.

    Returns:
        The temperature; 1 where no pair says anything, because all probabilities are 1/2.

    Raises:
        ValueError: if the shapes differ.
    """
    if probability.shape != target.shape or (weight is not None and weight.shape != target.shape):
        raise ValueError(f"every probability needs a target and a weight; got {probability.shape} and {target.shape}")
    logits, target = _logits(probability), target.double()
    weight = torch.ones_like(logits) if weight is None else weight.double()
    if not (weight * logits.abs()).sum() > 0:
        return 1.0

    def slope(inverse: float) -> float:
        # d/ds sum_i w_i H(y_i, sigmoid(s z_i)) = sum_i w_i z_i (sigmoid(s z_i) - y_i), which grows with s = 1 / T
        return float((weight * logits * (torch.sigmoid(inverse * logits) - target)).sum())

    low, high = 1 / MOST_TEMPERATURE, 1 / LEAST_TEMPERATURE
    if slope(low) >= 0:
        return MOST_TEMPERATURE
    if slope(high) <= 0:
        return LEAST_TEMPERATURE
    # bisection: 60 halvings leave less than rounding does
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 2 / (low + high)


def gap_factor(gap: Tensor, target: Tensor, prior_std: float = 0.7) -> float:
    """Factor s of reward gaps whose probabilities predict labels best, near 1 where labels are few.

    Maximizes ``sum_i (p_i log sigma(s f_i) + (1 - p_i) log sigma(-s f_i)) - (log s)^2 / (2 prior_std^2)`` over s in
    [1 / `MOST_FACTOR`, `MOST_FACTOR`].

    Args:
        gap: predicted reward gaps f, nats; [pairs].
        target: labels p, probabilities that the first response is preferred; [pairs].
        prior_std: standard deviation of log s in its prior, > 0.
    """
    grid = torch.linspace(-math.log(MOST_FACTOR), math.log(MOST_FACTOR), 801, dtype=torch.float64)
    scaled = grid.exp()[:, None] * gap.double()
    # log p(label) = p log sigma(z) + (1 - p) log sigma(-z) = p z - log(1 + e^z)
    value = (target.double() * scaled - F.softplus(scaled)).sum(1) - grid.square() / (2 * prior_std**2)
    return float(grid[value.argmax()].exp())


def _logits(probability: Tensor) -> Tensor:
    return torch.logit(probability.double().clamp(SURE, 1 - SURE))
