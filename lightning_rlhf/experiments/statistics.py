"""Statistics of a comparison: means over seeds with their intervals, paired differences, labels needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_rlhf.experiments.curves import Curve
from lightning_rlhf.experiments.efficiency import Arm, share_of_labels, student_quantile


Array = NDArray[np.float64]


class Interval(NamedTuple):
    """A number with its 95 % interval; bounds are NaN where they are not known."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @property
    def half(self) -> float:
        """Half its width."""
        return (self.high - self.low) / 2


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean over seeds with Student's 95 % interval, which a single seed does not give."""
    numbers = np.asarray(values, dtype=np.float64)
    if len(numbers) < 2:
        return Interval(float(numbers.mean()) if len(numbers) else math.nan)
    # mean +- t_(0.975, n - 1) s / sqrt(n)
    half = student_quantile(len(numbers) - 1) * float(numbers.std(ddof=1)) / math.sqrt(len(numbers))
    return Interval(float(numbers.mean()), float(numbers.mean()) - half, float(numbers.mean()) + half)


def paired(
    curves: Sequence[Curve], baseline: Sequence[Curve], figure: str, moments: tuple[str, str] = ("end", "end")
) -> Interval:
    """Mean over common seeds of the difference of a metric to the baseline's, with its interval.

    Args:
        curves: runs of an arm in one setting.
        baseline: runs of the arm it is compared with.
        figure: ``reward``, ``kl``, ``j`` or ``agreement``.
        moments: ``start`` or ``end``: where the metric of each is taken.
    """

    def at(curve: Curve, moment: str) -> float:
        value = getattr(curve.points[0] if moment == "start" else curve.last, figure)
        # metrics that were not measured give no difference and no verdict
        return math.nan if value is None else float(value)

    theirs = {curve.seed: at(curve, moments[1]) for curve in baseline}
    return mean_interval([at(curve, moments[0]) - theirs[curve.seed] for curve in curves if curve.seed in theirs])


def j_at(curves: Sequence[Curve], labels: int) -> list[float]:
    """J of the runs of an arm at a number of labels, as `common_grid` has it; NaN outside of it.

    Args:
        curves: runs of an arm in one setting.
        labels: the number of labels.
    """
    grid, j = common_grid(curves)
    if not grid[0] <= labels <= grid[-1]:
        return [math.nan] * len(curves)
    return [float(np.interp(labels, grid, run)) for run in j]


def paired_at(curves: Sequence[Curve], baseline: Sequence[Curve], labels: int) -> Interval:
    """Mean over common seeds of J at a number of labels less the baseline's J at its end, with Student's interval.

    The number of labels is fixed before the runs: unlike a share of labels, the difference is a paired t test.

    Args:
        curves: runs of an arm in one setting.
        baseline: runs of the arm it is compared with, which may be the same.
        labels: labels of the arm.

    Returns:
        The difference; NaN where the arm was not evaluated at so few or so many labels.
    """
    ends = {curve.seed: curve.last.j for curve in baseline}
    ours = zip(curves, j_at(curves, labels), strict=True)
    return mean_interval([j - ends[curve.seed] for curve, j in ours if curve.seed in ends])


def mean_cosines(curves: Sequence[Curve], figure: str) -> dict[int, float]:
    """Mean over a run of one of its cosines, by seed; runs that know none are left out."""
    found = {}
    for curve in curves:
        values = [value for point in curve.points if (value := getattr(point, figure)) is not None]
        if values:
            found[curve.seed] = sum(values) / len(values)
    return found


def _by_labels(curve: Curve, figure: str = "j") -> dict[int, float]:
    """A metric of a run by the labels that it had bought, in their order."""
    # the last evaluation at a number of labels: a run may be validated again before it buys more
    found = {point.labels: float(getattr(point, figure)) for point in curve.points}
    return dict(sorted(found.items()))


def common_grid(curves: Sequence[Curve], figure: str = "j") -> tuple[Array, Array]:
    """Labels of evaluations of the runs of an arm, [points], and a metric of each run at them, [runs, points].

    Runs that were evaluated at other labels (free ties buy none) are interpolated linearly, from the last first
    evaluation on. A run that ended before the others keeps its last value: it collapsed to equal responses, and had
    nothing left to label.

    Args:
        curves: runs of an arm in one setting, with equal budgets.
        figure: ``reward``, ``kl``, ``j`` or ``agreement``.
    """
    runs = [_by_labels(curve, figure) for curve in curves]
    # before its own first evaluation np.interp would repeat it
    start = max(min(run) for run in runs)
    labels = np.asarray(sorted({n for run in runs for n in run if n >= start}), dtype=np.float64)
    return labels, np.asarray([np.interp(labels, list(run), list(run.values())) for run in runs])


def label_share(
    curves: Sequence[Curve], baseline: Sequence[Curve], resamples: int = 2000, gain: float = 1.0
) -> Interval:
    """Labels with which an arm reaches a J of the baseline, as a share of the baseline's; see `share_of_labels`.

    Runs of the same seed are compared as pairs. Arms that share fewer than two seeds are resampled each on its own.

    Args:
        curves: runs of an arm in one setting.
        baseline: runs of the baseline.
        resamples: resamples of the seeds, >= 1.
        gain: the J to reach: share of the way from the baseline's first J to its last, in (0, 1].

    Returns:
        The share, infinite where the arm does not get there within its budget, and its 95 % interval. A single seed
        gives no interval. Where the baseline gains nothing, the share is NaN, and the interval says nothing.

    Raises:
        ValueError: if ``resamples`` or ``gain`` is out of range.
    """
    if resamples < 1 or not 0 < gain <= 1:
        raise ValueError(f"label_share expects resamples >= 1 and gain in (0, 1]; got {resamples} and {gain}")
    ours, theirs = {curve.seed: curve for curve in curves}, {curve.seed: curve for curve in baseline}
    common = [seed for seed in ours if seed in theirs]
    paired_seeds = len(common) > 1 or (len(common) == 1 and min(len(ours), len(theirs)) == 1)
    if paired_seeds:
        ours, theirs = {seed: ours[seed] for seed in common}, {seed: theirs[seed] for seed in common}
    if not ours or not theirs:
        return Interval(math.nan)
    arm, other = (Arm(*common_grid(list(found.values()))) for found in (ours, theirs))
    return Interval(*share_of_labels(arm, other, gain=gain, resamples=resamples, paired=paired_seeds))
