"""The reward-KL frontier of a run: reward of the policy against its KL to the reference."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class FrontierPoint:
    """One validation of a run.

    Args:
        step: optimizer steps taken, from 0.
        labels: labels bought so far.
        reward: mean reward of held-out answers.
        reward_stderr: its standard error; None if unknown.
        kl: KL(policy || reference), nats per sequence.
        kl_stderr: its standard error; None if unknown.
        j: the objective, reward - beta * KL.
    """

    step: int
    labels: int
    reward: float
    reward_stderr: float | None
    kl: float
    kl_stderr: float | None
    j: float


COLUMNS = tuple(field.name for field in fields(FrontierPoint))


def write_frontier(points: Sequence[FrontierPoint], path: Path) -> None:
    """Write a frontier as CSV, one row per point, columns named as in `FrontierPoint`; unknown values stay empty."""
    # newline="": the csv module writes its own line ends, which text mode would double on Windows
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(asdict(point) for point in points)


def read_frontier(path: Path) -> list[FrontierPoint]:
    """Read a file of `write_frontier`.

    Raises:
        ValueError: if columns are missing, or a value is not a number; the message names file and row.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}: expected the columns {', '.join(COLUMNS)}; missing: {', '.join(missing)}")
        points = []
        for number, row in enumerate(reader, start=1):
            try:
                points.append(
                    FrontierPoint(
                        step=int(row["step"]),
                        labels=int(row["labels"]),
                        reward=float(row["reward"]),
                        reward_stderr=float(row["reward_stderr"]) if row["reward_stderr"] else None,
                        kl=float(row["kl"]),
                        kl_stderr=float(row["kl_stderr"]) if row["kl_stderr"] else None,
                        j=float(row["j"]),
                    )
                )
            # TypeError: a row that is too short reads as None in its last columns
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path} row {number}: expected numbers in every column; got {row}") from error
        return points
