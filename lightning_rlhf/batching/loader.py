"""DataLoaders that know their place, so that a run continues with the batch it was stopped at."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar, cast

from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_rlhf.batching.steps import Step
from lightning_rlhf.runtime.lazy import AbstractLazySequence


Item = TypeVar("Item")

PAGE = 512  # items that `AbstractStoredItems` reads at a time when it is iterated


class AbstractEpochItems(AbstractLazySequence[Item]):
    """Items of an epoch that are made when a batch needs them, and whose lengths are known before."""

    @property
    @abstractmethod
    def lengths(self) -> Sequence[int]:
        """Token positions of each item, known without making it."""


class AbstractStoredItems(AbstractEpochItems[Item]):
    """Items that the ledger holds; every rank must ask for the same ones."""

    @abstractmethod
    def fetch(self, places: Sequence[int]) -> Mapping[int, Item]:
        """Read the items at some places."""

    def make(self, place: int) -> Item:
        """Read the item at a place."""
        return self.fetch([place])[place]

    def make_all(self, places: Sequence[int]) -> list[Item]:
        """Read the items at some places at once."""
        found = self.fetch(places)
        return [found[place] for place in places]

    def __len__(self) -> int:
        """Number of items."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[Item]:
        """Read all items, some hundred at a time."""
        for start in range(0, len(self), PAGE):
            yield from self[start : start + PAGE]


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
        if isinstance(self.items, AbstractStoredItems):
            # those of all ranks: the ledger is read on rank zero, which gives them to the others
            found = self.items.fetch(step.everyone)
            return [found[i] for i in step.indices], step
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
