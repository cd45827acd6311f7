"""Label efficiency: isotonic fits against scipy, shares worked out by hand, and intervals on simulated arms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from scipy.optimize import isotonic_regression

from benchmarks.label_share import NOISES, Noise, comparison, run, simulate
from lightning_rlhf.experiments.efficiency import (
    Arm,
    first_reach,
    isotonic,
    not_told_apart,
    reach_of,
    seed_weights,
    share_of_labels,
)


def arm(*runs: list[float], step: float = 10.0) -> Arm:
    """Runs that are evaluated every ``step`` labels."""
    return Arm(step * np.arange(len(runs[0]), dtype=np.float64), np.array(runs, dtype=np.float64))


def test_isotonic_is_scipys_for_many_curves_at_once() -> None:
    values = np.random.default_rng(0).standard_normal((3, 7, 12)).cumsum(-1)
    fit = isotonic(values)
    for place in np.ndindex(3, 7):
        np.testing.assert_allclose(fit[place], isotonic_regression(values[place]).x, atol=1e-12)
    # the last pool holds the fall
    np.testing.assert_allclose(isotonic(np.array([0.0, 2.0, 4.0, 3.0])), [0.0, 2.0, 3.5, 3.5])


def test_first_reach_interpolates_over_labels_and_may_never_come() -> None:
    labels = np.array([0.0, 10.0, 40.0])
    curves = np.array([[0.0, 2.0, 4.0]] * 5)
    found = first_reach(labels, curves, np.array([1.0, 3.0, 4.0, 4.1, 0.0]))
    np.testing.assert_allclose(found, [5.0, 25.0, 40.0, math.inf, 0.0])
    # level stretches: where they begin
    assert first_reach(labels, np.array([0.0, 1.0, 1.0]), np.array(1.0)) == 10.0


def test_shares_without_noise() -> None:
    slow = arm([0.0, 1.0, 2.0, 3.0, 4.0])
    found = share_of_labels(arm([0.0, 2.0, 4.0, 4.5, 5.0]), slow)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, math.nan, math.nan), nan_ok=True)
    several = arm(*[[0.0, 1.0, 2.0 + s, 3.0, 4.0] for s in (0.0, 0.1, -0.1)])
    found = share_of_labels(arm(*[[0.0, 2.0, 4.0, 4.5, 5.0]] * 3), several)
    assert found == pytest.approx((0.5, 0.5, 0.5))
    assert share_of_labels(slow, slow).value == 1.0
    # the other way round: not within the budget, of which more than all is needed
    found = share_of_labels(several, arm(*[[0.0, 2.0, 4.0, 4.5, 5.0]] * 3))
    assert found.value == found.high == math.inf and found.low > 1
    # half of the gain: 2 of 4, at 10 and at 20 labels
    assert share_of_labels(arm([0.0, 2.0, 4.0, 4.5, 5.0]), slow, gain=0.5).value == pytest.approx(0.5)


def test_both_arms_are_treated_alike() -> None:
    """A baseline that levels off, or falls again, got there before its budget was spent: so does an equal arm."""
    level, falling = [0.0, 2.0, 4.0, 4.0, 4.0], [0.0, 2.0, 4.0, 3.0, 2.0]
    for curve in (level, falling):
        assert share_of_labels(arm(curve), arm(curve)).value == 1.0
    # an arm that goes on where the baseline levels off needed as many labels to get there
    assert share_of_labels(arm([0.0, 2.0, 4.0, 5.0, 6.0]), arm(level)).value == pytest.approx(1.0)
    # exchanging the arms inverts the share
    fast = arm([0.0, 4.0, 4.0, 4.0, 4.0])
    assert share_of_labels(fast, arm(level)).value == pytest.approx(0.5)
    assert share_of_labels(arm(level), fast).value == pytest.approx(2.0)


def test_a_shorter_arm_is_not_said_to_need_more_than_it_was_seen_to() -> None:
    generator = np.random.default_rng(0)
    long = arm(*(np.arange(9) + 0.1 * generator.standard_normal((6, 9))).tolist())
    short = Arm(long.labels[:5], long.j[:, :5] + 0.1 * generator.standard_normal((6, 5)))
    found = share_of_labels(short, long)
    assert found.value == math.inf and found.high == math.inf
    assert found.low == pytest.approx(0.5)


def test_the_labels_of_the_figure_are_those_of_the_share() -> None:
    generator = np.random.default_rng(1)
    slow = arm(*(np.arange(9) + 0.3 * generator.standard_normal((5, 9))).tolist())
    # evaluated on a grid of its own, with half of the budget
    fast = Arm(np.linspace(0.0, 40.0, 11), 2.5 * np.linspace(0.0, 4.0, 11) + 0.3 * generator.standard_normal((5, 11)))
    found = reach_of(fast, slow)
    assert found.arm / found.baseline == pytest.approx(share_of_labels(fast, slow).value)
    assert found.j == pytest.approx(isotonic(slow.j.mean(0))[-1])
    assert reach_of(slow._replace(j=slow.j - 5), slow).arm == math.inf


def test_grids_need_not_agree() -> None:
    fine = Arm(np.linspace(0.0, 40.0, 9), np.array([np.linspace(0.0, 8.0, 9)] * 2))
    assert share_of_labels(fine, arm(*[[0.0, 1.0, 2.0, 3.0, 4.0]] * 2)) == pytest.approx((0.5, 0.5, 0.5))


def test_a_baseline_that_gains_nothing_tells_nothing() -> None:
    rising = arm([0.0, 1.0, 2.0], [0.0, 1.0, 2.5])
    found = share_of_labels(rising, arm([2.0, 1.0, 0.0], [2.0, 1.0, 0.5]))
    assert math.isnan(found.value) and (found.low, found.high) == (0.0, math.inf)
    assert math.isnan(share_of_labels(rising, arm([0.0, math.nan, 1.0], [0.0, 1.0, 2.0])).low)


@pytest.mark.parametrize("seeds", [2, 5, 20])
def test_reweighted_means_scatter_as_in_students_interval(seeds: int) -> None:
    values = np.random.default_rng(1).exponential(size=seeds)
    means = seed_weights(seeds, 200_000, np.random.default_rng(2)) @ values
    expected = scipy.stats.t.interval(0.95, seeds - 1, values.mean(), scipy.stats.sem(values))
    found = np.quantile(means, [0.025, 0.975])
    np.testing.assert_allclose(found - values.mean(), expected - values.mean(), rtol=0.03)


def test_the_interval_is_the_one_of_the_ends_where_curves_are_straight() -> None:
    """With straight runs the share is a ratio of slopes, and its interval Fieller's."""
    generator = np.random.default_rng(3)
    x = np.linspace(0.0, 1.0, 41)
    slopes, base = 2 + 0.2 * generator.standard_normal(8), 1 + 0.1 * generator.standard_normal(8)
    found = share_of_labels(Arm(100 * x, np.outer(slopes, x)), Arm(100 * x, np.outer(base, x)), resamples=20_000)
    quantile = scipy.stats.t.ppf(0.975, 7)

    def excess(share: float) -> float:
        difference = share * slopes - base
        return float(difference.mean() / (difference.std(ddof=1) / math.sqrt(8)))

    assert found.value == pytest.approx(base.mean() / slopes.mean())
    assert excess(found.low) == pytest.approx(-quantile, rel=0.05)
    assert excess(found.high) == pytest.approx(quantile, rel=0.05)


def test_what_seeds_share_cancels_where_runs_are_paired() -> None:
    generator = np.random.default_rng(4)
    x, ease = np.linspace(0.0, 1.0, 17), 3 * generator.standard_normal((8, 1))
    fast, slow = (Arm(x, ease + s * x + 0.02 * generator.standard_normal((8, 17))) for s in (2.0, 1.0))
    together, apart = (share_of_labels(fast, slow, paired=paired) for paired in (True, False))
    assert together.low > 0.4 and together.high < 0.6
    assert apart.low < 0.1 and apart.high == math.inf
    # runs that belong to other seeds are resampled on their own: a constant baseline adds nothing to the arm's scatter
    assert share_of_labels(fast, slow, resamples=50) == share_of_labels(fast, slow, resamples=50)


def test_arms_are_not_told_apart_from_where_the_t_test_says_so() -> None:
    ends = arm([0.0, 2.0], [0.0, 2.0], [0.0, 2.0])
    ours = arm([0.0, 0.9, 3.0], [0.0, 1.0, 3.0], [0.0, 1.1, 3.0])
    # the upper bound of the difference to 2 is negative at 10 labels, 1 at 20
    bound = 1.0 - 2.0 + scipy.stats.t.ppf(0.975, 2) * 0.1 / math.sqrt(3)
    expected = 10 - 10 * bound / (1.0 - bound)
    assert not_told_apart(ours, ends, paired=True) == pytest.approx(expected, rel=1e-3)
    # as runs of their own the baseline's ends add their scatter
    noisy = ends._replace(j=np.array([[0.0, 1.9], [0.0, 2.0], [0.0, 2.1]]))
    bound = 1.0 - 2.0 + scipy.stats.t.ppf(0.975, 2) * math.sqrt(2 * 0.1**2 / 3)
    end_bound = 1.0 + scipy.stats.t.ppf(0.975, 2) * 0.1 / math.sqrt(3)
    expected = 10 - 10 * bound / (end_bound - bound)
    assert not_told_apart(ours, noisy, paired=False) == pytest.approx(expected, rel=1e-3)
    two = ends._replace(j=ends.j[:2])
    assert not_told_apart(arm([2.0, 2.0], [2.0, 2.0]), two, paired=True) == 0.0
    assert not_told_apart(arm([0.0, 1.0], [0.0, 1.1]), two, paired=True) > 10.0


@pytest.mark.parametrize("seeds", [5, 10])
@pytest.mark.parametrize("shape", ["straight", "saturating", "flat"])
def test_equal_arms_are_seldom_told_apart(shape: str, seeds: int) -> None:
    """Coverage and false positives under the null; `python -m benchmarks.label_share` does the same at length."""
    for noise in (Noise(evaluation=0.3), Noise(run=0.2)):
        found = simulate(shape, 1.0, seeds, noise, tries=150, resamples=300)
        # 150 tries: three standard errors of 2.5 % are 3.8 %
        assert found.covered >= 0.92
        assert found.below <= 0.06 and found.above <= 0.06 and found.reproduced <= 0.04
        # one of many thousand tries ends below as often as above
        assert shape == "flat" or found.median > 0.97


def test_an_arm_of_twice_the_speed_is_found() -> None:
    for noise in (Noise(evaluation=0.1), Noise(run=0.2), NOISES["both, skewed"]):
        found = simulate("straight", 2.0, 8, noise, tries=100, resamples=400)
        assert found.covered >= 0.9
        assert found.below >= 0.9 and found.reproduced >= 0.8
        assert 0.45 < found.median < 0.57


def test_the_first_passage_over_the_budget_was_biased() -> None:
    """What was reported before: the share of equal arms was far from 1, and the interval left 1 out."""
    generator = np.random.default_rng(5)
    shares = []
    for _ in range(200):
        ours, base = comparison(generator, "saturating", 1.0, 8, Noise(evaluation=0.3))
        target = base.j[:, -1].mean(keepdims=True)
        mean = np.maximum.accumulate(ours.j.mean(0))
        shares.append(float(first_reach(ours.labels, mean[None], target)[0]) / base.labels[-1])
    assert np.median(shares) < 0.85


def test_the_command_prints_a_table() -> None:
    table = run(["--tries=2", "--seeds", "3", "--shapes", "flat"])
    assert table.count("\n") == 1 + len(NOISES)
    assert "| flat | 1 | runs 0.2 | 3 | 100.0 %" in table
