"""Sequences whose items are made or read when they are asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar, overload


Item = TypeVar("Item")


class AbstractLazySequence(Sequence[Item]):
    """A sequence that keeps no items. Subclasses say its length, and make an item."""

    @abstractmethod
    def make(self, place: int) -> Item:
        """Make the item at a place, 0 <= place < len."""

    def make_all(self, places: Sequence[int]) -> list[Item]:
        """Make the items at some places; for subclasses that read many at once."""
        return [self.make(place) for place in places]

    @overload
    def __getitem__(self, place: int) -> Item: ...

    @overload
    def __getitem__(self, place: slice) -> list[Item]: ...

    def __getitem__(self, place: int | slice) -> Item | list[Item]:
        """Make one item, or a part of them."""
        # a range knows negative places, slices, and places out of range
        chosen = range(len(self))[place]
        return self.make(chosen) if isinstance(chosen, int) else self.make_all(chosen)
