"""DataLoaders that know their place, so that a run continues with the batch it was stopped at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar, cast

from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_rlhf.batching.steps import Step


Item = TypeVar("Item")


class RankSampler(DistributedSampler[Any]):
    """Yields the given indices.

    It is a `DistributedSampler` only so that Lightning, which deals items to ranks itself, sees that this is done.
    """

    def __init__(self, indices: list[int], rank: int = 0, world: int = 1) -> None:
        super().__init__(indices, num_replicas=world, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.indices = indices
        self.start = 0
        """Place of the first index that is yielded."""

    def __iter__(self) -> Iterator[int]:
        """Yield the indices in order."""
        return iter(self.indices[self.start :])

    def __len__(self) -> int:
        """Number of items of this rank."""
        return len(self.indices)


class StepDataset(Dataset[tuple[list[Item], Step]], Generic[Item]):
    """The steps of an epoch with the items of this rank, each made when its turn comes.

    Args:
        items: items of the epoch.
        steps: steps of this rank.
        before: called on every rank with the number of a step before its items are read.
    """

    def __init__(self, items: Sequence[Item], steps: Sequence[Step], before: Callable[[int], None]) -> None:
        self.items, self.steps, self.before = items, steps, before

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, number: int) -> tuple[list[Item], Step]:
        self.before(number)
        step = self.steps[number]
        return [self.items[i] for i in step.indices], step


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
        # cleared at once: later passes over this loader begin at the first batch
        skip, self.skip = self.skip, 0
        self.yielded = skip
        # batches that were handed out before are not made again
        cast(RankSampler, self.sampler).start = skip
        for i, batch in enumerate(super().__iter__(), start=skip):
            # before the yield: a checkpoint that is saved after the step on this batch counts it
            self.yielded = i + 1
            yield batch
        # a checkpoint between two epochs skips nothing
        self.yielded = 0
