"""Comparisons of policies that are made in stages, such as a reward model and the policy that climbs it."""

from __future__ import annotations

import csv
import math
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from lightning_rlhf.commands.fit import RLHFCLI, hush
from lightning_rlhf.evaluation.frontier import read_frontier
from lightning_rlhf.evaluation.report import write_whole
from lightning_rlhf.experiments.base import AbstractExperiment, Job
from lightning_rlhf.experiments.curves import Curve, CurvePoint
from lightning_rlhf.experiments.tabular import slug
from lightning_rlhf.ledger.rollouts import RolloutTable
from lightning_rlhf.ledger.store import PreferenceStore


@dataclass
class FitStage:
    """One run of ``lightning-rlhf fit``.

    Args:
        config: named configs or files, in order.
        args: arguments on top of them; ``{seed}`` stands for the seed, ``{NAME}`` for the run folder of another stage.
        calls: questions to the judge per label that the stage buys, >= 0: 2 where pairs are shown in both orders, 1
            for a score, 0 where a reward model scores.
    """

    config: list[str] = field(default_factory=list)
    args: list[str] = field(default_factory=list)
    calls: float = 0.0


@dataclass
class StagedArm:
    """A policy.

    Args:
        stages: stages that train it one after the other, whose curves are joined; those that they name are run, too.
        until: labels of these stages after which the curve is cut, to compare at a smaller budget; a run at that budget
            would have been the same, since learning rates are constant.
    """

    stages: list[str]
    until: int | None = None


@dataclass
class StagedSetting:
    """Arms that are compared with each other.

    Args:
        arms: the arms by name.
        regime: description of the setting in the report.
    """

    arms: dict[str, StagedArm]
    regime: str = ""


class StagedExperiment(AbstractExperiment):
    """Compares policies that are made in stages; shared stages run once per seed.

    A stage that trains a policy of an arm needs `FrontierPlot`, and `HFExport` where others build on it; with
    `RewardAgreement` its curve says how well the training reward still ranks. All stages of a seed share prompts, their
    order, and the random numbers of evaluation.

    Args:
        stages: runs by name; names are words.
        settings: the comparisons, by name.
        args: arguments of all stages, before their own.
        seeds: runs of each stage, >= 1; seeds count from ``first_seed``.
        first_seed: the first seed.

    Raises:
        ValueError: if a stage is missing, or stages wait for each other.
    """

    unit = "labels of the last stage: pairs, or responses scored"

    def __init__(
        self,
        stages: dict[str, FitStage],
        settings: dict[str, StagedSetting],
        args: list[str] | None = None,
        seeds: int = 10,
        first_seed: int = 0,
    ) -> None:
        if seeds < 1:
            raise ValueError(f"a comparison needs at least one seed; got {seeds}")
        self.stages, self.settings, self.args = stages, settings, args or []
        common = set(references(self.args))
        if common:
            raise ValueError(
                f"arguments of all stages cannot refer to {{{min(common)}}}: a stage would wait for itself; put "
                f"it into the stages that build on it"
            )
        self.seeds, self.first_seed = seeds, first_seed
        for name, setting in settings.items():
            for arm, made in setting.arms.items():
                missing = [stage for stage in made.stages if stage not in stages]
                if missing or not made.stages:
                    raise ValueError(f"arm {arm!r} of {name!r} needs stages, of {sorted(stages)}; got {made.stages}")
        self._needed = self._in_order()

    def jobs(self) -> Sequence[Job]:
        """A job per seed and stage that an arm needs, and one per arm that reads its stages; seed by seed."""
        jobs = []
        for seed in range(self.first_seed, self.first_seed + self.seeds):
            for name in self._needed:
                stage = self.stages[name]
                identity = {"seed": seed, "args": self._args(stage), "behind": self._args_behind([name])}
                jobs.append(Job(stage_cell(name, seed), identity, tuple(stage_cell(n, seed) for n in needs(stage))))
            for name, setting in self.settings.items():
                for arm, made in setting.arms.items():
                    behind = self._behind(made.stages)
                    calls = {stage: self.stages[stage].calls for stage in behind}
                    built = {"calls": calls, "behind": self._args_behind(made.stages)}
                    identity = {"setting": name, "arm": arm, "seed": seed, **vars(made), **built}
                    after = tuple(stage_cell(stage, seed) for stage in behind)
                    jobs.append(Job(f"curves/{slug(name)}/{slug(arm)}/{seed}", identity, after))
        return jobs

    def run(self, job: Job, root: Path) -> list[Curve]:
        """Run ``fit``, which continues an interrupted run; or read the results of the stages of an arm."""
        seed = job.identity["seed"]
        folders = {name: root / stage_cell(name, seed) for name in self._needed}
        if "arm" in job.identity:
            setting, arm = job.identity["setting"], job.identity["arm"]
            return [self._curve(setting, arm, self.settings[setting].arms[arm], seed, folders)]
        hush()
        known = {"seed": str(seed), **{name: str(folder) for name, folder in folders.items()}}
        args = [REFERENCE.sub(lambda found: known[found[1]], argument) for argument in job.identity["args"]]
        seeds = [f"--run_dir={root / job.name}", f"--seed_everything={seed}", f"--data.seed={seed}"]
        start, file = time.perf_counter(), root / job.name / SECONDS
        try:
            RLHFCLI(["fit", *args, *seeds, "--trainer.enable_progress_bar=false"])
        finally:
            # seconds of earlier starts that were interrupted
            before = float(file.read_text(encoding="utf-8")) if file.exists() else 0.0
            write_whole(file, f"{before + time.perf_counter() - start:.1f}\n")
        return []

    def regime(self, setting: str) -> str:
        """Description of the setting."""
        return self.settings[setting].regime or setting

    def _args_behind(self, names: Sequence[str]) -> dict[str, list[str]]:
        """Arguments of stages and of all that they build on: a result is another one where any of them changed."""
        return {name: self._args(self.stages[name]) for name in self._behind(names)}

    def _args(self, stage: FitStage) -> list[str]:
        return [*(f"--config={name}" for name in stage.config), *self.args, *stage.args]

    def _behind(self, names: Sequence[str]) -> list[str]:
        """Stages and all that they build on, in the order of running."""
        order: list[str] = []

        def visit(name: str, above: tuple[str, ...]) -> None:
            if name not in self.stages:
                raise ValueError(
                    f"stage {above[-1]!r} refers to {{{name}}}, which is no stage; {sorted(self.stages)} are"
                )
            if name in above:
                raise ValueError(f"stages wait for each other: {' -> '.join((*above, name))}")
            for other in needs(self.stages[name]):
                visit(other, (*above, name))
            # after all that it builds on, which makes this the order of running
            if name not in order:
                order.append(name)

        for name in names:
            visit(name, ())
        return order

    def _in_order(self) -> list[str]:
        names: list[str] = []
        for setting in self.settings.values():
            for arm in setting.arms.values():
                names += arm.stages
        return self._behind(names)

    def _curve(self, setting: str, arm: str, made: StagedArm, seed: int, folders: Mapping[str, Path]) -> Curve:
        points: list[CurvePoint] = []
        for name in made.stages:
            found = stage_points(folders[name])
            # the later stage begins at the policy where the earlier one ended
            before = points.pop() if points else None
            step, labels = (before.step, before.labels) if before is not None else (0, 0)
            # steps and labels of a later stage count on from the earlier one
            points += [replace(p, step=p.step + step, labels=p.labels + labels) for p in found]
        if made.until is not None:
            points = [point for point in points if point.labels <= made.until]
        behind = self._behind(made.stages)
        bought = {name: labels_bought(folders[name]) for name in behind}
        left = points[-1].labels
        for name in made.stages:
            # the cost is cut where the curve is cut
            bought[name] = min(bought[name], left)
            left -= bought[name]
        return Curve(
            setting,
            arm,
            seed,
            tuple(points),
            passes=None,
            planned_passes=math.nan,
            seconds=sum(float((folders[name] / SECONDS).read_text(encoding="utf-8")) for name in behind),
            calls=sum(bought[name] * self.stages[name].calls for name in behind),
        )


REFERENCE = re.compile(r"\{(\w+)\}")
SECONDS = "seconds.txt"


def stage_cell(name: str, seed: int) -> str:
    """The name of the job of a stage."""
    return f"stages/{slug(name)}/{seed}"


def needs(stage: FitStage) -> list[str]:
    """Names of the stages that a stage refers to."""
    return references(stage.args)


def references(args: Iterable[str]) -> list[str]:
    """Names of stages in braces in arguments, each once; ``{seed}`` is none."""
    found = chain.from_iterable(map(REFERENCE.findall, args))
    return [name for name in dict.fromkeys(found) if name != "seed"]


def stage_points(folder: Path) -> list[CurvePoint]:
    """The evaluations of a run that trained a policy, with the agreement of its reward where that was measured."""
    agreement: dict[int, float] = {}
    if (folder / "agreement.csv").exists():
        with (folder / "agreement.csv").open(newline="", encoding="utf-8") as file:
            agreement = {int(row["step"]): float(row["agreement"]) for row in csv.DictReader(file)}
    return [
        CurvePoint(p.step, p.labels, p.reward, p.kl, p.j, agreement=agreement.get(p.step))
        for p in read_frontier(folder / "frontier.csv")
    ]


def labels_bought(folder: Path) -> int:
    """Labels and scores in the ledger of a run."""
    with PreferenceStore(folder / "ledger.sqlite", read_only=True) as store:
        return store.num_labels + RolloutTable(store).count_scores(before=sys.maxsize)
