"""Intervals and tests of shares, without torch: the annotation server and the metrics use them."""

from __future__ import annotations

import math


Z95 = 1.959963984540054
"""Standard deviations either side of the mean that hold 95 % of a normal distribution."""


def wilson_interval(successes: float, count: float, z: float = Z95) -> tuple[float, float]:
    """Interval of a share by Wilson's score, in [0, 1]; NaN without trials.

    Wilson 1927. Unlike mean +- z standard errors it is never empty, also where all or none succeed. With soft
    successes (ties that count 1/2) it is a little too wide.

    Args:
        successes: number of successes, ties counted 1/2; in [0, count].
        count: number of trials.
        z: half width in standard deviations of a normal distribution; 1.96 gives 95 %.
    """
    if count <= 0:
        return math.nan, math.nan
    share = successes / count
    # (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    # rounding alone must not lift a bound over a share of exactly 0 or 1
    return min(max((middle - half) / scale, 0.0), share), max(min((middle + half) / scale, 1.0), share)


def two_sided_binomial_p(successes: int, count: int) -> float:
    """P-value of a fair coin: probability of a number of heads at least as far from count / 2; NaN without tosses.

    The test of RLAIF vs. RLHF (arXiv 2309.00267), appendix B, for which position a judge favours.
    """
    if count <= 0:
        return math.nan
    fewer = min(successes, count - successes)
    terms = [math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) for k in range(fewer + 1)]
    # p = 2 sum_{k <= fewer} C(n, k) / 2^n, in logarithms, since C(n, k) overflows for large n
    largest = max(terms)
    tail = largest + math.log(math.fsum(math.exp(term - largest) for term in terms)) - count * math.log(2)
    # at fewer = n / 2 both tails hold the middle term, and their sum is over 1
    return min(1.0, 2 * math.exp(tail))
