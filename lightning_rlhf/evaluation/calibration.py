"""Calibration: the distance of predicted probabilities from frequencies, for pair metrics and judge metrics."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rlhf.losses.preference import reward_accuracy


NUM_BINS = 10


def empty_bins() -> Tensor:
    """Bins that hold nothing; [NUM_BINS, 3], float64."""
    return torch.zeros(NUM_BINS, 3, dtype=torch.float64)


def calibration_bins(probability: Tensor, label: Tensor) -> Tensor:
    """Sort pairs into ten bins of the confidence max(P, 1 - P), a tenth of [0.5, 1] wide; [NUM_BINS, 3], float64.

    Each bin holds the number of its pairs, the sum of their confidences, and how many of their verdicts are right; a
    tie of verdict or label counts 1/2. Bins of several groups of pairs add up.

    Args:
        probability: predicted P(a preferred), [pairs].
        label: true P(a preferred), [pairs].
    """
    probability, label = probability.double(), label.double()
    agrees = reward_accuracy(probability - 0.5, label)
    confidence = torch.maximum(probability, 1 - probability)
    # bin = floor((confidence - 1/2) 2 NUM_BINS); a confidence of 1 belongs to the last one
    # an edge such as 0.6 belongs to the bin above, also where rounding, of float32 too, puts it just below
    place = ((confidence - 0.5) * 2 * NUM_BINS + 1e-5).long().clamp_max(NUM_BINS - 1)
    columns = torch.stack([torch.ones_like(agrees), confidence, agrees], 1)
    return torch.zeros(NUM_BINS, 3, dtype=torch.float64, device=probability.device).index_add(0, place, columns)


def expected_calibration_error(bins: Tensor) -> Tensor:
    """Mean over pairs of |confidence - accuracy| of their bin (Guo et al. 2017); NaN without pairs.

    Args:
        bins: sums from `calibration_bins`, [NUM_BINS, 3].
    """
    # ECE = sum_b n_b |confidence_b - accuracy_b| / n; the bins hold sums, so that n_b cancels
    return (bins[:, 1] - bins[:, 2]).abs().sum() / bins[:, 0].sum()
