"""Comparisons by normal ``fit`` runs, one process each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_rlhf.commands.fit import RLHFCLI, hush
from lightning_rlhf.evaluation.frontier import read_frontier
from lightning_rlhf.experiments.base import AbstractExperiment, Job
from lightning_rlhf.experiments.curves import Curve, CurvePoint
from lightning_rlhf.experiments.tabular import slug


@dataclass
class FitSetting:
    """How the arms are trained.

    Args:
        args: arguments of ``lightning-rlhf fit`` for all arms, e.g. ``--data.rounds.prompts_per_round=256``.
        start: arguments of a run that all arms of a seed start from, e.g. one Vanilla iteration, or one that is
            overfitted to few pairs; default: the arms start from the SFT model. Its labels are not counted.
        labels: labels per run; default: those of the experiment.
        regime: description of the setting in the report.
    """

    args: list[str] = field(default_factory=list)
    start: list[str] | None = None
    labels: int | None = None
    regime: str = ""


@dataclass
class FitArm:
    """An arm with a label budget of its own, e.g. one that should reach the baseline's J with fewer labels.

    Args:
        args: arguments of ``lightning-rlhf fit``.
        labels: labels per run, >= 1; default: those of the setting.
    """

    args: list[str]
    labels: int | None = None

    def __post_init__(self) -> None:
        if self.labels is not None and self.labels < 1:
            raise ValueError(f"labels of an arm must be at least 1; got {self.labels}")


class FitExperiment(AbstractExperiment):
    """Compares by runs of ``lightning-rlhf fit`` that differ in their arguments alone.

    A run ends when its labels are spent, and is evaluated as the config says: it needs `FrontierPlot`, `HFExport` for
    starts, `Summary`, held-out prompts, and ``trainer.max_epochs=-1``. The config ``worlds/menu`` has all that.

    Args:
        arms: arguments of each arm by its name, e.g. ``PILAF: [--data.sampler=PILAFSampler]``, or a `FitArm` where it
            spends another number of labels: ``{args: [--data.sampler=PILAFSampler], labels: 960}``.
        settings: how the arms are trained, by name.
        config: named configs or files that all runs build on, in order.
        args: further arguments of all runs.
        labels: labels per run, the same for all arms that do not set their own, >= 1.
        seeds: runs per arm and setting, >= 1; seeds count from ``first_seed``, and arms of equal seed share prompts,
            their order, and the random numbers of evaluation.
        first_seed: the first seed.
    """

    def __init__(
        self,
        arms: dict[str, list[str] | FitArm],
        settings: dict[str, FitSetting],
        config: list[str],
        labels: int,
        args: list[str] | None = None,
        seeds: int = 10,
        first_seed: int = 0,
    ) -> None:
        if labels < 1 or seeds < 1:
            raise ValueError(f"a comparison needs labels and seeds of at least 1; got {labels} and {seeds}")
        self.arms = {name: arm if isinstance(arm, FitArm) else FitArm(arm) for name, arm in arms.items()}
        self.settings, self.config, self.labels = settings, config, labels
        self.args, self.seeds, self.first_seed = args or [], seeds, first_seed

    def jobs(self) -> Sequence[Job]:
        """The starts, and a job per setting, seed and arm; seed by seed, so that an early end leaves whole seeds."""
        jobs = []
        for seed in range(self.first_seed, self.first_seed + self.seeds):
            for name, setting in self.settings.items():
                start = f"{slug(name)}/start/{seed}"
                if setting.start is not None:
                    jobs.append(
                        Job(start, {"setting": name, "arm": None, "seed": seed, "args": self._start_args(name)})
                    )
                for arm in self.arms:
                    identity = {"setting": name, "arm": arm, "seed": seed, "args": self._arm_args(name, arm)}
                    # arms continue from the start, so that its arguments decide their results, too
                    if setting.start is not None:
                        identity["start"] = self._start_args(name)
                    after = () if setting.start is None else (start,)
                    jobs.append(Job(f"{slug(name)}/{slug(arm)}/{seed}", identity, after))
        return jobs

    def run(self, job: Job, root: Path) -> list[Curve]:
        """Run ``fit``, which continues an interrupted run, and read its results."""
        hush()
        folder, seed = root / job.name, job.identity["seed"]
        start = [f"--model.start={root / name / 'model'}" for name in job.after]
        seeds = [f"--run_dir={folder}", f"--seed_everything={seed}", f"--data.seed={seed}"]
        cli = RLHFCLI(["fit", *job.identity["args"], *start, *seeds, "--trainer.enable_progress_bar=false"])
        if job.identity["arm"] is None:
            return []
        return [fit_curve(folder, job.identity, cli.datamodule.sampler)]

    def regime(self, setting: str) -> str:
        """Description of the setting."""
        return self.settings[setting].regime or setting

    def _common(self) -> list[str]:
        return [*(f"--config={name}" for name in self.config), *self.args]

    def _start_args(self, setting: str) -> list[str]:
        return [*self._common(), *(self.settings[setting].start or [])]

    def _arm_args(self, setting: str, arm: str) -> list[str]:
        own, labels = self.settings[setting], self.arms[arm].labels or self.settings[setting].labels or self.labels
        budget = ["--trainer.callbacks+=LabelBudget", f"--trainer.callbacks.labels={labels}"]
        # the budget comes last: `callbacks.labels` is an argument of the callback that was appended last
        return [*self._common(), *own.args, *self.arms[arm].args, *budget]


def fit_curve(folder: Path, identity: dict[str, Any], sampler: Any) -> Curve:
    """Read the path of a finished run.

    Args:
        folder: its run folder.
        identity: which run it is.
        sampler: its sampler, for the costs as planned.
    """
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    points = [CurvePoint(p.step, p.labels, p.reward, p.kl, p.j) for p in read_frontier(folder / "frontier.csv")]
    return Curve(
        identity["setting"],
        identity["arm"],
        identity["seed"],
        tuple(points),
        passes=summary["passes_per_pair"],
        planned_passes=float(sampler.passes_per_pair),
        annotations=float(sampler.annotations_per_pair),
        seconds=summary["seconds"],
        # runs of earlier versions did not measure it
        cpu_seconds=summary.get("cpu_seconds"),
        # written by runs with a preference model
        silver_pairs=summary.get("silver_pairs"),
    )
