"""Results of a run for the comparison: its path in labels, reward, KL and J, and its cost."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lightning_rlhf.evaluation.report import write_whole


@dataclass(frozen=True)
class CurvePoint:
    """One evaluation of a run.

    Args:
        step: optimizer steps, or rounds, taken.
        labels: labels bought, those of a shared start left out.
        reward: mean reward of the policy.
        kl: KL to the reference, nats per sequence.
        j: reward - beta * KL.
        cosine: cosine of minus the batch gradients with the exact gradient of J, mean since the last evaluation.
        population_cosine: the same of the expected gradient.
        spread: std of the implicit reward over the policy's responses.
        agreement: share of pairs of the policy's answers that the training reward orders as the held-out reward does.
    """

    step: int
    labels: int
    reward: float
    kl: float
    j: float
    cosine: float | None = None
    population_cosine: float | None = None
    spread: float | None = None
    agreement: float | None = None


@dataclass(frozen=True)
class Curve:
    """A run: one setting, arm and seed.

    Args:
        setting: name of the setting.
        arm: name of the arm.
        seed: its seed.
        points: evaluations, by step; at least one.
        passes: model forward passes per token position and pair, as counted.
        planned_passes: the same by Table 1 of PILAF.
        annotations: responses shown to the annotator per pair.
        seconds: wall-clock time of training, evaluations included; None where many runs share a process.
        calls: questions to the judge, those of reward models and earlier stages included; None if not counted.
        cpu_seconds: CPU time of training, evaluations included; None where it was not measured.
        silver_pairs: pairs that a preference model labeled for the loss; None for runs without one.
    """

    setting: str
    arm: str
    seed: int
    points: tuple[CurvePoint, ...]
    passes: float | None
    planned_passes: float
    annotations: float = 2.0
    seconds: float | None = None
    calls: float | None = None
    cpu_seconds: float | None = None
    silver_pairs: float | None = None

    @property
    def last(self) -> CurvePoint:
        """Where the run ended."""
        return self.points[-1]


POINT_COLUMNS = tuple(field.name for field in fields(CurvePoint))


def write_cell(path: Path, curves: Sequence[Curve], identity: Any) -> None:
    """Write the runs of a finished job, whole or not at all.

    Args:
        path: the file, ``.json``.
        curves: the runs; none for a job that only prepares others.
        identity: settings that decided them, plain data.
    """
    write_whole(path, json.dumps({"identity": identity, "curves": [asdict(curve) for curve in curves]}, indent=1))


def read_cell(path: Path) -> tuple[list[Curve], Any]:
    """Read a file of `write_cell`: the runs and their settings."""
    content = json.loads(path.read_text(encoding="utf-8"))
    curves = [
        Curve(**{**curve, "points": tuple(CurvePoint(**point) for point in curve["points"])})
        for curve in content["curves"]
    ]
    return curves, content["identity"]


def write_curves(curves: Sequence[Curve], path: Path) -> None:
    """Write all points of all runs as CSV, one row each; unknown values stay empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ("setting", "arm", "seed", *POINT_COLUMNS))
        writer.writeheader()
        for curve in curves:
            head = {"setting": curve.setting, "arm": curve.arm, "seed": curve.seed}
            writer.writerows({**head, **asdict(point)} for point in curve.points)
