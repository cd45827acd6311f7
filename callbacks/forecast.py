"""How well the preference model predicts real labels that it has not seen."""

from __future__ import annotations

import csv
from dataclasses import asdict, fields

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_rlhf.callbacks.reporting import log_known, root
from lightning_rlhf.collectors.silver import Forecast
from lightning_rlhf.datamodules.preferences import PreferenceDataModule
from lightning_rlhf.protocols import datamodule_of
from lightning_rlhf.types import State


COLUMNS = tuple(field.name for field in fields(Forecast))


class SilverMonitor(Callback):
    """Logs how well the preference model of ``data.silver`` predicts each round of real labels before it learns them.

    A rule for settings without an oracle: of two models or scales, take the one with the lower mean of
    ``silver/label_nll`` (prequential validation, Dawid 1984); above ln 2 = 0.693 silver labels mislead. Logged once per
    round: ``silver/label_nll`` in nats, ``silver/label_accuracy``, ``silver/labels_fitted`` and ``silver/kappa``; all
    rounds are in ``silver.csv`` in ``trainer.default_root_dir``. It takes no arguments.
    """

    def __init__(self) -> None:
        self._rows: dict[int, Forecast] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is a preference model.

        Raises:
            ValueError: if ``data.silver`` is not set.
        """
        if stage == "fit" and getattr(getattr(trainer, "datamodule", None), "silver", None) is None:
            raise ValueError("SilverMonitor reports on the preference model of data.silver, which is not set; set it")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the newest round, and write the table."""
        forecast = datamodule_of(trainer, PreferenceDataModule, "SilverMonitor").forecast
        if forecast is None or forecast.round in self._rows:
            return
        self._rows[forecast.round] = forecast
        log_known(
            pl_module,
            {
                "silver/label_nll": forecast.nll,
                "silver/label_accuracy": forecast.accuracy,
                "silver/labels_fitted": float(forecast.fitted),
                "silver/kappa": forecast.kappa,
            },
        )
        if trainer.is_global_zero:
            with (root(trainer) / "silver.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(asdict(self._rows[number]) for number in sorted(self._rows))

    def state_dict(self) -> State:
        """The rounds so far, as plain data."""
        return {"rows": [asdict(row) for row in self._rows.values()]}

    def load_state_dict(self, state_dict: State) -> None:
        """Restore the state of `state_dict`."""
        self._rows = {row["round"]: Forecast(**row) for row in state_dict["rows"]}
