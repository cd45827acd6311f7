"""Plug-ins whose workers die: a grid of cells, and a labeler; readers of run folders. Workers import this file."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from lightning_rlhf.experiments import AbstractExperiment, Curve, CurvePoint, Job
from lightning_rlhf.labelers import AbstractLabeler
from lightning_rlhf.prompts import DatasetPrompts
from lightning_rlhf.randomness import Key
from lightning_rlhf.types import Comparison, Label


class Grid(AbstractExperiment):
    """Two arms and three seeds with random curves.

    Args:
        folder: where deaths and workers are noted.
        deaths: times that the worker of a cell dies, by the name of the cell.
    """

    def __init__(self, folder: str, deaths: dict[str, int] | None = None) -> None:
        self.folder, self.deaths = folder, deaths or {}

    def jobs(self) -> Sequence[Job]:
        return [Job(f"{arm}/{seed}", {"arm": arm, "seed": seed}) for arm in ("Vanilla", "PILAF") for seed in range(3)]

    def run(self, job: Job, root: Path) -> list[Curve]:
        name = job.name.replace("/", "_")
        died = len(list(Path(self.folder).glob(f"{name}.*")))
        worker = multiprocessing.parent_process()
        if died < self.deaths.get(job.name, 0):
            Path(self.folder, f"{name}.{died}").touch()
            assert worker is not None and worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)
            time.sleep(60)
            raise AssertionError("the cell outlived its worker")
        # ids of the raylet: one for each node
        Path(self.folder, f"on_{os.environ.get('RAY_RAYLET_PID', 'here')}").touch()
        values = Key((job.identity["seed"], len(job.identity["arm"]))).uniforms(9).view(3, 3).tolist()
        points = [CurvePoint(step, 8 * step, *values[step]) for step in range(3)]
        return [Curve("online", job.identity["arm"], job.identity["seed"], tuple(points), 2.0, 2.0)]


class Coin(AbstractLabeler):
    """Random probabilities.

    Args:
        folder: where deaths are noted.
        deadly: number of a prompt with which the process dies, once.
        always: let it die with that prompt every time.
    """

    def __init__(self, folder: str, deadly: int = -1, always: bool = False) -> None:
        self.folder, self.deadly, self.always = folder, deadly, always

    def label(self, comparisons: Sequence[Comparison], key: Key) -> list[Label]:
        died = Path(self.folder, "labeler_died")
        if self.deadly in {c.prompt.index for c in comparisons} and (self.always or not died.exists()):
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        # as a judge that takes longer for some chunks: they end in another order
        time.sleep(0.2 if comparisons[0].prompt.index % 8 == 0 else 0.0)
        return [Label(float(key.fold(c.prompt.index).uniforms(1)), cost=0.1) for c in comparisons]


def curves(folder: Path) -> bytes:
    """The curves of a comparison."""
    return (folder / "curves.csv").read_bytes()


def pairs(folder: Path, count: int = 40) -> DatasetPrompts:
    """Pairs to label."""
    rows = [{"prompt": f"Say {i}: ", "chosen": f"{i} é", "rejected": "no"} for i in range(count)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DatasetPrompts(str(folder / "rows.jsonl"))


def attempts(folder: Path) -> list[tuple[object, ...]]:
    """Attempts in the ledger of a folder, in their order, without their time."""
    with closing(sqlite3.connect(folder / "ledger.sqlite")) as db:
        columns = "a.id, c.position, a.status, a.probability, a.cost, a.meta"
        return db.execute(
            f"SELECT {columns} FROM attempts a JOIN comparisons c ON c.id = a.comparison ORDER BY a.id"
        ).fetchall()
