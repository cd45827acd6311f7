"""Label efficiency: labels that an arm needs to reach the J of a baseline, as pure functions of curves."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


Array = NDArray[np.float64]

LEVEL = 0.95
"""Level of all intervals."""


class Arm(NamedTuple):
    """Runs of an arm: labels at its evaluations, [points], ascending, and J of each run at them, [runs, points]."""

    labels: Array
    j: Array


class Share(NamedTuple):
    """Labels of an arm over those of the baseline, with the bounds of its 95 % interval."""

    value: float
    low: float = math.nan
    high: float = math.nan


@functools.cache
def student_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, by integrating its density over the angle ``atan(t / sqrt(freedom))``.

    Args:
        freedom: degrees of freedom, >= 1.
    """
    angle = np.linspace(0.0, math.pi / 2, 200_001)
    # with t = sqrt(n) tan(a) the density of t becomes proportional to cos(a)^(n - 1)
    density = np.cos(angle) ** (freedom - 1)
    # trapezoid rule; the width of its steps cancels in mass / mass[-1]
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    # half of the probability lies at t > 0: P(0 < T < t) = 0.95 / 2
    return math.sqrt(freedom) * math.tan(float(np.interp(LEVEL / 2, mass / mass[-1] / 2, angle)))


def isotonic(values: Array) -> Array:
    """Isotonic regression with equal weights: the nondecreasing curve nearest by least squares; shape [..., points].

    The result of pooling adjacent violators, written as ``max over i <= j of min over k >= j of mean(i..k)`` so that
    many curves are fitted at once; O(points^2) per curve.

    Args:
        values: curves; shape [..., points].
    """
    points = values.shape[-1]
    # sums[k] = x_0 + ... + x_(k-1); [..., points + 1]
    sums = np.concatenate([np.zeros((*values.shape[:-1], 1)), np.cumsum(values, axis=-1)], axis=-1)
    fit = np.full(values.shape, -math.inf)
    for first in range(points):
        # mean(first..k) = (sums[k + 1] - sums[first]) / (k + 1 - first), k >= first; [..., points - first]
        means = (sums[..., first + 1 :] - sums[..., first : first + 1]) / np.arange(1, points - first + 1)
        # min over k >= j, as a running minimum from the end
        lowest = np.minimum.accumulate(means[..., ::-1], axis=-1)[..., ::-1]
        fit[..., first:] = np.maximum(fit[..., first:], lowest)
    return fit


def first_reach(labels: Array, curves: Array, target: Array) -> Array:
    """Labels at which curves first reach their targets, by straight lines over labels; infinite if never, [...].

    Args:
        labels: labels at each point, ascending; shape [points].
        curves: nondecreasing curves; shape [..., points].
        target: target of each curve; shape [...].
    """
    # means of the same numbers, summed in another order, differ by rounding
    slack = 1e-9 * np.maximum(np.ptp(curves, axis=-1), np.abs(target - curves[..., 0]))
    reached = curves >= (target - slack)[..., None]
    first = reached.argmax(-1)
    before = np.maximum(first - 1, 0)
    # the curve before and where it reaches the target; both [...]
    low, high = (np.take_along_axis(curves, place[..., None], -1)[..., 0] for place in (before, first))
    with np.errstate(divide="ignore", invalid="ignore"):
        # labels = l_0 + (target - low) / (high - low) (l_1 - l_0); l_1 where high = low
        part = np.where(high > low, np.clip((target - low) / (high - low), 0.0, 1.0), 1.0)
    found = labels[before] + part * (labels[first] - labels[before])
    return np.where(reached.any(-1), found, math.inf)


def seed_weights(seeds: int, resamples: int, generator: np.random.Generator) -> Array:
    """Weights of seeds whose weighted means scatter as the mean does in Student's interval; [resamples, seeds].

    The plain bootstrap samples seeds with replacement. Its means vary by ``sqrt((n - 1) / n)`` too little and lack
    Student's tails: at 5 seeds its 95 % interval of a mean holds about 84 %. Here weights are Gaussian around 1 / n,
    add up to 1, and are divided by ``sqrt(chi^2 / (n - 1))``; the percentile interval of a mean is then Student's.

    Args:
        seeds: runs, n >= 2.
        resamples: number of resamples.
        generator: random numbers.
    """
    noise = generator.standard_normal((resamples, seeds))
    noise -= noise.mean(1, keepdims=True)
    scale = np.sqrt(generator.chisquare(seeds - 1, size=(resamples, 1)) / (seeds - 1))
    # w = 1 / n + (z - mean(z)) / (sqrt(chi^2 / (n - 1)) sqrt(n (n - 1)))
    return 1 / seeds + noise / (scale * math.sqrt(seeds * (seeds - 1)))


def share_of_labels(
    arm: Arm, baseline: Arm, *, gain: float = 1.0, resamples: int = 2000, paired: bool = True, seed: int = 0
) -> Share:
    """Labels at which an arm's mean J reaches a J of the baseline, over those at which the baseline's own does.

    Both arms get the same treatment: the mean over seeds, its isotonic regression over evaluations, and the labels at
    which that first reaches the target, by straight lines over labels. The target is the end of the baseline's own
    isotonic curve, or ``gain`` of the way from its start to there. Identical arms have a median share of 1, however
    noisy they are; comparing the first passage of a noisy curve with the baseline's whole budget had one of 0.74. Of a
    curve that falls again counts with its average until the end.

    The interval is that of `seed_weights`: all of it is recomputed with reweighted seeds, the same weights for arm,
    baseline and target where their seeds are the same. Where a curve levels off, noise decides where its isotonic fit
    starts to be level. The bounds therefore take the baseline's labels as uncertain: the upper one divides by the first
    labels at which its mean touches the target, and the lower one (at ``gain`` 1) is no higher than the first labels at
    which a paired t test does not tell the arm from the end of the baseline, over the baseline's budget.

    ``python -m benchmarks.label_share`` simulates it with 5, 8, 10 and 20 seeds, on curves that rise, level off, fall
    or stay flat, with noise of evaluations, of whole runs, and both skewed, 200 tries each. The interval holds the
    truth in 94 to 100 % of tries: it is nominal on straight curves, and too wide rather than too narrow where curves
    level off, fall or are flat. For identical arms it lies below 1 in 0 to 3 % of tries and above it in 0 to 4 %, where
    2.5 % are promised. At ``gain`` 1/2 it holds the truth in 93 to 100 %, with more power on curves that level off.

    Args:
        arm: the arm.
        baseline: the arm of comparison.
        gain: share of the baseline's gain that is to be reached, in (0, 1].
        resamples: number of weight samples, >= 1.
        paired: whether runs of both arms belong together, in order.
        seed: of the random numbers.

    Returns:
        The share; infinite where the arm does not get there within its budget, and so is the upper bound. An arm that
        is told apart from the target at all its labels has its whole budget, or just more, as lower bound. NaN where
        the baseline gains nothing: bounds of 0 and infinity. Bounds are NaN with a single seed, and where J is not
        finite.
    """
    if not (np.isfinite(arm.j).all() and np.isfinite(baseline.j).all()):
        return Share(math.nan)
    value = float(ratio(arm, baseline, arm.j.mean(0)[None], baseline.j.mean(0)[None], gain)[0][0])
    seeds, others = len(arm.j), len(baseline.j)
    if min(seeds, others) < 2:
        return Share(value)
    generator = np.random.default_rng(seed)
    weights = seed_weights(seeds, resamples, generator)
    other_weights = weights if paired else seed_weights(others, resamples, generator)
    # weights [resamples, seeds] times J [seeds, points]: mean curves [resamples, points]
    shares, upper = ratio(arm, baseline, weights @ arm.j, other_weights @ baseline.j, gain)
    # order statistics, since shares may be infinite; a share that is not known is compatible with anything
    outside = math.floor((1 - LEVEL) / 2 * resamples)
    low = float(np.sort(np.nan_to_num(shares, nan=0.0, posinf=math.inf))[outside])
    high = float(np.sort(np.nan_to_num(upper, nan=math.inf, posinf=math.inf))[resamples - 1 - outside])
    if gain == 1:
        low = min(low, not_told_apart(arm, baseline, paired) / float(baseline.labels[-1]))
    if math.isnan(value):
        return Share(value, 0.0, math.inf)
    # labels beyond the budget are not observed: the need is at least the budget
    beyond = math.nextafter(float(arm.labels[-1]) / float(baseline.labels[-1]), math.inf)
    return Share(value, min(low, value, beyond), max(high, value))


class Reach(NamedTuple):
    """Where the mean curve of an arm reaches the final J of a baseline.

    Args:
        j: the J: the end of the isotonic regression of the baseline's mean.
        arm: labels at which the arm reaches it, infinite if it does not.
        baseline: labels at which the baseline itself does.
    """

    j: float
    arm: float
    baseline: float


def reach_of(arm: Arm, baseline: Arm) -> Reach:
    """The labels whose ratio is `share_of_labels` at ``gain`` 1, for a figure."""
    fit = isotonic(baseline.j.mean(0))
    ours = first_reach(arm.labels, isotonic(arm.j.mean(0)), fit[-1])
    return Reach(float(fit[-1]), float(ours), float(first_reach(baseline.labels, fit, fit[-1])))


def ratio(arm: Arm, baseline: Arm, means: Array, base_means: Array, gain: float) -> tuple[Array, Array]:
    """Labels of an arm over the baseline's for many mean curves, and an upper version of it; two of shape [curves].

    The upper version divides by the labels at which the baseline's mean itself, not its isotonic fit, first reaches the
    target, which are never more. Both are NaN where the baseline's isotonic fit is flat.

    Args:
        arm: the arm, of which labels are used.
        baseline: the baseline, likewise.
        means: mean J of the arm; shape [curves, points].
        base_means: mean J of the baseline; shape [curves, points].
        gain: share of the baseline's gain that is to be reached.
    """
    fit = isotonic(base_means)
    rise = fit[:, -1] - fit[:, 0]
    target = fit[:, 0] + gain * rise
    ours = first_reach(arm.labels, isotonic(means), target)
    theirs = first_reach(baseline.labels, fit, target)
    # a running maximum is nondecreasing, as first_reach needs it, and reaches the target when the mean does
    touched = first_reach(baseline.labels, np.maximum.accumulate(base_means, axis=-1), target)
    # relative to J: a rise within rounding is none
    flat = rise <= 1e-9 * np.abs(base_means).max(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        share, upper = ours / theirs, np.maximum(ours / touched, ours / theirs)
    return np.where(flat, math.nan, share), np.where(flat, math.nan, upper)


def not_told_apart(arm: Arm, baseline: Arm, paired: bool) -> float:
    """The first labels of an arm at which a t test, at 2.5 %, does not show its mean J below the baseline's last.

    Where the arm truly gets there it is one test, whatever happens at other labels. Between evaluations the upper bound
    of the difference is interpolated. Just more than the arm's last labels where it is below at all of them.
    """
    ends = baseline.j[:, -1]
    if paired:
        # std of the differences over sqrt(n), at each evaluation; [points]
        error = (arm.j - ends[:, None]).std(0, ddof=1) / math.sqrt(len(ends))
    else:
        # independent runs: sqrt(var_a / n_a + var_b / n_b); [points]
        error = np.sqrt(arm.j.var(0, ddof=1) / len(arm.j) + ends.var(ddof=1) / len(ends))
    # of two numbers of runs the smaller one: never too sure
    quantile = student_quantile(min(len(arm.j), len(ends)) - 1)
    bound = arm.j.mean(0) - ends.mean() + quantile * error
    # the test no longer shows the arm below where the bound first reaches 0
    touched = np.maximum.accumulate(bound)
    found = float(first_reach(arm.labels, touched, np.zeros(())))
    return found if math.isfinite(found) else math.nextafter(float(arm.labels[-1]), math.inf)
