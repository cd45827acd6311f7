"""The progress of training: a bar without the noise, or a line per logged step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from lightning_rlhf.runtime.metric_sums import logs_now


class ProgressBar(TQDMProgressBar):
    """Show loss and epoch while training; the DataModule adds a bar of its own while it samples and labels."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Metrics beside the bar: without the logger's version, which says nothing about this run."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


class StepLines(Callback):
    """Prints a line for each logged step, with the metrics of the progress bar: for logs, and consoles without a bar.

    A line has the step, the epoch, the metrics that a bar would show, the norm of the gradient and the learning rate;
    after a validation there is one with its metrics. The command line adds it with
    ``trainer.enable_progress_bar=false``. It takes no arguments.
    """

    OTHERS = ("train/grad_norm",)
    """Metrics that no bar has room for."""

    HELD_OUT = ("val/loss", "val/accuracy", "val/reward", "val/objective/kl", "val/objective/j")

    def __init__(self) -> None:
        self._due = False
        self._rates: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Keep the learning rate of the step: a schedule has moved on when the line is printed."""
        self._rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Print the line of a step, unless metrics of its epoch are still to come."""
        self._due = logs_now(trainer)
        if self._due and not trainer.is_last_batch:
            self._print_step(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line of the last step, with the metrics of the epoch."""
        if self._due:
            self._print_step(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the metrics of held-out rows."""
        metrics = trainer.callback_metrics
        known = {name: float(metrics[name]) for name in self.HELD_OUT if name in metrics}
        if known and not trainer.sanity_checking:
            self._print(trainer, known)

    def _print_step(self, trainer: Trainer) -> None:
        metrics = trainer.callback_metrics
        shown = [name for name in trainer.progress_bar_metrics if name != "v_num" and name in metrics]
        values = {name: float(metrics[name]) for name in [*shown, *self.OTHERS] if name in metrics}
        # the first group is the policy, a value model has another one
        self._print(trainer, {**values, **({"lr": self._rates[0]} if self._rates else {})})
        self._due = False

    def _print(self, trainer: Trainer, values: Mapping[str, float]) -> None:
        if trainer.is_global_zero:
            text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            # flushed: a log is watched while it grows
            print(f"step {trainer.global_step}, epoch {trainer.current_epoch}: {text}", flush=True)
