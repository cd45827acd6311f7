"""From log-probabilities of a judge's labels to verdicts: pure functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


def label_mass(label_logps: Tensor) -> Tensor:
    """Probability that a judge answers with a label at all, [...] of [..., labels] log-probabilities.

    Near zero the labels lie in the tail of the judge's distribution, and their ratio looks as sure as a real answer.
    """
    return label_logps.exp().sum(-1)


def first_probability(label_logps: Tensor) -> Tensor:
    """P(first label) of two, [...]: the softmax over the labels alone; logps [..., 2] in nats, up to a constant.

    RLAIF vs. RLHF (arXiv 2309.00267), section 2.1.
    """
    # exp(l_1) / (exp(l_1) + exp(l_2)) = sigmoid(l_1 - l_2)
    return torch.sigmoid(label_logps[..., 0] - label_logps[..., 1])


def preference(forward: Tensor, reverse: Tensor, prefers: Literal["better", "worse"] = "better") -> Tensor:
    """P(a is better), from a judgment in each order; [...].

    RLAIF vs. RLHF, section 2.1.1: the mean of two distributions, each normalized over the labels before. For any judge
    P(a, b) + P(b, a) = 1, and one that looks at positions only gives exactly 1/2.

    Args:
        forward: log-probabilities of the labels with a shown first, [..., 2].
        reverse: the same with b shown first, [..., 2].
        prefers: ``worse`` if the label names the worse candidate.
    """
    # (P_forward(first) + P_reverse(second)) / 2
    named = (first_probability(forward) + (1 - first_probability(reverse))) / 2
    return named if prefers == "better" else 1 - named


def majority(forward: Tensor, reverse: Tensor, prefers: Literal["better", "worse"] = "better") -> Tensor:
    """Majority vote of sampled judgments, maj@n of Generative Reward Models (arXiv 2410.12832); scalar: 1, 0 or 1/2.

    Each judgment votes for its more probable label. A tie of the votes, or of a judgment, counts half.

    Args:
        forward: log-probabilities of the labels with a shown first, [samples, 2].
        reverse: the same with b shown first, [samples, 2].
        prefers: ``worse`` if the label names the worse candidate.
    """
    # +1 votes for the first label in forward, which names the same candidate as the second label in reverse
    votes = torch.sign(forward[:, 0] - forward[:, 1]).sum() - torch.sign(reverse[:, 0] - reverse[:, 1]).sum()
    named = (torch.sign(votes) + 1) / 2
    return named if prefers == "better" else 1 - named


def expected_value(label_logps: Tensor, values: Sequence[float]) -> Tensor:
    """Mean of the labels' values under the judge, [...].

    RLAIF vs. RLHF, section 2.2.2: s = sum_i i P(i) with P normalized over the labels.

    Args:
        label_logps: log-probabilities of the labels in nats, up to a constant, [..., labels].
        values: value of each label.
    """
    # s = sum_i i P(i)
    return label_logps.softmax(-1) @ torch.as_tensor(values, dtype=label_logps.dtype, device=label_logps.device)


def spread(label_logps: Tensor, values: Sequence[float]) -> Tensor:
    """Standard deviation of the labels' values under the judge, [...]; arguments as for `expected_value`."""
    numbers = torch.as_tensor(values, dtype=label_logps.dtype, device=label_logps.device)
    # sqrt(sum_i P(i) (i - s)^2)
    deviation = (numbers - expected_value(label_logps, values)[..., None]).square()
    return (label_logps.softmax(-1) * deviation).sum(-1).sqrt()


def to_unit_range(value: Tensor, values: Sequence[float]) -> Tensor:
    """Affine map of the range of values to [-1, 1], [...]; of scores 1 to 10 it is (2 s - 11) / 9."""
    low, high = min(values), max(values)
    # low -> -1, high -> 1
    return 2 * (value - low) / (high - low) - 1
