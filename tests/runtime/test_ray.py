"""`RayExecutor` on a real cluster of two nodes on this machine; `make test-ray` installs Ray and runs it."""

from __future__ import annotations

import importlib
import os
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from lightning_rlhf.commands.label import LabelRun
from lightning_rlhf.experiments import CompareRun
from lightning_rlhf.prompts import DatasetPrompts
from lightning_rlhf.runtime.executors import RayExecutor


sys.path.insert(0, str(Path(__file__).parent))  # workers import the plug-ins by their name
from spread_plugins import Coin, Grid, attempts, curves, pairs


ray = pytest.importorskip("ray", reason="needs Ray: make test-ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of a cluster of two nodes (raylets) with one CPU each."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 << 20}
    made = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    made.add_node(**node)
    made.wait_for_nodes()
    yield str(made.address)
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> DatasetPrompts:
    return pairs(tmp_path_factory.mktemp("rows"))


def test_cells_survive_their_workers_and_equal_those_of_local_processes(
    cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    CompareRun(Grid(str(tmp_path)), run_dir=str(here), processes=2).run()
    # each death is a SIGKILL of the worker by its cell
    deadly = Grid(str(tmp_path), {"PILAF/1": 1, "Vanilla/2": 3})
    with pytest.raises(RuntimeError, match=r"1 cells failed.*Vanilla/2"):
        CompareRun(deadly, run_dir=str(there), processes=RayExecutor(cluster)).run()
    said = capsys.readouterr().out
    assert said.count("PILAF/1: its worker was lost") == 1 and said.count("Vanilla/2: its worker was lost") == 3
    done = {path: path.stat().st_mtime_ns for path in there.rglob("cell.json")}
    assert len(done) == 5
    CompareRun(deadly, run_dir=str(there), processes=RayExecutor(cluster)).run()
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert curves(there) == curves(here)
    assert (there / "report.json").read_bytes() == (here / "report.json").read_bytes()
    # both nodes have worked
    assert len(list(tmp_path.glob("on_[0-9]*"))) == 2


def test_labels_survive_a_worker_and_equal_those_of_one_process(
    cluster: str, tmp_path: Path, source: DatasetPrompts
) -> None:
    labeler = Coin(str(tmp_path), deadly=18)
    (tmp_path / "labeler_died").touch()
    LabelRun(source, labeler, str(tmp_path / "one"), chunk=4).run()
    (tmp_path / "labeler_died").unlink()
    report = LabelRun(source, labeler, str(tmp_path / "ray"), chunk=4, processes=RayExecutor(cluster)).run()
    assert (tmp_path / "labeler_died").exists() and report["labelled"] == 40
    assert attempts(tmp_path / "ray") == attempts(tmp_path / "one")


def test_a_chunk_that_always_kills_its_worker_is_named_and_the_others_are_kept(
    cluster: str, tmp_path: Path, source: DatasetPrompts
) -> None:
    labeler = Coin(str(tmp_path), deadly=18, always=True)
    with pytest.raises(RuntimeError, match=r"1 chunks have no labels.*; pairs 17 to 20: the worker was lost"):
        LabelRun(source, labeler, str(tmp_path / "run"), chunk=4, processes=RayExecutor(cluster)).run()
    with closing(sqlite3.connect(tmp_path / "run" / "ledger.sqlite")) as db:
        assert db.execute("SELECT COUNT(*) FROM attempts").fetchone() == (36,)


def test_the_executor_in_the_manual_runs_jobs_of_submitit(
    tmp_path: Path, source: DatasetPrompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    manual = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    (tmp_path / "executors.py").write_text(manual.split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    # each job is a new Python, which finds modules by the environment alone
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}")
    executors = importlib.import_module("executors")
    labeler = Coin(str(tmp_path))
    LabelRun(source, labeler, str(tmp_path / "one"), chunk=20).run()
    jobs = executors.SlurmExecutor(str(tmp_path / "slurm"), cluster="local")
    LabelRun(source, labeler, str(tmp_path / "two"), chunk=20, processes=jobs).run()
    assert attempts(tmp_path / "two") == attempts(tmp_path / "one")
    assert len(list((tmp_path / "slurm").glob("*_submitted.pkl"))) == 2
