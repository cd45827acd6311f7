"""Callbacks that every module of this package brings along, so that a stopped run continues exactly."""

from __future__ import annotations

import lightning as L
import torch

from lightning_rlhf.randomness import Key, Stream
from lightning_rlhf.runtime.resume import forget_finished_epoch


class SeedDropout(L.Callback):
    """Seeds dropout by the optimizer step and the rank, so that a resumed run continues as if it had not stopped."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Seed torch's global generator, from which dropout samples its masks."""
        del pl_module, batch, batch_idx
        step = trainer.fit_loop.total_batch_idx
        # a run on a plain DataLoader has no DataModule with a seed
        seed = getattr(getattr(trainer, "datamodule", None), "seed", 0)
        torch.manual_seed(Key((seed, Stream.DROPOUT, step, trainer.global_rank)).seed())


class RepairFinishedEpoch(L.Callback):
    """Repairs checkpoints that were saved at the end of an epoch before Lightning restores its loops from them."""

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, object]
    ) -> None:
        """Repair the checkpoint in memory; see `forget_finished_epoch`."""
        del pl_module
        forget_finished_epoch(checkpoint, trainer.max_steps)
