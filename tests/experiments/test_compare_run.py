"""``lightning-rlhf compare`` in real processes: done cells stay, failed ones are named, killed ones go on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from lightning_rlhf.cli import main
from lightning_rlhf.commands.config_files import find_config
from lightning_rlhf.evaluation.frontier import read_frontier
from lightning_rlhf.experiments import (
    AbstractExperiment,
    CompareRun,
    Curve,
    CurvePoint,
    FitArm,
    FitExperiment,
    FitSetting,
    Job,
    TabularExperiment,
    TabularSetting,
)
from lightning_rlhf.experiments.curves import read_cell
from lightning_rlhf.ledger.store import PreferenceStore


ROOT = Path(__file__).parents[2]


class Touchy(AbstractExperiment):
    """Two arms; the second fails until a file is there, a third waits for it."""

    def __init__(self, allowed: Path) -> None:
        self.allowed = allowed

    def jobs(self) -> Sequence[Job]:
        return [
            Job("easy/0", {"arm": "Vanilla"}),
            Job("hard/0", {"arm": "PILAF"}),
            Job("late/0", {"arm": "Hybrid"}, ("hard/0",)),
        ]

    def run(self, job: Job, root: Path) -> list[Curve]:
        if job.name == "hard/0" and not self.allowed.exists():
            raise ValueError("the file is not there")
        assert os.environ["OMP_NUM_THREADS"] == "1"
        points = (CurvePoint(0, 0, 0.0, 0.0, 0.0), CurvePoint(1, 8, 1.0, 0.5, 0.95))
        return [Curve("online", job.identity["arm"], 0, points, 2.0, 2.0)]


def test_failed_cells_are_named_and_done_again_and_the_rest_is_kept(tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    run = CompareRun(Touchy(allowed), run_dir=str(tmp_path / "run"), processes=2)
    with pytest.raises(RuntimeError, match=r"2 cells failed.*hard/0/log.txt"):
        run.run()
    assert "the file is not there" in (tmp_path / "run" / "cells" / "hard" / "0" / "log.txt").read_text()
    easy = tmp_path / "run" / "cells" / "easy" / "0" / "cell.json"
    before = easy.stat().st_mtime_ns
    allowed.touch()
    report = run.run()
    assert easy.stat().st_mtime_ns == before
    assert set(report["settings"]["online"]) == {"Vanilla", "PILAF", "Hybrid"}


def test_tabular_comparison_by_command_grows_but_does_not_change(tmp_path: Path) -> None:
    settings = {
        "experiment": {
            "class_path": "TabularExperiment",
            "init_args": {
                "seeds": 3,
                "arms": ["Vanilla", "PILAF"],
                "settings": {"it": {"kind": "iterative", "beta": 0.5, "spread": 2.0, "budget": 64, "pairs": 32}},
            },
        },
        "run_dir": str(tmp_path / "run"),
        "processes": 2,
    }
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(settings))
    main(["compare", str(file)])
    folder = tmp_path / "run"
    for name in ("report.md", "report.json", "curves.csv", "frontiers.png", "labels.png", "alignment.png"):
        assert (folder / name).stat().st_size > 0
    figures = json.loads((folder / "report.json").read_text())
    assert figures["settings"]["it"]["PILAF"]["labels"] == 64
    assert len(figures["settings"]["it"]["PILAF"]["j_difference"]) == 3
    # a header, and 2 arms x 3 seeds x (start + 2 rounds)
    assert len((folder / "curves.csv").read_text().splitlines()) == 1 + 18
    old = {path: path.stat().st_mtime_ns for path in folder.rglob("cell.json")}
    settings["experiment"]["init_args"]["arms"].append("Policy-weighted")  # type: ignore[index]
    file.write_text(yaml.safe_dump(settings))
    main(["compare", str(file)])
    assert {path: path.stat().st_mtime_ns for path in old} == old
    assert "Policy-weighted" in (folder / "report.md").read_text()
    settings["experiment"]["init_args"]["seeds"] = 4  # type: ignore[index]
    file.write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match="seeds"):
        main(["compare", str(file)])


def test_arms_and_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="no arm 'PILOF'"):
        TabularExperiment({"a": TabularSetting("online", 0.1, 1.0)}, ["PILOF"])
    with pytest.raises(ValueError, match="processes"):
        CompareRun(TabularExperiment({}, []), processes=0)


@pytest.mark.slow
def test_smoke_comparison_is_killed_and_continues(tmp_path: Path) -> None:
    """Two seeds of normal fit runs, with starts: killed in the middle, ended by the command that writes the manual."""
    folder = tmp_path / "menu"
    command = [sys.executable, "-m", "lightning_rlhf", "compare", "compare/smoke", f"--run_dir={folder}"]
    environment = {**os.environ, "LIGHTNING_RLHF_CACHE": str(tmp_path / "cache")}
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        deadline = time.monotonic() + 900
        while len(list(folder.rglob("cell.json"))) < 3:
            assert process.poll() is None, (tmp_path / "log.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    done = {path: path.stat().st_mtime_ns for path in folder.rglob("cell.json")}
    command = [sys.executable, "-m", "benchmarks.results", "--smoke", "--only=menu", f"--runs={tmp_path}"]
    again = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert {path: path.stat().st_mtime_ns for path in done} == done
    summary = (
        (tmp_path / "results.md").read_text().partition("<!-- begin menu -->")[2].partition("<!-- end menu -->")[0]
    )
    assert "2 seeds" not in summary
    shown, page = re.findall(r"\]\((results/menu[\w.]+)\)", summary)
    tables = (tmp_path / page).read_text()
    assert tables.startswith('# World "menu": tables\n')
    assert "\n## online\n" in tables
    assert "2 seeds" in tables
    pictures = re.findall(r"\]\((menu_\w+\.png)\)", tables)
    assert len(set(pictures)) == 3
    assert shown == f"results/{pictures[0]}"
    assert all((tmp_path / "results" / picture).stat().st_size > 0 for picture in pictures)
    figures = json.loads((folder / "report.json").read_text())
    assert set(figures["settings"]) == {"online", "overfitted"}
    half = "Vanilla, half the labels"
    for arms in figures["settings"].values():
        # budgets as configured, both seeds, costs as counted
        budgets = {**dict.fromkeys(("Vanilla", "PILAF", "Policy-weighted"), (32, 2)), half: (16, 2)}
        assert {arm: (found["labels"], found["seeds"]) for arm, found in arms.items()} == budgets
        assert all(found["cpu_seconds"] > 0 for found in arms.values())
        # the same run, cut: J at 16 labels differs by nothing
        assert arms[half]["j_at"]["16"] == arms["Vanilla"]["j_at"]["16"]
        assert arms[half]["j_at_difference"]["32"] == [None, None, None]
        assert arms["Vanilla"]["j_at_difference"]["32"] == [0.0, 0.0, 0.0]
        assert (arms["Vanilla"]["passes"], arms["Policy-weighted"]["passes"]) == (2.0, 4.0)
    for cell in folder.rglob("cell.json"):
        curves, identity = read_cell(cell)
        if identity["arm"] is None:
            assert curves == []
            continue
        assert [p.j for p in curves[0].points] == [p.j for p in read_frontier(cell.parent / "frontier.csv")]
        with PreferenceStore(cell.parent / "ledger.sqlite") as store:
            assert store.count_labels(before=1000) == (16 if identity["arm"] == half else 32)
    # all arms of a seed start from one policy, and an overfitted one has moved away from the reference
    starts = [
        read_cell(folder / "cells" / "overfitted" / arm / "0" / "cell.json")[0][0].points[0]
        for arm in ("vanilla", "pilaf")
    ]
    assert starts[0] == starts[1]
    # at the reference an estimate is zero but for rounding, below 1e-6
    assert abs(starts[0].kl) > 1e-4


def test_arms_may_have_label_budgets_of_their_own() -> None:
    arms: dict[str, list[str] | FitArm] = {
        "long": ["--data.sampler=VanillaSampler"],
        "short": FitArm(["--data.sampler=VanillaSampler"], labels=24),
    }
    settings = {"a": FitSetting(), "b": FitSetting(labels=48)}
    experiment = FitExperiment(arms, settings, ["worlds/menu"], labels=96, seeds=1)
    budgets = {job.name: job.identity["args"][-1] for job in experiment.jobs()}
    assert budgets == {
        "a/long/0": "--trainer.callbacks.labels=96",
        "a/short/0": "--trainer.callbacks.labels=24",
        "b/long/0": "--trainer.callbacks.labels=48",
        "b/short/0": "--trainer.callbacks.labels=24",
    }
    with pytest.raises(ValueError, match="labels of an arm"):
        FitArm([], labels=0)
    with pytest.raises(ValueError, match="at_labels"):
        CompareRun(experiment, at_labels=[240, -1])


def test_named_comparisons_parse() -> None:
    names = "tabular menu menu_labels menu_models menu_judges menu_exploration menu_people stories stories_labels smoke"
    beyond = ("tabular_rlhf", "tabular_thumbs", "menu_rlhf", "menu_thumbs", "menu_systems", "menu_ensembles")
    for name in (*names.split(), *beyond, "stories_size", "quickstart_labels", "smollm2"):
        assert yaml.safe_load(find_config(f"compare/{name}").read_text())["experiment"]
        with pytest.raises(SystemExit) as ended:
            main(["compare", f"compare/{name}", "--print_config"])
        assert ended.value.code in (0, None)
