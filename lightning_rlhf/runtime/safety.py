"""Requirements of a run on its Trainer: callbacks that are added, and settings that are refused."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.utilities import rank_zero_info

from lightning_rlhf.callbacks.nonfinite import NonFiniteGuard


def essential_callbacks(trainer: L.Trainer) -> list[L.Callback]:
    """Callbacks that a run must have and the Trainer lacks: `NonFiniteGuard`, which keeps NaN from the weights."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [] if any(isinstance(callback, NonFiniteGuard) for callback in callbacks) else [NonFiniteGuard()]


def check_trainer(trainer: L.Trainer) -> None:
    """Check for settings of a Trainer that would waste the cost of rounds.

    Raises:
        ValueError: if a callback would train on rounds only to throw the result away.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, LearningRateFinder | BatchSizeFinder):
            raise ValueError(
                f"{type(callback).__name__} would sample and label rounds for steps that it undoes: take it out, and "
                f"set model.optimizer.lr, or data.batching.max_tokens_per_micro_batch to a number that fits into memory"
            )
    # debug modes cut rounds on purpose
    limit = trainer.limit_train_batches
    if trainer.fast_dev_run or trainer.overfit_batches or limit is None:  # type: ignore[attr-defined]
        return
    # the float 1.0 stands for all batches; 1 is a single one
    if isinstance(limit, int) or limit < 1:
        rank_zero_info(
            f"trainer.limit_train_batches={limit}: pairs that are sampled and labeled beyond these batches of a "
            f"round are not used; a smaller data.rounds.prompts_per_round costs less"
        )
