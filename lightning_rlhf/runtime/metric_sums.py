"""Metrics of training steps, summed on their device and fetched only when they are logged.

Fetching a number from a GPU waits for all queued kernels, and a sum over ranks is a collective: a step without logging
does neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from lightning.pytorch import Trainer
from torch import Tensor


class RunningSums:
    """Sums of named metrics over the steps since the last `take`."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Add the metrics of a step, scalars, without waiting for the device."""
        for name, value in values.items():
            # without detach the graph of each step would stay in memory; bfloat16 would round the sums
            value = value.detach().float() if isinstance(value, Tensor) else value
            self._sums[name] = self._sums.get(name, 0.0) + value

    def take(self, trainer: Trainer) -> dict[str, float]:
        """Sum over ranks, in one reduction, and reset; every rank must call."""
        sums, self._sums = self._sums, {}
        device = trainer.strategy.root_device
        # [metrics]: one reduction and one wait for the device serve all of them
        total = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in sums.values()])
        if trainer.world_size > 1:
            total = cast(Tensor, trainer.strategy.reduce(total, reduce_op="sum"))
        return dict(zip(sums, total.tolist(), strict=True))


def logs_now(trainer: Trainer) -> bool:
    """Whether Lightning logs the metrics of the current training step, by ``log_every_n_steps``; equal on all ranks."""
    # not its own should_update_logs, which ``trainer.should_stop`` also turns on: ranks may learn of that one by one
    # Lightning counts a step after the hooks of its batch
    steps = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
    every = 1 if trainer.fast_dev_run else trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and steps % every == 0
