"""Cells and chunks in several processes: the results of one process, whatever worker is lost."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from lightning_rlhf.cli import main
from lightning_rlhf.commands.label import LabelRun
from lightning_rlhf.experiments import CompareRun
from lightning_rlhf.runtime.executors import ProcessExecutor


sys.path.insert(0, str(Path(__file__).parent))  # workers import the plug-ins by their name
from spread_plugins import Coin, Grid, attempts, curves, pairs


class Careless(ThreadPoolExecutor):
    """Loses the workers of some tasks."""

    def __init__(self, losses: dict[str, int]) -> None:
        super().__init__(max_workers=2)
        self.losses = losses

    def submit(self, fn: Callable[..., int], /, *args: object, **kwargs: object) -> Future[int]:  # type: ignore[override]
        name = args[2].name  # type: ignore[attr-defined]
        if self.losses.get(name, 0) > 0:
            self.losses[name] -= 1
            return super().submit(self._lose)
        return super().submit(fn, *args, **kwargs)

    def _lose(self) -> int:
        raise ConnectionError("the node is gone")


def test_cells_on_any_executor_are_those_of_the_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    CompareRun(Grid(str(tmp_path)), run_dir=str(here), processes=2).run()
    lossy = Careless({"PILAF/1": 1, "Vanilla/2": 9})
    with pytest.raises(RuntimeError, match=r"1 cells failed.*Vanilla/2"):
        CompareRun(Grid(str(tmp_path)), run_dir=str(there), processes=lossy).run()
    said = capsys.readouterr().out
    assert said.count("PILAF/1: its worker was lost (the node is gone)") == 1
    assert said.count("Vanilla/2: its worker was lost (the node is gone)") == 3 and "Vanilla/2 FAILED" in said
    done = {path: path.stat().st_mtime_ns for path in there.rglob("cell.json")}
    assert len(done) == 5
    CompareRun(Grid(str(tmp_path)), run_dir=str(there), processes=Careless({})).run()
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert curves(there) == curves(here)
    assert (there / "report.json").read_bytes() == (here / "report.json").read_bytes()


def test_labels_of_several_processes_are_those_of_one(tmp_path: Path) -> None:
    source, labeler = pairs(tmp_path), Coin(str(tmp_path))
    LabelRun(source, labeler, str(tmp_path / "one"), chunk=4).run()
    report = LabelRun(source, labeler, str(tmp_path / "two"), chunk=4, processes=2).run()
    assert report["labelled"] == 40 and len(attempts(tmp_path / "one")) == 40
    assert attempts(tmp_path / "two") == attempts(tmp_path / "one")

    # a pool of the standard library ends with a worker: what has been labeled stays, and the same command goes on
    deadly = Coin(str(tmp_path), deadly=18)
    with pytest.raises(RuntimeError, match=r"chunks have no labels.*; pairs \d+ to \d+: the worker was lost"):
        LabelRun(source, deadly, str(tmp_path / "lost"), chunk=4, processes=1).run()
    before = attempts(tmp_path / "lost")
    assert before == attempts(tmp_path / "one")[: len(before)]
    LabelRun(source, deadly, str(tmp_path / "lost"), chunk=4, processes=2).run()
    assert attempts(tmp_path / "lost") == attempts(tmp_path / "one")


def test_errors_of_a_labeler_are_its_own(tmp_path: Path) -> None:
    class Local(Coin):
        """Does not pickle."""

    with pytest.raises(ValueError, match=r"Local does not pickle .* leave out --processes"):
        LabelRun(pairs(tmp_path), Local(str(tmp_path)), str(tmp_path / "run"), processes=2).run()
    with pytest.raises(ValueError, match="processes must be at least 1"):
        LabelRun(pairs(tmp_path), Coin(str(tmp_path)), str(tmp_path / "run"), processes=0)


def test_the_command_line_takes_a_number_or_an_executor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pairs(tmp_path, 6)
    options = ["--pairs=DatasetPrompts", "--pairs.path=rows.jsonl", "--labeler=RecordedLabeler", "--chunk=2"]
    main(["label", *options, "--run_dir=one"])
    main(["label", *options, "--run_dir=two", "--processes=ThreadPoolExecutor", "--processes.max_workers=2"])
    # the number of processes is no setting of the ledger
    main(["label", *options, "--run_dir=two", "--processes=2"])
    assert attempts(tmp_path / "two") == attempts(tmp_path / "one")


def test_processes_return_their_status_and_end_with_the_executor() -> None:
    executor = ProcessExecutor(2)
    assert [future.result() for future in [executor.submit(os._exit, status) for status in (0, 3, 0)]] == [0, 3, 0]
    sleeping = [executor.submit(time.sleep, 1000) for _ in range(3)]
    while len(executor._alive) < 2:
        time.sleep(0.05)
    executor.shutdown(cancel_futures=True)
    assert sleeping[2].cancelled() and 0 not in [future.result() for future in sleeping[:2]]
