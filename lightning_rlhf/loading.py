"""Order and position of training pairs: pure functions of seed and epoch, and a loader that remembers where it was."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler

from lightning_rlhf.randomness import Key


def epoch_order(count: int, key: Key) -> list[int]:
    """Permutation of ``range(count)`` that the key alone decides."""
    return torch.randperm(count, generator=key.generator()).tolist()


def deal(order: list[int], pairs_per_batch: int, rank: int, world: int) -> list[tuple[int, float]]:
    """Deal an order of pairs to the ranks, batch by batch.

    Each global batch of ``pairs_per_batch`` items is dealt to the ranks in turn, so that one process and many compute
    the same global batches and every pair is used exactly once.

    Returns:
        For each item of this rank, its index and the number of pairs in its global batch per rank. The loss of a rank
        is its sum over pairs divided by that number: the average over ranks, which DDP takes, is the mean over pairs.
    """
    mine: list[tuple[int, float]] = []
    for start in range(0, len(order), pairs_per_batch):
        batch = order[start : start + pairs_per_batch]
        mine.extend((index, len(batch) / world) for index in batch[rank::world])
        if rank >= len(batch):
            # every rank must take the step: this one does it with a pair that counts for nothing
            mine.append((batch[0], math.inf))
    return mine


def forget_finished_epoch(checkpoint: dict[str, Any]) -> None:
    """Mend, before it is restored, a Lightning checkpoint that was saved when the batches of an epoch were done.

    Lightning 2.6 takes up such an epoch once more: it asks for its loader again, with ``max_steps`` it runs an empty
    epoch and counts it, and it compares the batches done with the length of the *next* epoch, so that it skips as many
    batches of a next round that is longer.
    """
    if "loops" not in checkpoint:  # saved with weights only
        return
    fit_loop = checkpoint["loops"]["fit_loop"]
    epochs, batches = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    if epochs["total"]["processed"] == epochs["total"]["started"]:  # saved at the end of the epoch, or after it
        for count in (epochs["total"], epochs["current"]):
            count["completed"] = count["processed"]
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False
        fit_loop["state_dict"].pop("combined_loader", None)
    elif batches["is_last_batch"]:  # saved at the end of its last batch
        batches["current"]["completed"] = sys.maxsize - 1


class RankSampler(DistributedSampler[Any]):
    """Yields the given indices.

    It is a `DistributedSampler` only so that Lightning, which deals items to ranks itself, sees that this is done.
    """

    def __init__(self, indices: list[int], rank: int = 0, world: int = 1) -> None:
        super().__init__(indices, num_replicas=world, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.indices = indices

    def __iter__(self) -> Iterator[int]:
        """Yield the indices in order."""
        return iter(self.indices)

    def __len__(self) -> int:
        """Number of items of this rank."""
        return len(self.indices)


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that continues in the middle of an epoch; Lightning stores and restores its state."""

    yielded = 0
    skip = 0

    def state_dict(self) -> dict[str, int]:
        """Number of batches that were handed out."""
        return {"yielded": self.yielded}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Skip the batches that were handed out before, once."""
        self.skip = state["yielded"]

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Iterate from the restored position."""
        skip, self.skip = self.skip, 0
        self.yielded = skip
        for i, batch in enumerate(super().__iter__()):
            if i >= skip:
                self.yielded = i + 1
                yield batch
        self.yielded = 0
