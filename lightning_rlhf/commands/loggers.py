"""Loggers of a run: CSV always beside those of the user, all files in the run folder, and the settings in each."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path

from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lightning_rlhf.evaluation.report import write_whole
from lightning_rlhf.runtime.run_record import without_secrets


FOLDERS = {
    "WandbLogger": ("save_dir", "."),
    "MLFlowLogger": ("save_dir", "mlruns"),
    "TensorBoardLogger": ("save_dir", "."),
    "CSVLogger": ("save_dir", "."),
    "CometLogger": ("offline_directory", "comet"),
}
"""Argument of a logger that says where it writes, and the folder within the run folder."""

VARIABLES = {"COMET_OFFLINE_DIRECTORY": "comet", "NEPTUNE_DATA_DIRECTORY": "neptune"}
"""Environment variables that say the same to loggers without such an argument."""

ELSEWHERE = (None, ".", "./mlruns")
"""Defaults of these arguments: the working folder."""


def keep_in_run_folder(entries: object, run_dir: Path) -> None:
    """Let loggers of a configuration write into the run folder, unless they are told to write elsewhere.

    Args:
        entries: value of ``trainer.logger`` before it is built; changed in place.
        run_dir: the run folder.
    """
    for variable, folder in VARIABLES.items():
        os.environ.setdefault(variable, str((run_dir / folder).absolute()))
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, Namespace) or "class_path" not in entry:
            continue
        name = str(entry["class_path"]).rpartition(".")[2]
        argument, folder = FOLDERS.get(name, ("", ""))
        arguments = entry.get("init_args")
        if arguments is None or not argument:
            continue
        if name == "MLFlowLogger":
            _keep_mlflow(arguments, run_dir.absolute())
        # Comet takes it as one of its **kwargs, which are there only if they are given
        if argument in arguments and arguments[argument] in ELSEWHERE:
            # absolute: the service of W&B outlives a run, and keeps the working folder it was started in
            arguments[argument] = str((run_dir / folder).absolute())


def _keep_mlflow(arguments: Namespace, run_dir: Path) -> None:
    """Let MLflow write a database in the run folder: its later versions refuse to write files in ``save_dir``."""
    if arguments.get("tracking_uri") is None and arguments.get("save_dir") in ELSEWHERE:
        # MLflow makes the file, and no folder
        run_dir.mkdir(parents=True, exist_ok=True)
        arguments["tracking_uri"] = f"sqlite:///{run_dir / 'mlflow.db'}"
        arguments["artifact_location"] = arguments.get("artifact_location") or str(run_dir / "mlruns")


def loggers_of(given: object, run_dir: Path) -> list[Logger] | bool:
    """Loggers of a run.

    Args:
        given: value of ``trainer.logger``, built: None and True stand for CSV and TensorBoard, False for none.
        run_dir: the run folder.

    Returns:
        The loggers, with CSV first, whose folder holds the configuration; False for none.
    """
    if given is False:
        return False
    if given is None or given is True:
        loggers: list[Logger] = [TensorBoardLogger(run_dir, name="", version="tensorboard")]
    else:
        loggers = [one for one in (given if isinstance(given, list) else [given]) if isinstance(one, Logger)]
    own = next((logger for logger in loggers if isinstance(logger, CSVLogger)), None)
    own = own or CSVLogger(run_dir, name="metrics")
    return [own, *(logger for logger in loggers if logger is not own)]


def forget_repeated(run_dir: Path, loggers: list[Logger], steps: int) -> None:
    """Remove the metrics of steps that a continued run takes again, so that each point of a curve is there once.

    Rows of the CSV files of earlier starts are removed; TensorBoard is told not to show such points.

    Args:
        run_dir: the run folder.
        loggers: loggers of the run, before they have written.
        steps: optimizer steps that the run continues behind; 0 if it begins again.
    """
    for file in (run_dir / "metrics").glob("version_*/metrics.csv"):
        with file.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream)
            rows, names = list(reader), reader.fieldnames or []
        # step n is logged as n - 1, with the validation and the end of the epoch behind it; a killed process may have
        # left a part of a row
        kept = [row for row in rows if (row.get("step") or "").isdigit() and int(row["step"]) < steps]
        if len(kept) < len(rows):
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, names, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)
            write_whole(file, text.getvalue())
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            # handed on to the writer, which is made when the first metric is logged
            logger._kwargs["purge_step"] = steps


def tell_settings(loggers: list[Logger], settings: Mapping[str, object]) -> None:
    """Give the settings of the run to loggers of services; CSV and TensorBoard have them as ``config.yaml``.

    Args:
        loggers: loggers of the run.
        settings: all settings as plain data; values of secret environment variables are left out.
    """
    plain = json.loads(without_secrets(json.dumps(settings, default=str)))
    for logger in loggers:
        if not isinstance(logger, CSVLogger | TensorBoardLogger):
            logger.log_hyperparams(plain)
