"""Validate at the end of a run, so that its report is about the final policy."""

from __future__ import annotations

import math

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_rlhf.callbacks.reporting import preference_source
from lightning_rlhf.protocols import PricedSource


class FinalValidation(Callback):
    """Validates at the end of the last epoch, whatever ``trainer.check_val_every_n_epoch`` says.

    The last epoch is the one that reaches ``max_epochs`` or ``max_steps``, or that spends the budget of `LabelBudget`.
    A run that something else stops, such as `EarlyStopping` or a signal, ends with the latest regular validation.
    """

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask for a validation in this epoch if no other follows."""
        if is_last_epoch(trainer):
            trainer.check_val_every_n_epoch = 1
            if trainer.max_steps != -1:
                # the steps may be used up before the batches are
                left = (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
                trainer.val_check_batch = min(trainer.val_check_batch or left, left)


def is_last_epoch(trainer: Trainer) -> bool:
    """Whether the epoch that begins is the last; every rank must ask."""
    if trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= (trainer.max_epochs or 0):
        return True
    # optimizer steps of this epoch; the last one may accumulate fewer batches
    steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    if trainer.max_steps != -1 and trainer.global_step + steps >= trainer.max_steps:
        return True
    source = preference_source(trainer)
    if not source.ends_round(trainer.current_epoch):
        return False
    # collective calls: every rank asks, since every rank has the same budgets
    if source.label_budget is not None and source.num_labels >= source.label_budget:
        return True
    return isinstance(source, PricedSource) and source.cost_budget is not None and source.cost() >= source.cost_budget
