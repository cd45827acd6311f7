"""The factor of reward gaps that predicts labels best."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from lightning_rlhf.estimators import gap_factor


def test_the_factor_of_many_labels_is_that_of_their_distribution() -> None:
    """Labels P = sigma(s f) are predicted best by s; the prior is then negligible."""
    gap = torch.linspace(-3, 3, 4001, dtype=torch.float64)
    for factor in (0.3, 1.0, 2.5):
        assert abs(gap_factor(gap, torch.sigmoid(factor * gap)) / factor - 1) < 0.02


def test_the_factor_is_near_one_where_labels_say_little() -> None:
    """Without gaps the prior decides; one label moves the factor, but not to its bound."""
    assert abs(gap_factor(torch.zeros(5), torch.ones(5)) - 1) < 1e-12
    assert 1.0 < gap_factor(torch.ones(1), torch.ones(1)) < 2.0
    assert 0.5 < gap_factor(torch.ones(1), torch.zeros(1)) < 1.0


def test_the_factor_maximizes_the_log_posterior() -> None:
    generator = torch.Generator().manual_seed(0)
    gap = 2 * torch.randn(40, generator=generator, dtype=torch.float64)
    label = (torch.rand(40, generator=generator, dtype=torch.float64) < torch.sigmoid(0.5 * gap)).double()

    def value(factor: float, prior_std: float) -> float:
        logits = factor * gap
        fit = label * F.logsigmoid(logits) + (1 - label) * F.logsigmoid(-logits)
        return float(fit.sum()) - math.log(factor) ** 2 / (2 * prior_std**2)

    for prior_std in (0.2, 0.7):
        best = gap_factor(gap, label, prior_std)
        assert all(value(best, prior_std) > value(best * step, prior_std) for step in (0.98, 1.02))
