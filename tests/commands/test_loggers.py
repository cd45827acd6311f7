"""Loggers: none loses the CSV file or the configuration, and all write into the run folder."""

from __future__ import annotations

import csv
import json
import os
import sqlite3
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_rlhf.cli import main
from lightning_rlhf.commands.loggers import keep_in_run_folder, loggers_of


ROWS = [{"prompt": f"say {n}: ", "chosen": f"{n}z", "rejected": "yx"} for n in range(4)]


def fit(folder: Path, policy: Path, *options: str) -> None:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    main(
        [
            *("fit", "--config=dpo_offline", "--trainer.accelerator=cpu", "--trainer.precision=32-true"),
            *("--trainer.enable_progress_bar=false", f"--model.policy={policy}", "--data.prompts.path=rows.jsonl"),
            *("--data.heldout=DatasetPrompts", "--data.heldout.path=rows.jsonl", "--data.decoding.max_new_tokens=4"),
            *("--run_dir=run", *options),
        ]
    )


def test_wandb_beside_csv(tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOME_API_KEY", "a-secret-of-mine")
    # answers of held-out prompts are shown as a table, too
    logger = ["--trainer.logger=WandbLogger", "--trainer.logger.offline=true"]
    logger += ["--trainer.logger.project=a-secret-of-mine"]
    fit(tmp_path, tiny_policy, *logger, "--data.rounds.heldout_generate=true", "--data.reward=LexiconReward")
    wandb.finish()
    # nothing beside the run folder
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "run"}
    (metrics,) = (tmp_path / "run" / "metrics").glob("version_*/metrics.csv")
    with metrics.open() as file:
        assert any(row["val/loss"] for row in csv.DictReader(file))
    config = yaml.safe_load((metrics.parent / "config.yaml").read_text())
    assert config["trainer"]["logger"]["class_path"].endswith("WandbLogger")
    (run,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    (log,) = run.glob("*.wandb")
    written = log.read_bytes()
    assert b"val/loss" in written
    assert b"pairs_per_batch" in written
    # the project is a name of W&B's own; in the settings it is masked
    assert b"[secret]" in written
    assert list(run.rglob("*.png"))


def test_no_logger_keeps_the_configuration(tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fit(tmp_path, tiny_policy, "--trainer.logger=false")
    assert not list(tmp_path.rglob("metrics.csv"))
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]["logger"] is False
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["pairs"] == 4


@pytest.mark.skipif(find_spec("mlflow") is not None, reason="needs an environment without mlflow")
def test_the_package_of_a_logger_is_named(tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"pip install.*mlflow(.|\n)*constructor of .*MLFlowLogger at trainer\.logger"):
        fit(tmp_path, tiny_policy, "--trainer.logger=MLFlowLogger", "--trainer.logger.experiment_name=mine")


def test_mlflow_writes_a_database_in_the_run_folder(
    tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    fit(tmp_path, tiny_policy, "--trainer.logger=MLFlowLogger")
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "run"}
    with closing(sqlite3.connect(tmp_path / "run" / "mlflow.db")) as database:
        names = {name for (name,) in database.execute("SELECT key FROM metrics")}
        assert {"train/loss", "val/loss"} <= names
        assert database.execute("SELECT COUNT(*) FROM params").fetchone()[0] > 50
        assert database.execute("SELECT status FROM runs").fetchall() == [("FINISHED",)]


def test_where_other_loggers_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COMET_OFFLINE_DIRECTORY", "NEPTUNE_DATA_DIRECTORY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def entry(name: str, **arguments: object) -> Namespace:
        return Namespace(class_path=f"lightning.pytorch.loggers.{name}", init_args=Namespace(**arguments))

    told, server = entry("WandbLogger", save_dir="elsewhere"), {"tracking_uri": "http://localhost:5000"}
    mlflow, served = (
        entry("MLFlowLogger", **{"save_dir": "./mlruns", "tracking_uri": None, "artifact_location": None, **given})
        for given in ({}, server)
    )
    keep_in_run_folder([mlflow, served, told, entry("NeptuneLogger")], tmp_path / "run")
    assert mlflow.init_args.tracking_uri == f"sqlite:///{tmp_path / 'run' / 'mlflow.db'}"
    assert mlflow.init_args.artifact_location == str(tmp_path / "run" / "mlruns")
    assert (tmp_path / "run").is_dir()
    assert served.init_args.tracking_uri == server["tracking_uri"]
    assert served.init_args.artifact_location is None
    assert told.init_args.save_dir == "elsewhere"
    assert os.environ["COMET_OFFLINE_DIRECTORY"] == str(tmp_path / "run" / "comet")
    assert os.environ["NEPTUNE_DATA_DIRECTORY"] == str(tmp_path / "run" / "neptune")


def test_csv_comes_first_and_once(tmp_path: Path) -> None:
    default = loggers_of(None, tmp_path)
    assert isinstance(default, list)
    assert [type(logger) for logger in default] == [CSVLogger, TensorBoardLogger]
    board, mine = TensorBoardLogger(tmp_path), CSVLogger(tmp_path / "mine")
    assert loggers_of([board, mine], tmp_path) == [mine, board]
    beside = loggers_of(board, tmp_path)
    assert isinstance(beside, list)
    assert beside[0].save_dir == str(tmp_path)
    assert beside[1:] == [board]
    assert loggers_of(False, tmp_path) is False
