"""``lightning-rlhf run``: several runs in a row, each fed by those before it, and one table at the end."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import yaml

from lightning_rlhf.evaluation.report import write_whole
from lightning_rlhf.runtime.preemption import run_child


if TYPE_CHECKING:
    from lightning_rlhf.commands.evaluate import EvaluationReport


STAGE_COMMANDS = ("fit", "label", "sample", "export", "evaluate")
STAGE_FIELDS = {"name", "command", "verb", "config", "options"}
"""``verb`` is ``command`` in files of version 0.1."""
PIPELINE_FIELDS = {"run_dir", "variables", "stages", "report"}
REPORT_FIELDS = {"policies", "baseline", "beta", "options"}
DONE = "done.json"
STOPPED = (129, 130, 143)
"""Exit statuses of a stage that a signal has ended in good order."""

_REFERENCE = re.compile(r"\$\{(\w+)\}")


@dataclass(frozen=True)
class Stage:
    """One run of a pipeline.

    Args:
        name: names its folder, and the stage in later ones.
        command: command of ``lightning-rlhf``.
        configs: named configs or files, from left to right.
        options: settings on top of them, by path.
        folder: its run folder.
        needs: names of the earlier stages that its options name.
    """

    name: str
    command: str
    configs: tuple[str, ...]
    options: dict[str, object]
    folder: Path
    needs: tuple[str, ...] = ()

    @property
    def arguments(self) -> list[str]:
        """The command line behind ``lightning-rlhf``."""
        where = [] if self.command == "export" else [f"--run_dir={self.folder}"]
        configs = [f"--config={config}" for config in self.configs]
        options = [f"--{key}={_written(value)}" for key, value in self.options.items()]
        return [self.command, *configs, *where, *options]


@dataclass(frozen=True)
class Report:
    """How the policies of a pipeline are compared.

    Args:
        policies: names of the stages whose ``model`` folders are compared.
        baseline: policy that they are compared with, and that KL is measured from; one with their vocabulary.
        beta: price of a nat in J = score - beta KL, >= 0.
        options: settings of ``lightning-rlhf evaluate``.
        needs: names of the stages that baseline and options name.
    """

    policies: tuple[str, ...]
    baseline: str
    beta: float
    options: dict[str, object]
    needs: tuple[str, ...] = ()


class PolicyRow(TypedDict):
    """A policy in the table of a pipeline; None where something was not measured.

    Attributes:
        policy: name of its stage.
        score, score_stderr: mean held-out score and its standard error.
        kl, kl_stderr: KL from the baseline in nats per answer and its standard error.
        j: score - beta KL.
        win_rate, win_rate_low, win_rate_high: share of answers preferred to the baseline's, with Wilson's interval.
        labels: labels bought.
        seconds: time of the stage.
    """

    policy: str
    score: float | None
    score_stderr: float | None
    kl: float | None
    kl_stderr: float | None
    j: float | None
    win_rate: float | None
    win_rate_low: float | None
    win_rate_high: float | None
    labels: int | None
    seconds: float


class PipelineReport(TypedDict):
    """The table of a pipeline."""

    baseline: str
    beta: float
    policies: list[PolicyRow]


class Pipeline:
    """Runs stages one after the other, in processes of their own, and skips stages that are done.

    A stage is a normal ``fit``, ``label``, ``sample``, ``export`` or ``evaluate`` in its own folder below ``run_dir``;
    the same command continues a pipeline that was stopped, at the stage that was running and within it. In options,
    ``${NAME}`` stands for the folder of an earlier stage or for an entry of ``variables``, ``${folder}`` for the own
    folder of a stage.

    Args:
        path: the pipeline, a YAML file.
        run_dir: folder of all stages; default: the one that the file names.
        overrides: values of ``variables`` that differ from the file's.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no pipeline, or refers to a stage that does not come before; the field is named.
    """

    def __init__(self, path: str, run_dir: str | None = None, overrides: Mapping[str, str] | None = None) -> None:
        file = Path(path).expanduser()
        # each message below names file and field, before a stage is started
        if not file.is_file():
            raise FileNotFoundError(f"pipeline {path!r}: no such file")
        try:
            raw = yaml.safe_load(file.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not valid YAML ({error})") from error
        raw = _mapping(raw, path, "the file", PIPELINE_FIELDS)
        self.folder = Path(run_dir or str(raw.get("run_dir") or f"runs/{file.stem}"))
        names: dict[str, object] = _mapping(raw.get("variables") or {}, path, "variables", None)
        unknown = sorted(set(overrides or {}) - set(names))
        # an override with a typo would change nothing
        if unknown:
            raise ValueError(f"{path}: variables has no {unknown[0]!r} to change; it has {sorted(names)}")
        names = {**names, **(overrides or {})}
        rows = raw.get("stages")
        if not isinstance(rows, list) or not rows:
            raise ValueError(f"{path}: stages must be a list of at least one; got {rows!r}")
        self.stages: list[Stage] = []
        for number, row in enumerate(rows):
            self.stages.append(self._stage(_mapping(row, path, f"stages[{number}]", STAGE_FIELDS), path, number, names))
            names[self.stages[-1].name] = str(self.stages[-1].folder)
        self.report = self._report(raw.get("report"), path, names)

    def run(self) -> PipelineReport | None:
        """Run the remaining stages, then compare the policies; returns the table, None if the file asks for none.

        Raises:
            SystemExit: if a stage fails, with its status; the same command goes on from there.
            ValueError: if a stage that is done was run with other settings.
        """
        for number, stage in enumerate(self.stages):
            self._run(stage, f"{number + 1} of {len(self.stages)}")
        # stages alone
        if self.report is None:
            return None
        evaluations = {}
        for policy in self.report.policies:
            folder = self._stage_named(policy).folder
            options = {"a": str(folder / "model"), "b": self.report.baseline, "options.reference": self.report.baseline}
            where = self.folder / "report" / policy
            # the policy first: reports of version 0.1 were made of it alone
            needs = tuple(dict.fromkeys((policy, *self.report.needs)))
            stage = Stage(policy, "evaluate", (), {**self.report.options, **options}, where, needs)
            self._run(stage, f"evaluating {policy}")
            evaluations[policy] = json.loads((stage.folder / "report.json").read_text(encoding="utf-8"))
        table = [row_of(self._stage_named(name), found, self.report.beta) for name, found in evaluations.items()]
        result: PipelineReport = {"baseline": self.report.baseline, "beta": self.report.beta, "policies": table}
        write_whole(self.folder / "report.json", json.dumps(result, indent=2) + "\n")
        text = table_text(result)
        write_whole(self.folder / "report.md", f"# {self.folder.name}\n\n{text}")
        print(text, flush=True)
        return result

    def _run(self, stage: Stage, number: str) -> None:
        digest = self._digest(stage)
        marker = stage.folder / DONE
        # done: by its digest, not by its name
        if marker.exists():
            held = json.loads(marker.read_text(encoding="utf-8"))
            known = {digest}
            # of version 0.1, whose `evaluate` took the reference by another name
            earlier = [arg.replace("--options.reference=", "--reference=") for arg in stage.arguments]
            if earlier != stage.arguments:
                known |= {self._digest(stage, earlier), self._digest(replace(stage, needs=stage.needs[:1]), earlier)}
            if held["digest"] not in known:
                raise ValueError(
                    f"stage {stage.name!r} was done with other settings, or on an earlier run of a stage before it: "
                    f"lightning-rlhf {' '.join(held['arguments'])}; delete {stage.folder} and the stages that build on "
                    f"it, or give another run_dir"
                )
            print(f"{stage.name} ({number}): done", flush=True)
            return
        print(f"{stage.name} ({number}): lightning-rlhf {' '.join(stage.arguments)}", flush=True)
        stage.folder.mkdir(parents=True, exist_ok=True)
        # not time.time(): a change of the clock must not change the duration
        start = time.monotonic()
        status = run_child([sys.executable, "-m", "lightning_rlhf", *stage.arguments])
        # stopped on request: the status says so to the shell
        if status in STOPPED:
            print(f"stage {stage.name!r} was stopped; the same command goes on from there", flush=True)
            raise SystemExit(status)
        if status:
            raise SystemExit(f"stage {stage.name!r} ended with status {status}; the same command goes on from there")
        seconds = time.monotonic() - start
        held = {"digest": digest, "arguments": stage.arguments, "seconds": seconds, "finished": time.time()}
        # written last: only a stage that ended with status 0 counts as done
        write_whole(marker, json.dumps(held, indent=2) + "\n")

    def _digest(self, stage: Stage, arguments: list[str] | None = None) -> str:
        """Digest of everything a stage depends on: its arguments, its config files, and the runs that it builds on."""
        files = {c: Path(c).read_text(encoding="utf-8") for c in stage.configs if Path(c).is_file()}
        # the end of the earlier stage, not its settings: a run that is repeated has other weights
        markers = [self._stage_named(name).folder / DONE for name in stage.needs]
        runs = [json.loads(marker.read_text(encoding="utf-8"))["finished"] for marker in markers]
        return hashlib.sha256(json.dumps([arguments or stage.arguments, files, runs]).encode()).hexdigest()

    def _stage_named(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def _stage(self, row: Mapping[str, object], path: str, number: int, names: Mapping[str, object]) -> Stage:
        where = f"stages[{number}]"
        name = row.get("name")
        # "report" is the folder of the evaluations, "folder" the variable of the own folder of a stage
        if not isinstance(name, str) or not re.fullmatch(r"\w+", name) or name in {*names, "report", "folder"}:
            raise ValueError(f"{path}: {where}.name must be a new word of letters, digits and _; got {name!r}")
        command = row.get("command", row.get("verb", "fit"))
        if command not in STAGE_COMMANDS:
            raise ValueError(f"{path}: {where}.command must be one of {', '.join(STAGE_COMMANDS)}; got {command!r}")
        configs = row.get("config", [])
        configs = [configs] if isinstance(configs, str) else configs
        if not isinstance(configs, list) or not all(isinstance(config, str) for config in configs):
            raise ValueError(f"{path}: {where}.config must be a name or a list of names; got {configs!r}")
        options = _mapping(row.get("options") or {}, path, f"{where}.options", None)
        # two stages in one folder would continue each other
        if "run_dir" in options:
            raise ValueError(f"{path}: {where}.options.run_dir is the pipeline's to choose; drop it")
        folder = self.folder / f"{number + 1:02d}-{name}"
        known = {**names, "folder": str(folder)}
        settings = {key: _resolved(value, known, f"{path}: {where}.options.{key}") for key, value in options.items()}
        # only earlier stages are in self.stages here, so that needs cannot form a cycle
        return Stage(name, str(command), tuple(configs), settings, folder, self._needed(options))

    def _needed(self, settings: object) -> tuple[str, ...]:
        """Stages that settings name: one that is run again makes whatever builds on it stale."""
        mentioned = set(_REFERENCE.findall(json.dumps(settings)))
        return tuple(stage.name for stage in self.stages if stage.name in mentioned)

    def _report(self, raw: object, path: str, names: Mapping[str, object]) -> Report | None:
        if raw is None:
            return None
        row = _mapping(raw, path, "report", REPORT_FIELDS)
        policies = row.get("policies")
        known = [stage.name for stage in self.stages if stage.command == "fit"]
        if not isinstance(policies, list) or not policies or not set(policies) <= set(known):
            raise ValueError(f"{path}: report.policies must name fit stages, of {known}; got {policies!r}")
        if not isinstance(row.get("baseline"), str):
            raise ValueError(f"{path}: report.baseline must be the policy that the others are compared with")
        beta = row.get("beta", 0.0)
        if not isinstance(beta, int | float) or beta < 0:
            raise ValueError(f"{path}: report.beta must be a number >= 0; got {beta!r}")
        options = _mapping(row.get("options") or {}, path, "report.options", None)
        settings = {key: _resolved(value, names, f"{path}: report.options.{key}") for key, value in options.items()}
        baseline = _resolved(row["baseline"], names, f"{path}: report.baseline")
        needs = self._needed([row["baseline"], options])
        return Report(tuple(policies), str(baseline), float(beta), settings, needs)


def row_of(stage: Stage, evaluation: EvaluationReport, beta: float) -> PolicyRow:
    """The row of a policy in the table of a pipeline; None where something was not measured."""
    seconds = json.loads((stage.folder / DONE).read_text(encoding="utf-8"))["seconds"]
    summary = stage.folder / "summary.json"
    # a stage that was stopped before its first summary has none
    own = json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {}
    # J = E[score] - beta KL
    score, kl = evaluation.get("scores", {}).get("A"), evaluation.get("kl")
    return {
        "policy": stage.name,
        "score": score and score["mean"],
        "score_stderr": score and score["stderr"],
        "kl": kl and kl["mean"],
        "kl_stderr": kl and kl["stderr"],
        "j": score["mean"] - beta * kl["mean"] if score and kl else None,
        "win_rate": evaluation.get("wins", {}).get("win_rate"),
        "win_rate_low": evaluation.get("wins", {}).get("win_rate_low"),
        "win_rate_high": evaluation.get("wins", {}).get("win_rate_high"),
        "labels": own.get("labels"),
        "seconds": seconds,
    }


def table_text(result: PipelineReport) -> str:
    """The table of a pipeline in Markdown."""
    rows = []
    for row in result["policies"]:
        low, rate, high = row["win_rate_low"], row["win_rate"], row["win_rate_high"]
        wins = "-"
        if rate is not None and low is not None and high is not None:
            wins = f"{100 * rate:.0f} % ({100 * low:.0f} to {100 * high:.0f})"
        labels = "-" if row["labels"] is None else str(row["labels"])
        score, kl = _number(row["score"], row["score_stderr"]), _number(row["kl"], row["kl_stderr"])
        rows.append((row["policy"], score, kl, _number(row["j"]), wins, labels, f"{row['seconds']:.0f}"))
    header = ("policy", "held-out score", "KL, nats", "J", "preferred to the baseline", "labels", "seconds")
    lines = ["| " + " | ".join(row) + " |" for row in (header, ("---",) * len(header), *rows)]
    return "\n".join(lines) + (
        f"\n\nBaseline: {result['baseline']}. J = score − {result['beta']:g} KL; ± is one standard error over prompts, "
        f"the interval of the win rate Wilson's of 95 %. Seconds are those of the stage alone.\n"
    )


def _number(value: float | None, error: float | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _mapping(raw: object, path: str, where: str, known: set[str] | None) -> dict[str, object]:
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: {where} must be a mapping; got {raw!r}")
    unknown = sorted(set(map(str, raw)) - known) if known is not None else []
    if unknown:
        listed = ", ".join(sorted(known or ()))
        raise ValueError(f"{path}: {where} has an unknown field {unknown[0]!r}; known are {listed}")
    return raw


def _resolved(value: object, names: Mapping[str, object], where: str) -> object:
    """A setting with folders and variables in their places; a value that is one variable keeps its type."""
    if isinstance(value, list):
        return [_resolved(item, names, where) for item in value]
    if isinstance(value, dict):
        return {key: _resolved(item, names, where) for key, item in value.items()}
    if not isinstance(value, str):
        return value
    missing = [name for name in _REFERENCE.findall(value) if name not in names]
    if missing:
        there = ", ".join(names) or "none"
        raise ValueError(f"{where}: ${{{missing[0]}}} is neither a variable nor an earlier stage; there are {there}")
    # a number that is one variable stays a number
    whole = _REFERENCE.fullmatch(value)
    return names[whole[1]] if whole else _REFERENCE.sub(lambda found: str(names[found[1]]), value)


def _written(value: object) -> str:
    """A setting as the command line takes it."""
    # JSON is YAML, as which the command line reads values
    return value if isinstance(value, str) else json.dumps(value)
