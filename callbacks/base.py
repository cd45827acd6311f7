"""One validation epoch as rows, one per held-out answer, and their means; shared by the callbacks that report on it.

Rows are gathered and then averaged, rather than averaged on each rank: the distributed sampler repeats prompts to give
every rank as many, and only whole rows show which came twice. So one process and many report the same numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_rlhf.evaluation.heldout import HeldOutRow, held_out_rows
from lightning_rlhf.runtime import distributed


class HeldOut:
    """Collects the rows of one validation epoch, on every rank its own until `gather`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all rows: a new validation epoch begins."""
        self._rows: list[HeldOutRow] = []
        self._seen: Counter[tuple[int, int]] = Counter()

    def update(self, output: Any, loader: int = 0) -> None:
        """Take in one output of ``validation_step``; None, from a module that decodes nothing, is skipped."""
        if output is not None:
            self._rows += held_out_rows(output, self._seen, loader)

    def gather(self) -> list[HeldOutRow]:
        """All rows of all ranks, each once, in the order of their keys; every rank must call this."""
        # by key: the distributed sampler repeats prompts so that every rank has as many
        rows = {row.key: row for row in distributed.interleave(lambda: self._rows)}
        return [rows[key] for key in sorted(rows)]


class HeldOutCallback(Callback, ABC):
    """A callback that reports on each validation epoch: subclasses say how, in `on_held_out`."""

    def __init__(self) -> None:
        self._held_out = HeldOut()

    @abstractmethod
    def on_held_out(self, trainer: Trainer, pl_module: LightningModule, rows: list[HeldOutRow]) -> None:
        """Report on a validation epoch; called on every rank with the same rows, never for the sanity check."""

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with no rows."""
        self._held_out.reset()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the rows of the batch."""
        if not trainer.sanity_checking:
            self._held_out.update(outputs, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the rows of all ranks and report."""
        if trainer.sanity_checking:
            return
        rows = self._held_out.gather()
        self._held_out.reset()
        # all ranks hold the same rows, so that either all or none report, and collectives do not hang
        if rows:
            self.on_held_out(trainer, pl_module, rows)
