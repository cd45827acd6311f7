"""Memory of closed rounds for labelers: read when it is asked for, and every label once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TypeVar

from lightning_rlhf.annotation.votes import Vote
from lightning_rlhf.labelers.base import Memory
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.runtime.lazy import AbstractLazySequence
from lightning_rlhf.types import Label


Item = TypeVar("Item")
Pair = tuple[int, int]


class LedgerMemory:
    """Labels and votes of the rounds of a ledger, kept from one round to the next.

    A round reads the labels that were new in it, so that its time does not grow with the length of the run.
    """

    def __init__(self) -> None:
        self._overlap: list[tuple[Label, Label]] = []
        self._votes: dict[int, tuple[Pair, Vote]] = {}
        self._read = {"overlap": 0, "votes": 0}

    def upto(self, store: PreferenceStore, upto: int) -> Memory:
        """The memory at a label attempt; most labelers never look at it, and then nothing is read.

        Args:
            store: the ledger, the same in every call.
            upto: number of the newest attempt that counts, not below that of an earlier call.
        """
        return Memory(
            _WhenAsked(lambda: self._read_overlap(store, upto)), _WhenAsked(lambda: self._read_votes(store, upto))
        )

    def _read_overlap(self, store: PreferenceStore, upto: int) -> Sequence[tuple[Label, Label]]:
        self._overlap += store.overlap(upto, self._read["overlap"])
        self._read["overlap"] = upto
        return self._overlap

    def _read_votes(self, store: PreferenceStore, upto: int) -> Sequence[tuple[Pair, Vote]]:
        self._votes |= store.labeled_votes(upto, self._read["votes"])
        self._read["votes"] = upto
        # a vote may be older than the label of its pair: in the order of the votes, as a restart reads them
        self._votes = dict(sorted(self._votes.items()))
        return list(self._votes.values())


class _WhenAsked(AbstractLazySequence[Item]):
    """A sequence that is read at its first use."""

    def __init__(self, read: Callable[[], Sequence[Item]]) -> None:
        self._read_all = read

    @cached_property
    def _items(self) -> Sequence[Item]:
        return self._read_all()

    def __len__(self) -> int:
        return len(self._items)

    def make(self, place: int) -> Item:
        return self._items[place]
