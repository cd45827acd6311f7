"""Pair metrics against a table worked out by hand, and in pieces."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_rlhf.evaluation.pairs import PairMetrics


SCORES = torch.tensor([[2.0, 0.0], [0.0, 0.4], [1.0, 1.0], [0.0, 3.0]])
LABELS = torch.tensor([1.0, 1.0, 1.0, 0.0])
LENGTHS = torch.tensor([[5, 3], [2, 4], [3, 3], [9, 1]])


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_figures_of_four_pairs_by_hand() -> None:
    metrics = PairMetrics()
    metrics.update(SCORES, LABELS, LENGTHS)
    found = {name: value.item() for name, value in metrics.compute().items()}
    # right, wrong, tie, right
    assert found["accuracy"] == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    # longer is better in the first pair only; the third is a tie
    assert found["longer_accuracy"] == pytest.approx((1 + 0 + 0.5 + 0) / 4)
    probabilities = [sigma(2), sigma(-0.4), 0.5, sigma(-3)]
    wrong = [p - y for p, y in zip(probabilities, LABELS.tolist(), strict=True)]
    assert found["brier"] == pytest.approx(sum(e**2 for e in wrong) / 4)
    nll = -(math.log(sigma(2)) + math.log(sigma(-0.4)) + math.log(0.5) + math.log(sigma(3))) / 4
    assert found["nll"] == pytest.approx(nll)
    # bins of confidence: [0.5, 0.55) holds the tie, [0.55, 0.6) the wrong pair, sigma(2) and sigma(3) one each
    ece = abs(0.5 - 0.5) + abs(sigma(0.4) - 0) + abs(sigma(2) - 1) + abs(sigma(3) - 1)
    assert found["ece"] == pytest.approx(ece / 4)
    assert found["accuracy_margin/0-0.5"] == pytest.approx((0 + 0.5) / 2)
    assert math.isnan(found["accuracy_margin/0.5-1"])
    assert found["accuracy_margin/2-inf"] == pytest.approx(1.0)
    # ratios 5/3, 2, 1, 9: right, wrong, tie, right
    assert found["accuracy_length_ratio/1-1.25"] == pytest.approx(0.5)
    assert found["accuracy_length_ratio/1.25-2"] == pytest.approx(1.0)
    assert found["accuracy_length_ratio/2-inf"] == pytest.approx((0 + 1) / 2)
    assert found["accuracy_better_longer"] == pytest.approx(1.0)
    assert found["accuracy_better_shorter"] == pytest.approx((0 + 1) / 2)
    assert found["pairs"] == 4


def test_pieces_and_exchanged_pairs_give_the_same() -> None:
    whole, parts, turned = PairMetrics(), PairMetrics(), PairMetrics()
    whole.update(SCORES, LABELS, LENGTHS)
    for i in range(4):
        parts.update(SCORES[i : i + 1], LABELS[i : i + 1], LENGTHS[i : i + 1])
    turned.update(SCORES.flip(1), 1 - LABELS, LENGTHS.flip(1))
    for name, value in whole.compute().items():
        for other in (parts, turned):
            torch.testing.assert_close(other.compute()[name], value, equal_nan=True)
