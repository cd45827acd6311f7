"""Test the label-efficiency metric on curves whose truth is known: ``python -m benchmarks.label_share``.

Simulates comparisons of an arm with a baseline, again and again; counts how often the 95 % interval of `label_share`
holds the true share, and how often the verdict on "40 % fewer labels" is wrong or right. Arms learn either as fast as
the baseline (share 1) or twice as fast (share 1/2). About 10 minutes of one core with the defaults.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_rlhf.experiments.efficiency import Arm, Share, share_of_labels
from lightning_rlhf.experiments.report import rows_table, saving_verdict
from lightning_rlhf.experiments.statistics import Interval


Array = NDArray[np.float64]

SHAPES: dict[str, Callable[[Array], Array]] = {
    "straight": lambda x: x,
    "saturating": lambda x: 1 - np.exp(-3 * x),
    "plateau": lambda x: np.minimum(2 * x, 1.0),
    "falling": lambda x: np.where(x < 0.6, x / 0.6, 1 - 0.75 * (x - 0.6)),
    "flat": lambda x: 0 * x,
}
"""Expected J by share of the baseline's labels."""


class Noise(NamedTuple):
    """Standard deviations of J, where the expected curve gains 1; arms of a seed also share a part, with 1.

    Args:
        evaluation: of each evaluation on its own.
        run: of a whole run, growing along it as a random walk does.
        skewed: whether both are exponential in place of Gaussian.
    """

    evaluation: float = 0.0
    run: float = 0.0
    skewed: bool = False

    def draw(self, generator: np.random.Generator, shape: tuple[int, int]) -> Array:
        """Noise of runs at their evaluations, [seeds, points]; none at the start, which arms share."""

        def unit(shape: tuple[int, ...]) -> Array:
            return generator.exponential(size=shape) - 1 if self.skewed else generator.standard_normal(shape)

        seeds, points = shape
        noise = self.evaluation * unit((seeds, points)) + self.run * np.cumsum(unit((seeds, points)), 1) / points**0.5
        return np.concatenate([np.zeros((seeds, 1)), noise], 1)


NOISES = {
    "evaluations 0.3": Noise(evaluation=0.3),
    "evaluations 0.05": Noise(evaluation=0.05),
    "runs 0.2": Noise(run=0.2),
    "both, skewed": Noise(evaluation=0.1, run=0.2, skewed=True),
}


class Found(NamedTuple):
    """Outcomes of many comparisons, as shares of them.

    Args:
        covered: the interval holds the true share.
        below: the whole interval is below 1.
        above: the whole interval is above 1.
        reproduced: the verdict on 40 % fewer labels.
        median: median of the share; infinite where half of the arms do not get there.
    """

    covered: float
    below: float
    above: float
    reproduced: float
    median: float


def comparison(
    generator: np.random.Generator, shape: str, speed: float, seeds: int, noise: Noise, points: int = 16
) -> tuple[Arm, Arm]:
    """Simulate an arm that learns ``speed`` times as fast as its baseline, and the baseline."""
    x = np.linspace(0.0, 1.0, points + 1)
    ease = generator.standard_normal((seeds, 1))
    runs = [ease + SHAPES[shape](s * x) + noise.draw(generator, (seeds, points)) for s in (speed, 1.0)]
    return Arm(1000 * x, runs[0]), Arm(1000 * x, runs[1])


def simulate(
    shape: str, speed: float, seeds: int, noise: Noise, *, tries: int, gain: float = 1.0, resamples: int = 1000
) -> Found:
    """Compare ``tries`` times, with random numbers that depend on nothing else."""
    generator = np.random.default_rng(12)
    shares: list[Share] = []
    for number in range(tries):
        arm, baseline = comparison(generator, shape, speed, seeds, noise)
        shares.append(share_of_labels(arm, baseline, gain=gain, resamples=resamples, seed=number))
    true = 1 / speed
    verdicts = [saving_verdict(Interval(*share)) for share in shares]
    return Found(
        sum(share.low <= true <= share.high for share in shares) / tries,
        sum(share.high < 1 for share in shares) / tries,
        sum(share.low > 1 for share in shares) / tries,
        verdicts.count("reproduced") / tries,
        float(np.median([math.inf if math.isnan(share.value) else share.value for share in shares])),
    )


def run(argv: Sequence[str] | None = None) -> str:
    """Simulate all shapes and noises and return the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=400, help="comparisons per row")
    parser.add_argument("--seeds", type=int, nargs="+", default=[5, 8, 10, 20], help="seeds per comparison")
    parser.add_argument("--shapes", choices=list(SHAPES), nargs="+", default=list(SHAPES))
    parser.add_argument("--gain", type=float, default=1.0, help="share of the baseline's gain that is the target")
    options = parser.parse_args(argv)
    rows = []
    for shape in options.shapes:
        for speed in (1.0, 2.0):
            # a flat curve has no speed, and a falling arm twice as fast falls below where the baseline ends
            if speed != 1 and shape in ("flat", "falling"):
                continue
            for name, noise in NOISES.items():
                for seeds in options.seeds:
                    found = simulate(shape, speed, seeds, noise, tries=options.tries, gain=options.gain)
                    shown = [f"{100 * value:.1f} %" for value in found[:-1]]
                    rows.append([shape, f"{1 / speed:g}", name, str(seeds), *shown, f"{found.median:.2f}"])
                    print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    head = ["curve", "true share", "noise", "seeds", "interval holds it", "below 1", "above 1", "reproduced", "median"]
    return rows_table(head, rows)


if __name__ == "__main__":
    print(run())
