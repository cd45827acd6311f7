"""``lightning-rlhf compare``: a grid of runs in parallel processes, resumable cell by cell, and one report."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

from filelock import FileLock, Timeout

from lightning_rlhf.evaluation.report import to_json, write_whole
from lightning_rlhf.experiments.base import AbstractExperiment, Job
from lightning_rlhf.experiments.claims import Claim, judge_claims
from lightning_rlhf.experiments.curves import Curve, read_cell, write_cell, write_curves
from lightning_rlhf.experiments.plots import (
    misaligned,
    plot_agreement,
    plot_alignment,
    plot_claims,
    plot_efficiency,
    plot_frontiers,
    plot_labels,
)
from lightning_rlhf.experiments.report import figures_of, grid_of, markdown, verdicts
from lightning_rlhf.runtime.executors import ATTEMPTS, ProcessExecutor, isolated, submitted, worker_error


class CompareRun:
    """Compares samplers, or anything else that arguments of ``fit`` can say, over many seeds at equal label budgets.

    Calling the same command again continues: finished cells are read, killed ones go on where they were. Cells may be
    added to a run folder (more seeds, arms or settings), but not changed. Every process has one thread.

    Args:
        experiment: the arms and settings.
        baseline: the arm that others are compared with.
        claimant: the arm for which the claims of PILAF are judged.
        overfitted: settings that start from an overfitted policy.
        claims: claims to be judged in place of those of PILAF.
        run_dir: folder of the cells and of the report: ``report.md``, ``report.json``, ``curves.csv`` and PNGs.
        processes: cells that run at the same time on this machine, >= 1; default: one per core. Or an executor that
            runs them elsewhere, such as `RayExecutor`, or another subclass of `concurrent.futures.Executor`.
        minutes: start no more cells after this time; the report is then about those that are there. No limit when not
            given.
        title: heading of report and figures.
        at_labels: numbers of labels, >= 0, at which J of each arm is compared with J of the baseline at its end, fixed
            before the runs. With them the report is about label efficiency: it has a table of these differences and of
            the labels to reach the baseline's J and half of its gain, and ``efficiency.png``.
    """

    def __init__(
        self,
        experiment: AbstractExperiment,
        baseline: str = "Vanilla",
        claimant: str = "PILAF",
        overfitted: list[str] | None = None,
        claims: list[Claim] | None = None,
        run_dir: str = "runs/compare",
        processes: int | Executor | None = None,
        minutes: float | None = None,
        title: str = "Comparison",
        at_labels: list[int] | None = None,
    ) -> None:
        if any(labels < 0 for labels in at_labels or []):
            raise ValueError(f"at_labels are numbers of labels, not negative; got {at_labels}")
        if isinstance(processes, int) and processes < 1:
            raise ValueError(f"processes must be at least 1; got {processes}")
        self.experiment, self.baseline, self.claimant = experiment, baseline, claimant
        self.overfitted, self.claims, self.at_labels = overfitted or [], claims, at_labels or []
        self.run_dir, self.title, self.minutes = Path(run_dir).absolute(), title, minutes
        self.processes: int | Executor = processes or len(os.sched_getaffinity(0))

    def run(self, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Do the cells that are not done, write the report, and return its numbers.

        Args:
            settings: ignored; each cell keeps the settings that decide it.

        Raises:
            ValueError: if a cell of the run folder was run with other settings.
            RuntimeError: if cells failed; the others are done, and the report is about them.
        """
        del settings
        self.run_dir.mkdir(parents=True, exist_ok=True)
        try:
            # two comparisons in one folder would do the same cells twice, at the same time
            with FileLock(self.run_dir / "compare.lock", timeout=0):
                failed = self._work()
                return self._report(failed)
        except Timeout as error:
            raise RuntimeError(f"another comparison is running in {self.run_dir}; wait for it to end") from error

    # ---- cells -----------------------------------------------------------------------------------------------------

    def _cell(self, job: Job) -> Path:
        return self.run_dir / "cells" / job.name / "cell.json"

    def _done(self, job: Job) -> bool:
        """Whether a job's result is there, by the settings it has now."""
        if not self._cell(job).exists():
            return False
        identity = read_cell(self._cell(job))[1]
        if identity != job.identity:
            changed = [key for key in job.identity if identity.get(key) != job.identity[key]]
            raise ValueError(
                f"{self._cell(job)} was run with other settings ({', '.join(changed)}); use another run_dir, or delete "
                f"that folder"
            )
        return True

    def _work(self) -> list[str]:
        """Run the missing jobs; returns the names of jobs that failed or waited for one that did."""
        jobs = list(self.experiment.jobs())
        done = {job.name for job in jobs if self._done(job)}
        todo = [job for job in jobs if job.name not in done]
        if isinstance(self.processes, int):
            places, executor = self.processes, ProcessExecutor(self.processes)
            run: Callable[..., Future[int]] = executor.submit
        else:
            # a cluster has a queue of its own
            places, run = len(jobs), partial(cast(Callable[..., Future[int]], self.processes.submit), isolated)
        where = f"{places} at a time" if isinstance(self.processes, int) else f"by {type(self.processes).__name__}"
        print(f"{len(jobs)} cells, {len(done)} done; {where} in {self.run_dir}", flush=True)
        try:
            return self._spread(todo, done, places, run)
        finally:
            if isinstance(self.processes, int):
                executor.shutdown(cancel_futures=True)

    def _spread(self, todo: list[Job], done: set[str], places: int, run: Callable[..., Future[int]]) -> list[str]:
        """Run jobs as soon as those that they wait for are done.

        Args:
            todo: the jobs; emptied.
            done: names of jobs that are done; those that are done now are added.
            places: jobs that may wait or run at the same time.
            run: submits a task; its result is an exit status.

        Returns:
            Names of jobs that failed, or waited for one that did.
        """
        total, started = len(todo) + len(done), time.monotonic()
        end = None if self.minutes is None else started + 60 * self.minutes
        running: dict[Future[int], Job] = {}
        lost: Counter[str] = Counter()
        failed: list[str] = []
        while todo or running:
            late = end is not None and time.monotonic() > end
            ready = [] if late else [job for job in todo if set(job.after) <= done]
            for job in ready[: places - len(running)]:
                todo.remove(job)
                self._cell(job).parent.mkdir(parents=True, exist_ok=True)
                running[submitted(run, do, self.experiment, job, self.run_dir / "cells")] = job
            if not running:
                # nothing runs and nothing can start: the jobs left wait for one that failed
                return failed if late else failed + [job.name for job in todo]
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, error = running.pop(future), worker_error(future)
                if error is not None:
                    lost[job.name] += 1
                    print(f"{job.name}: its worker was lost ({error})", flush=True)
                if error is not None and lost[job.name] < ATTEMPTS:
                    # another worker goes on from the ledger and the checkpoints of the cell
                    todo.insert(0, job)
                    continue
                # a cell that only another machine can read is none
                ok = error is None and future.result() == 0 and self._cell(job).exists()
                (done.add if ok else failed.append)(job.name)
                minutes = (time.monotonic() - started) / 60
                print(f"{len(done)}/{total} {job.name}{'' if ok else ' FAILED'}, {minutes:.1f} min", flush=True)
        return failed

    # ---- report ----------------------------------------------------------------------------------------------------

    def _report(self, failed: Sequence[str]) -> dict[str, Any]:
        curves: list[Curve] = []
        for job in self.experiment.jobs():
            if self._done(job):
                curves += read_cell(self._cell(job))[0]
        if not curves:
            raise RuntimeError(f"no cell was finished{failures(self.run_dir, failed)}")
        grid = grid_of(complete(curves))
        figures = figures_of(grid, self.baseline, self.at_labels)
        judged = judge_claims(grid, self.claims or [])
        if self.claims is None:
            claims = verdicts(grid, self.claimant, self.baseline, self.overfitted)
        else:
            claims = [claim.as_row() for claim in judged]
        write_curves(curves, self.run_dir / "curves.csv")
        report = {"title": self.title, "settings": figures, "verdicts": [vars(claim) for claim in claims]}
        write_whole(self.run_dir / "report.json", to_json(jsonable(report)))
        pictures = ["frontiers.png", "labels.png"]
        plot_frontiers(grid, self.run_dir / pictures[0], f"{self.title}: reward against KL")
        plot_labels(grid, self.run_dir / pictures[1], f"{self.title}: J along the runs", self.experiment.unit)
        if self.at_labels:
            pictures.insert(0, "efficiency.png")
            heading = f"{self.title}: labels for the same J"
            plot_efficiency(grid, self.run_dir / pictures[0], heading, self.baseline, self.experiment.unit)
        if judged:
            pictures.insert(0, "claims.png")
            plot_claims(judged, self.run_dir / pictures[0], f"{self.title}: verdicts on the claims")
        if any(curve.last.agreement is not None for curve in curves):
            pictures.append("agreement.png")
            plot_agreement(grid, self.run_dir / pictures[-1], f"{self.title}: does the reward still rank?")
        if any(map(misaligned, chain.from_iterable(arms.values() for arms in grid.values()))):
            pictures.append("alignment.png")
            plot_alignment(grid, self.run_dir / pictures[-1], f"{self.title}: distance of the expected gradient to ∇J")
        text = markdown(figures, claims, self.baseline, self.experiment.regime)
        shown = "\n".join(f"![{name.partition('.')[0]}]({name})" for name in pictures)
        write_whole(self.run_dir / "report.md", f"### {self.title}\n\n{text}\n{shown}\n")
        print(f"the report is in {self.run_dir / 'report.md'}", flush=True)
        if failed:
            raise RuntimeError(f"{len(failed)} cells failed{failures(self.run_dir, failed)}")
        return report


def complete(curves: Sequence[Curve]) -> list[Curve]:
    """Runs of seeds that all arms of a setting have: an interrupted comparison leaves some seeds in part."""
    grid = grid_of(curves)
    kept = []
    for arms in grid.values():
        found = list(chain.from_iterable(arms.values()))
        seeds = {curve.seed for curve in found}
        for curves_of_arm in arms.values():
            seeds &= {curve.seed for curve in curves_of_arm}
        # without a common seed an arm was only just added: keep all runs
        kept += [curve for curve in found if not seeds or curve.seed in seeds]
    return kept


def do(experiment: AbstractExperiment, job: Job, root: Path) -> None:
    """Run a job in its own process; its output goes to ``log.txt`` in its folder."""
    import torch

    torch.set_num_threads(1)
    folder = root / job.name
    folder.mkdir(parents=True, exist_ok=True)
    set_aside(folder / "log.txt")
    with (folder / "log.txt").open("a", buffering=1, encoding="utf-8") as log:
        # descriptors, too: libraries in C and child processes do not write to sys.stdout
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.stdout = sys.stderr = log
        # LightningCLI warns of arguments in sys.argv beside those that it is called with
        sys.argv = ["lightning-rlhf"]
        try:
            write_cell(folder / "cell.json", experiment.run(job, root), job.identity)
        # the command line ends with SystemExit where its arguments are wrong
        except BaseException:
            traceback.print_exc()
            log.flush()
            os._exit(1)


def jsonable(value: Any) -> Any:
    """Intervals as lists; infinite and unknown values become null."""
    if isinstance(value, Mapping):
        return {name: jsonable(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(inner) for inner in value]
    # JSON has neither infinity nor NaN
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return None
    return None if value != value else value


def failures(run_dir: Path, failed: Sequence[str]) -> str:
    """Where to look."""
    return f"; see {run_dir / 'cells' / failed[0] / 'log.txt'}" if failed else ""


LONGEST_LOG = 8 << 20
"""Bytes of a text log after which a start begins a new one."""


def set_aside(log: Path) -> None:
    """Rename a log that has become long, ``log.txt`` to ``log.1.txt``, in place of the one before."""
    if log.is_file() and log.stat().st_size > LONGEST_LOG:
        log.replace(log.with_name(f"{log.stem}.1{log.suffix}"))
