"""Claims that a comparison lists itself: one arm is better than another, by some metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from lightning_rlhf.experiments.report import BETTER, Grid, Verdict, judged, signed
from lightning_rlhf.experiments.statistics import Interval, paired


Moment = Literal["start", "end"]


@dataclass
class Claim:
    """One arm is better than another.

    Args:
        text: the claim, for the table.
        setting: where.
        better: the arm that is claimed to be better.
        worse: the arm that it is compared with; the same one to compare two moments of its runs.
        metrics: metrics of the claim: ``reward``, ``kl`` (lower is better), ``j``, ``agreement``; the first one
            can contradict a claim.
        better_at: ``start`` or ``end`` of the better runs.
        worse_at: ``start`` or ``end`` of the worse runs.
    """

    text: str
    setting: str
    better: str
    worse: str
    metrics: list[str] = field(default_factory=lambda: ["reward"])
    better_at: Moment = "end"
    worse_at: Moment = "end"


@dataclass(frozen=True)
class JudgedClaim:
    """A claim and the evidence of the runs.

    Args:
        claim: the claim.
        differences: metric of the better arm minus that of the worse one, by metric, with 95 % intervals over seeds.
        verdict: ``reproduced`` if all differences are as claimed, ``contradicted`` if the first is against the claim,
            ``partly`` if some are as claimed, ``not shown`` else, ``not measured`` with a single seed.
    """

    claim: Claim
    differences: dict[str, Interval]
    verdict: str

    def as_row(self) -> Verdict:
        """The row of the table of verdicts."""
        figures = ", ".join(f"Δ{name} {signed(found)}" for name, found in self.differences.items())
        claim = self.claim
        if claim.better == claim.worse:
            what = f"{claim.better}, {claim.better_at} − {claim.worse_at}"
        else:
            what = f"{claim.better} − {claim.worse}"
        return Verdict(claim.text, claim.setting, self.verdict, f"{what}: {figures}")


def judge_claims(grid: Grid, claims: Sequence[Claim]) -> list[JudgedClaim]:
    """Hold claims against the runs; a claim whose arms are not there is left out.

    Raises:
        ValueError: if there is no such metric.
    """
    found = []
    for claim in claims:
        unknown = [name for name in claim.metrics if name not in BETTER]
        if unknown or not claim.metrics:
            raise ValueError(f"claim {claim.text!r}: metrics are some of {', '.join(BETTER)}; got {claim.metrics}")
        arms = grid.get(claim.setting, {})
        # a comparison that ended early may lack whole arms
        if claim.better not in arms or claim.worse not in arms:
            continue
        differences = {
            name: paired(arms[claim.better], arms[claim.worse], name, (claim.better_at, claim.worse_at))
            for name in claim.metrics
        }
        found.append(JudgedClaim(claim, differences, judged(differences, claim.metrics[0])))
    return found
