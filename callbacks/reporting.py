"""Access of the callbacks to the run: its DataModule, its folder and its loggers."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeAlias
from weakref import WeakKeyDictionary

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from lightning_rlhf.protocols import PreferenceSource, datamodule_of


Row: TypeAlias = list[str | float | None]
"""A row of a table, a value per column."""


def preference_source(trainer: Trainer) -> PreferenceSource:
    """The DataModule of the run.

    Raises:
        ValueError: if the run has none, as after ``trainer.fit(module, dataloader)``.
        TypeError: if the DataModule lacks a property that callbacks read.
    """
    return datamodule_of(trainer, PreferenceSource, "a callback")


def root(trainer: Trainer) -> Path:
    """The folder of the run, made if need be; under ``fast_dev_run`` one that is gone with the Trainer."""
    # a trial must not replace the files of a real run
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        if trainer not in _TRIALS:
            _TRIALS[trainer] = tempfile.TemporaryDirectory(prefix="fast_dev_run-")
        return Path(_TRIALS[trainer].name)
    folder = Path(trainer.default_root_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


_TRIALS: WeakKeyDictionary[Trainer, tempfile.TemporaryDirectory[str]] = WeakKeyDictionary()


def show_image(trainer: Trainer, key: str, path: Path) -> None:
    """Show a PNG in the loggers that can; call it on rank zero. The CSV logger has the file itself."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            from matplotlib.image import imread  # imported here: only runs with figures need matplotlib

            logger.experiment.add_image(key, imread(path), trainer.global_step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(key, [str(path)], step=trainer.global_step)


def show_table(trainer: Trainer, key: str, columns: list[str], rows: list[Row], markdown: str) -> None:
    """Show a table in the loggers that can; call it on rank zero. The CSV logger has the file itself."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(key, markdown, trainer.global_step)
        elif isinstance(logger, WandbLogger):
            logger.log_table(key, columns, rows, step=trainer.global_step)


def log_known(pl_module: LightningModule, values: Mapping[str, float | None], on_bar: Collection[str] = ()) -> None:
    """Log the metrics that are known, once per epoch, from a hook that runs on every rank with equal values.

    Args:
        pl_module: the module that logs.
        values: metrics by name.
        on_bar: names of those that stand beside the progress bar, too.
    """
    # the mean over ranks of equal values changes nothing, but Lightning warns without it
    sync = pl_module.trainer.world_size > 1
    for name, value in values.items():
        if value is not None:
            pl_module.log(
                name, value, on_step=False, on_epoch=True, sync_dist=sync, batch_size=1, prog_bar=name in on_bar
            )


def last_validation(trainer: Trainer) -> dict[str, float] | None:
    """Write the metrics of the last validation to ``summary.json`` and return them; None on ranks other than zero.

    Unknown metrics (NaN) are null in the file.
    """
    metrics = {
        name.removeprefix("val/"): value.item()
        for name, value in trainer.callback_metrics.items()
        if name.startswith("val/")
    }
    if not trainer.is_global_zero:
        return None
    known = {name: None if math.isnan(value) else value for name, value in metrics.items()}
    text = json.dumps({"steps": trainer.global_step, **known}, indent=2)
    (root(trainer) / "summary.json").write_text(text + "\n", encoding="utf-8")
    return metrics
