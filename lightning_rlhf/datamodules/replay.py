"""Rounds that are trained on again: their pairs stay in the ledger until a batch needs them."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import TypeAlias

from lightning_rlhf.batching.loader import AbstractStoredItems
from lightning_rlhf.collectors.reference_logps import reference_version
from lightning_rlhf.generation import PolicyEngine
from lightning_rlhf.ledger.labeled import LabeledTable, StoredRound
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.types import Preference


ReplayedRound: TypeAlias = Sequence[Preference] | StoredRound
"""Pairs of a round: in memory, or in the ledger."""


class ReplayedPairs(AbstractStoredItems[Preference]):
    """The pairs of some rounds, one round after the other.

    Memory per pair of a round in the ledger is a few numbers, so that a run may replay a million of them.

    Args:
        rounds: the rounds, oldest first.
        read: reads the pairs with some numbers, in order; on every rank.
        length: token positions of a pair in memory.
    """

    def __init__(
        self,
        rounds: Sequence[ReplayedRound],
        *,
        read: Callable[[Sequence[int]], list[Preference]],
        length: Callable[[Preference], int],
    ) -> None:
        self.rounds, self.read = list(rounds), read
        # places of round i are ends[i], ..., ends[i + 1] - 1
        self._ends = [0, *accumulate(map(len, self.rounds))]
        self._lengths = array("q")
        for pairs in self.rounds:
            self._lengths.extend(pairs.tokens if isinstance(pairs, StoredRound) else map(length, pairs))

    @property
    def lengths(self) -> Sequence[int]:
        """Token positions of each pair, its prompt counted once."""
        return self._lengths

    def fetch(self, places: Sequence[int]) -> Mapping[int, Preference]:
        """Read the pairs at some places; those in the ledger with one query."""
        found: dict[int, Preference] = {}
        wanted: dict[int, int] = {}
        for place in places:
            number = bisect_right(self._ends, place) - 1
            pairs, inner = self.rounds[number], place - self._ends[number]
            if isinstance(pairs, StoredRound):
                wanted[place] = pairs.ids[inner]
            else:
                found[place] = pairs[inner]
        if wanted:
            found |= dict(zip(wanted, self.read(list(wanted.values())), strict=True))
        return found


def stored_round(store: PreferenceStore, index: int) -> StoredRound | None:
    """The pairs of a round in the ledger; None if the round is not closed."""
    return None if store.round_info(index) is None else LabeledTable(store).round(index)


def is_stale(stored: StoredRound, engine: PolicyEngine | None) -> bool:
    """Whether reference log-probabilities in the ledger are not those of the reference of this engine."""
    return engine is not None and stored.is_stale(reference_version(engine))
