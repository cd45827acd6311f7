"""Intervals and tests against closed forms and SciPy; length correction against laws it must recover."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import binomtest

from lightning_rlhf.evaluation import length_controlled_rate, two_sided_binomial_p, wilson_interval


@pytest.mark.parametrize(("successes", "count"), [(0, 5), (3, 5), (5, 5), (780, 1000)])
def test_wilson_interval_is_scipys(successes: int, count: int) -> None:
    expected = binomtest(successes, count).proportion_ci(method="wilson")
    assert wilson_interval(successes, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_a_share_lies_in_its_interval_whatever_rounding_does() -> None:
    for count in range(1, 200):
        assert wilson_interval(0, count)[0] == 0.0 and wilson_interval(count, count)[1] == 1.0


def test_wilson_interval_of_the_paper_is_about_a_point_and_a_half() -> None:
    low, high = wilson_interval(0.78 * 3000, 3000)
    assert (high - low) / 2 == pytest.approx(0.0148, abs=2e-4)


@pytest.mark.parametrize(("heads", "tosses"), [(0, 0), (0, 1), (2, 4), (1, 8), (94, 100), (30_000, 61_000)])
def test_binomial_p_is_scipys(heads: int, tosses: int) -> None:
    found = two_sided_binomial_p(heads, tosses)
    if tosses == 0:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(binomtest(heads, tosses).pvalue, rel=1e-6)


@pytest.mark.parametrize(("a", "c"), [(0.4, 1.5), (-1.0, 0.0), (0.0, -3.0)])
def test_length_control_recovers_the_rate_at_equal_lengths(a: float, c: float) -> None:
    generator = torch.Generator().manual_seed(0)
    ratios = 0.4 + 1.6 * torch.rand(40_000, generator=generator, dtype=torch.float64)
    law = torch.sigmoid(a + c * (ratios - 1))
    # the probabilities themselves as targets: no sampling noise, so the fit is the law
    rate, low, high = length_controlled_rate(law, ratios)
    assert rate == pytest.approx(torch.sigmoid(torch.tensor(a)).item(), abs=1e-4)
    assert low < rate < high
    drawn = (torch.rand(40_000, generator=generator, dtype=torch.float64) < law).double()
    rate, low, high = length_controlled_rate(drawn, ratios)
    assert rate == pytest.approx(torch.sigmoid(torch.tensor(a)).item(), abs=0.01)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(rate * (1 - rate) / 40_000), rel=0.3)


def test_interval_of_length_control_covers_the_truth_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(1)
    truth, covered = torch.sigmoid(torch.tensor(0.5)).item(), 0
    for _ in range(200):
        ratios = 0.5 + 1.5 * torch.rand(300, generator=generator, dtype=torch.float64)
        wins = torch.rand(300, generator=generator, dtype=torch.float64) < torch.sigmoid(0.5 + 2 * (ratios - 1))
        _, low, high = length_controlled_rate(wins, ratios)
        covered += low <= truth <= high
    # 95 % of 200 is 190, with a standard deviation of 3
    assert 180 <= covered <= 199


def test_equal_lengths_give_the_raw_rate_and_one_other_ratio_nothing() -> None:
    wins = torch.tensor([1.0, 0.0, 0.5, 1.0])
    rate, low, high = length_controlled_rate(wins, torch.ones(4))
    assert rate == 0.625
    assert (low, high) == wilson_interval(2.5, 4)
    assert math.isnan(length_controlled_rate(wins, torch.full((4,), 1.3))[0])
    assert math.isnan(length_controlled_rate(torch.empty(0), torch.empty(0))[0])


def test_lengths_that_tell_all_verdicts_give_a_number() -> None:
    ratios = torch.tensor([0.5, 0.8, 1.2, 3.0])
    rate, low, high = length_controlled_rate(torch.tensor([0.0, 0.0, 1.0, 1.0]), ratios)
    assert rate == pytest.approx(0.5, abs=0.01)  # half way between 0.8 and 1.2
    assert 0 <= low <= rate <= high <= 1
    # even against one response a thousand times as long
    ratios = torch.tensor([0.5, 0.8, 1.2, 1000.0])
    rate, low, high = length_controlled_rate(torch.tensor([0.0, 0.0, 1.0, 1.0]), ratios)
    assert 0 <= low <= rate <= high <= 1
    assert length_controlled_rate(torch.ones(4), ratios)[0] == 1.0


def test_exchanged_sides_of_a_symmetric_table_give_one_minus_the_rate() -> None:
    wins, ratios = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0]), torch.tensor([1.5, 0.5, 0.9, 1.2, 1.4])
    rate = length_controlled_rate(wins, ratios)[0]
    assert length_controlled_rate(1 - wins, ratios)[0] == pytest.approx(1 - rate, abs=1e-9)
