"""How far the labels of a first labeler agree with those of a second one, on the pairs that both judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypedDict

import torch

from lightning_rlhf.annotation.intervals import wilson_interval
from lightning_rlhf.estimators.temperature import fit_temperature
from lightning_rlhf.types import Label


BINS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
"""Edges of the bins of |p - 1/2|."""
LEAST_FITTED = 30
"""Pairs below which no temperature is reported."""


class Share(TypedDict):
    """A share with its interval.

    Attributes:
        share: the share, in [0, 1]; None without pairs.
        interval: its Wilson interval of 95 %; None without pairs.
        count: number of pairs.
    """

    share: float | None
    interval: tuple[float, float] | None
    count: int


class Alignment(TypedDict):
    """How far the first labeler agrees with the second one.

    Attributes:
        audited: on the audited pairs, a random share of those that the first labeler was sure about.
        routed: on the pairs that went to the second labeler for another reason.
        all_pairs: estimate of the share over all pairs, each weighted by one over its propensity; None without pairs.
        by_margin: on audited and routed pairs, by |p - 1/2| of the first labeler, e.g. ``"0.2-0.3"``.
        temperature: temperature at which the first labeler predicts the second one best; None below `LEAST_FITTED`
            pairs.
    """

    audited: Share
    routed: Share
    all_pairs: float | None
    by_margin: dict[str, Share]
    temperature: float | None


@dataclass(frozen=True)
class Judged:
    """A pair that two labelers judged.

    Args:
        first: P(a preferred) by the first labeler, before its temperature.
        second: by the second one.
        propensity: probability with which the pair went to the second one, in (0, 1].
        is_audit: whether it was chosen at random from the sure ones.
    """

    first: float
    second: float
    propensity: float = 1.0
    is_audit: bool = False

    @property
    def agrees(self) -> float:
        """1 where both prefer the same response, 0 where not; a tie of either counts 1/2."""
        sides = (self.first - 0.5) * (self.second - 0.5)
        return 0.5 if sides == 0 else float(sides > 0)


def judged_pairs(overlap: Sequence[tuple[Label, Label]]) -> list[Judged]:
    """Pairs of `PreferenceStore.overlap` for which the first labeler gave a probability, too."""
    return [
        Judged(
            float(first.meta["ai_probability"]),
            second.probability,
            float(first.meta["propensity"]),
            first.meta["routed"] == "audit",
        )
        for first, second in overlap
        if "ai_probability" in first.meta and second.probability is not None
    ]


def alignment(pairs: Sequence[Judged]) -> Alignment:
    """Agreement of the first labeler with the second one, overall and where it was more and less sure."""
    by_margin = {}
    for low, high in pairwise(BINS):
        # the last bin holds its upper edge; rounding must not put 0.4 below its edge
        most = high if high < BINS[-1] else 1.0
        inside = [pair for pair in pairs if low <= abs(pair.first - 0.5) + 1e-9 < most]
        if inside:
            by_margin[f"{low:g}-{high:g}"] = share(inside)
    weights = [1 / pair.propensity for pair in pairs]
    # sum_i agree_i / q_i / sum_i 1 / q_i: Hajek's estimate over the pairs that both could have judged
    weighted = sum(weight * pair.agrees for weight, pair in zip(weights, pairs, strict=True))
    return {
        "audited": share([pair for pair in pairs if pair.is_audit]),
        "routed": share([pair for pair in pairs if not pair.is_audit]),
        "all_pairs": weighted / sum(weights) if pairs else None,
        "by_margin": by_margin,
        "temperature": temperature_of(pairs) if len(pairs) >= LEAST_FITTED else None,
    }


def temperature_of(pairs: Sequence[Judged]) -> float:
    """`fit_temperature` on pairs that two labelers judged, weighted by inverse propensities."""
    columns = [(pair.first, pair.second, 1 / pair.propensity) for pair in pairs]
    first, second, weight = torch.tensor(columns, dtype=torch.float64).view(-1, 3).unbind(1)
    return fit_temperature(first, second, weight)


def share(pairs: Sequence[Judged]) -> Share:
    """Share of the pairs on which both agree."""
    agreed, count = sum(pair.agrees for pair in pairs), len(pairs)
    if not count:
        return {"share": None, "interval": None, "count": 0}
    return {"share": agreed / count, "interval": wilson_interval(agreed, count), "count": count}


def alignment_lines(found: Alignment, people: float | None = None) -> list[str]:
    """The result as lines for a terminal.

    Args:
        found: the result.
        people: lower bound of the share of pairs on which two people agree; None where it is not known.
    """
    lines = []
    for name, words in (("audited", "sure pairs that were audited"), ("routed", "pairs that were not sure")):
        entry = found["audited"] if name == "audited" else found["routed"]
        if entry["interval"] is not None:
            low, high = entry["interval"]
            lines.append(
                f"first labeler agrees with the second on {entry['share']:.1%} [{low:.1%}, {high:.1%}] of "
                f"{entry['count']} {words}"
            )
    audited = found["audited"]["interval"]
    if found["temperature"] is not None:
        lines.append(f"temperature of the first labeler, fitted to the second: {found['temperature']:.2f}")
    if audited is not None and people is not None and audited[1] < people:
        lines.append("the sure pairs agree less than two people do: raise unsure (or share)")
    return lines
