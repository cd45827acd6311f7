"""Figures of training steps, added up where they are computed and fetched only when they are logged.

Fetching a number from a GPU waits for everything queued there, and adding it up over ranks is a collective: neither is
done in a step that logs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from lightning.pytorch import Trainer
from torch import Tensor


class RunningSums:
    """Sums of named figures over the steps since they were last taken."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Add the figures of a step, scalars; waits for nothing."""
        for name, value in values.items():
            value = value.detach().float() if isinstance(value, Tensor) else value
            self._sums[name] = self._sums.get(name, 0.0) + value

    def take(self, trainer: Trainer) -> dict[str, float]:
        """Add up over ranks, in one reduction, and start again from nothing; every rank must call this."""
        sums, self._sums = self._sums, {}
        device = trainer.strategy.root_device
        total = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in sums.values()])
        if trainer.world_size > 1:
            total = cast(Tensor, trainer.strategy.reduce(total, reduce_op="sum"))
        return dict(zip(sums, total.tolist(), strict=True))


def logs_now(trainer: Trainer) -> bool:
    """Whether Lightning logs the figures of the running training step, by ``log_every_n_steps``; equal on all ranks."""
    # not its own should_update_logs, which ``trainer.should_stop`` also turns on: ranks may learn of that one by one
    steps = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
    every = 1 if trainer.fast_dev_run else trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and steps % every == 0
