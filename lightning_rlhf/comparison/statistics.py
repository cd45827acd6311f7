"""Figures of a comparison: means over seeds with their intervals, paired differences, labels needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_rlhf.comparison.curves import Curve


Array = NDArray[np.float64]


class Interval(NamedTuple):
    """A figure with its 95 % interval; bounds are NaN where they are not known."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @property
    def half(self) -> float:
        """Half its width."""
        return (self.high - self.low) / 2


def student_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, by integrating its density over the angle ``atan(t / sqrt(freedom))``.

    Args:
        freedom: degrees of freedom, >= 1.
    """
    angle = np.linspace(0.0, math.pi / 2, 200_001)
    density = np.cos(angle) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp(0.475, mass / mass[-1] / 2, angle)))


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean over seeds with Student's 95 % interval, which a single seed does not give."""
    numbers = np.asarray(values, dtype=np.float64)
    if len(numbers) < 2:
        return Interval(float(numbers.mean()) if len(numbers) else math.nan)
    half = student_quantile(len(numbers) - 1) * float(numbers.std(ddof=1)) / math.sqrt(len(numbers))
    return Interval(float(numbers.mean()), float(numbers.mean()) - half, float(numbers.mean()) + half)


def paired(
    curves: Sequence[Curve], baseline: Sequence[Curve], figure: str, moments: tuple[str, str] = ("end", "end")
) -> Interval:
    """Mean over common seeds of a figure's difference to the baseline's, with its interval.

    Args:
        curves: runs of an arm in one setting.
        baseline: runs of the arm it is compared with.
        figure: ``reward``, ``kl``, ``j`` or ``agreement``.
        moments: ``start`` or ``end``: where the figure of each is taken.
    """

    def at(curve: Curve, moment: str) -> float:
        return float(getattr(curve.points[0] if moment == "start" else curve.last, figure))

    theirs = {curve.seed: at(curve, moments[1]) for curve in baseline}
    return mean_interval([at(curve, moments[0]) - theirs[curve.seed] for curve in curves if curve.seed in theirs])


def mean_cosines(curves: Sequence[Curve], figure: str) -> dict[int, float]:
    """Mean over a run of one of its cosines, by seed; runs that know none are left out."""
    found = {}
    for curve in curves:
        values = [value for point in curve.points if (value := getattr(point, figure)) is not None]
        if values:
            found[curve.seed] = sum(values) / len(values)
    return found


def j_grid(curves: Sequence[Curve]) -> tuple[Array, Array]:
    """Labels of the evaluations, [points], and J at them, [runs, points]; evaluations that all runs have."""
    common = set.intersection(*({point.labels for point in curve.points} for curve in curves))
    labels = sorted(common)
    # the last evaluation at a number of labels: a run may be validated again before it buys more
    by_labels = [{point.labels: point.j for point in curve.points} for curve in curves]
    return np.asarray(labels, dtype=np.float64), np.asarray([[found[n] for n in labels] for found in by_labels])


def labels_to_reach(labels: Array, j: Array, target: float) -> float:
    """Labels at which a curve of J first reaches a target, by straight lines between points; infinite if never.

    Args:
        labels: labels at each point, ascending; shape [points].
        j: J at each point; shape [points].
        target: the J to reach.
    """
    reached = np.flatnonzero(j >= target)
    if not len(reached):
        return math.inf
    first = int(reached[0])
    if first == 0:
        return float(labels[0])
    share = (target - j[first - 1]) / (j[first] - j[first - 1])
    return float(labels[first - 1] + share * (labels[first] - labels[first - 1]))


def label_share(curves: Sequence[Curve], baseline: Sequence[Curve], resamples: int = 1000) -> Interval:
    """Labels with which an arm's mean J reaches the baseline's final mean J, as a share of the baseline's.

    The interval is the bootstrap's, over seeds: both arms are resampled together. A share is infinite where the arm
    never gets there, and NaN where the baseline ends no higher than it began. The baseline may itself be there before
    it ends, if its J falls again; it counts in full.

    Args:
        curves: runs of an arm in one setting.
        baseline: runs of the baseline.
        resamples: bootstrap samples, >= 1.
    """
    theirs = {curve.seed: curve for curve in baseline}
    pairs = [(curve, theirs[curve.seed]) for curve in curves if curve.seed in theirs]
    if not pairs:
        return Interval(math.nan)
    labels, j = j_grid([curve for curve, _ in pairs])
    all_labels, baseline_j = j_grid([curve for _, curve in pairs])
    final, total = baseline_j[:, -1], float(all_labels[-1])
    if final.mean() <= baseline_j[:, 0].mean():
        return Interval(math.nan)

    def share(rows: NDArray[np.int64]) -> float:
        return labels_to_reach(labels, j[rows].mean(0), float(final[rows].mean())) / total

    value = share(np.arange(len(pairs)))
    if len(pairs) < 2:
        return Interval(value)
    generator = np.random.default_rng(0)
    shares = np.sort([share(generator.integers(len(pairs), size=len(pairs))) for _ in range(resamples)])
    # order statistics, since shares may be infinite
    low, high = shares[int(0.025 * resamples)], shares[min(int(0.975 * resamples), resamples - 1)]
    return Interval(value, float(low), float(high))
