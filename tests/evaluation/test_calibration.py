"""Bins of confidence and the calibration error, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_rlhf.evaluation.calibration import (
    NUM_BINS,
    calibration_bins,
    empty_bins,
    expected_calibration_error,
)


def test_ten_bins_of_equal_width_from_a_half_to_one() -> None:
    assert NUM_BINS == 10 and empty_bins().shape == (10, 3) and float(empty_bins().abs().sum()) == 0
    for place in range(10):
        inside = torch.tensor([0.501 + 0.05 * place, 0.549 + 0.05 * place])
        bins = calibration_bins(inside, torch.ones(2))
        assert bins[:, 0].tolist() == [2.0 if i == place else 0.0 for i in range(10)]
        assert bins[place].tolist() == pytest.approx([2, float(inside.double().sum()), 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_edge_belongs_to_the_bin_above_and_certainty_to_the_last(dtype: torch.dtype) -> None:
    for place in range(10):
        edge = torch.tensor([0.5 + 0.05 * place], dtype=torch.float64).to(dtype)
        # as a first and as a second response
        for probability in (edge, 1 - edge):
            assert int(calibration_bins(probability, torch.ones(1))[:, 0].argmax()) == place
    assert calibration_bins(torch.tensor([1.0, 0.0], dtype=dtype), torch.ones(2))[9].tolist() == [2, 2, 1]


def test_error_is_the_mean_over_pairs_of_the_gap_of_their_bin() -> None:
    # [0.5, 0.55): 0.52 right, 0.54 wrong; [0.8, 0.85): three of 0.8, the second response, one of them right
    probability = torch.tensor([0.52, 0.54, 0.2, 0.2, 0.2], dtype=torch.float64)
    label = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    bins = calibration_bins(probability, label)
    gaps = [abs(0.53 - 1 / 2), abs(0.8 - 1 / 3)]
    assert float(expected_calibration_error(bins)) == pytest.approx((2 * gaps[0] + 3 * gaps[1]) / 5)
    # gaps of one bin cancel before they are taken absolutely, those of two bins do not
    assert float(expected_calibration_error(bins)) < (0.48 + 0.54 + 0.8 + 0.8 + 0.2) / 5
    parts = calibration_bins(probability[:2], label[:2]) + calibration_bins(probability[2:], label[2:])
    torch.testing.assert_close(parts, bins)
    assert math.isnan(float(expected_calibration_error(empty_bins())))


def test_ties_count_half_right() -> None:
    bins = calibration_bins(torch.tensor([0.5, 0.9]), torch.tensor([1.0, 0.5]))
    assert bins[0].tolist() == [1, 0.5, 0.5]
    assert bins[8].tolist() == pytest.approx([1, 0.9, 0.5])
