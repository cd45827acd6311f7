"""How right the silver labels of a finished run were: by fit of the preference model, against the simulated annotator.

    python -m benchmarks.silver_labels runs/stories/ledger.sqlite --oracle sentiment

A row is a fit, with the silver pairs until the next one; with ``data.silver.pool`` above 2 the first response of a pair
is the highest by the model. It has the correlation of the posterior mean with the reward gap of the annotator, the mean
label by the model and by the annotator, and the mean cross-entropy of both in nats: above ln 2 = 0.693 the labels of
the model are worse than 1/2 for every pair. The last column is the ``data.silver.kappa`` at which it is lowest.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count, groupby

import torch
from torch.nn.functional import binary_cross_entropy

from benchmarks.preference_models import gaps
from lightning_rlhf.estimators import gap_factor
from lightning_rlhf.ledger.silver import SilverTable
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.rewards import AbstractReward, LexiconReward
from lightning_rlhf.types import Comparison, Label
from lightning_rlhf.worlds import MenuHarmonyReward, MenuReward, StorySizeReward


ORACLES: dict[str, Callable[[], AbstractReward]] = {
    "sentiment": lambda: LexiconReward(8.0),
    "size": lambda: StorySizeReward(2.0),
    "tastes": lambda: MenuReward(2.0),
    "harmony": lambda: MenuHarmonyReward(2.0),
}
"""The rewards of simulated annotators, with the scales of the configs in ``compare/``."""

EVERY = 2**62
"""An epoch after all others."""


@dataclass(frozen=True)
class Fit:
    """The silver labels of one fit.

    Args:
        labels: real labels that the model was fitted to.
        pairs: silver pairs.
        correlation: correlation of the posterior mean with the reward gap of the annotator.
        silver: mean label by the model.
        annotator: mean label by the annotator, sigma(gap).
        cross_entropy: mean cross-entropy of the model's labels under the annotator's, nats.
        kappa: factor of the posterior mean at which its labels have the lowest cross-entropy.
    """

    labels: int
    pairs: int
    correlation: float
    silver: float
    annotator: float
    cross_entropy: float
    kappa: float


def silver_pairs(store: PreferenceStore) -> list[tuple[Comparison, Label]]:
    """The silver pairs of a ledger, in the order of training."""
    table = SilverTable(store)
    total = table.count(before=EVERY)
    found: list[tuple[Comparison, Label]] = []
    # epochs before the first fit have none
    for epoch in count():
        if len(found) == total:
            break
        found += [(comparison, label) for comparison, label in table.pairs(epoch) if label is not None]
    return found


def fits(pairs: Sequence[tuple[Comparison, Label]], reward: AbstractReward) -> list[Fit]:
    """Compare silver labels with a reward, by fit."""
    results = []
    for labels, group in groupby(pairs, lambda pair: int(pair[1].meta["fitted"])):
        part = list(group)
        gap = gaps([comparison for comparison, _ in part], reward).double()
        mean = torch.tensor([label.meta["mean"] for _, label in part], dtype=torch.float64)
        silver = torch.tensor([label.probability for _, label in part], dtype=torch.float64)
        results.append(
            Fit(
                labels=labels,
                pairs=len(part),
                correlation=float(torch.corrcoef(torch.stack([mean, gap]))[0, 1]),
                silver=float(silver.mean()),
                annotator=float(gap.sigmoid().mean()),
                cross_entropy=float(binary_cross_entropy(silver, gap.sigmoid())),
                kappa=gap_factor(mean, gap.sigmoid(), prior_std=math.inf),
            )
        )
    return results


def main() -> None:
    """Print a row per fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ledger", help="ledger.sqlite of a run with data.silver")
    parser.add_argument("--oracle", choices=list(ORACLES), default="sentiment", help="the annotator of the run")
    options = parser.parse_args()
    with PreferenceStore(options.ledger, read_only=True) as store:
        results = fits(silver_pairs(store), ORACLES[options.oracle]())
    print("labels  pairs  correlation  mean silver label  annotator's  cross-entropy  best kappa")
    for fit in results:
        print(
            f"{fit.labels:6} {fit.pairs:6} {fit.correlation:12.2f} {fit.silver:18.2f} {fit.annotator:12.2f} "
            f"{fit.cross_entropy:14.3f} {fit.kappa:11.2f}"
        )


if __name__ == "__main__":
    main()
