"""DataLoaders that know their place, so that a run continues with the batch it was stopped at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler


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
        # cleared at once: later passes over this loader begin at the first batch
        skip, self.skip = self.skip, 0
        self.yielded = skip
        for i, batch in enumerate(super().__iter__()):
            if i >= skip:
                # before the yield: a checkpoint that is saved after the step on this batch counts it
                self.yielded = i + 1
                yield batch
        # a checkpoint between two epochs skips nothing
        self.yielded = 0
