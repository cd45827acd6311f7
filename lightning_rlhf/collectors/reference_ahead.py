"""Reference log-probabilities of recorded pairs, computed some steps before the pairs are trained on.

A run of a few steps on many rows then scores the rows of these steps. Values are kept in the ledger, so that a
continued run and later epochs read them again, to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lightning_rlhf.batching.steps import EpochPlan
from lightning_rlhf.collectors.reference_logps import with_reference_logps
from lightning_rlhf.generation import PolicyEngine
from lightning_rlhf.ledger.recorded import RecordedTable
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.models.reference_cache import ReferenceCache
from lightning_rlhf.runtime import distributed, preemption
from lightning_rlhf.types import Preference


ReferenceTime = Literal["ahead", "all", "live"]

WINDOW = 64
"""Steps that are scored together, ahead of the first of them."""
CHUNKS = 64
"""Chunks that are kept in one transaction where all pairs are scored at once."""


def is_late(when: ReferenceTime, steps: float) -> bool:
    """Whether the pairs of an epoch of so many steps are scored in parts, each before its own steps."""
    return when == "live" or (when == "ahead" and steps > WINDOW)


class ReferenceScorer:
    """Scores the pairs of a round under the reference.

    Which pairs are scored together depends on neither the end of the run nor its interruptions, so that a continued run
    computes the same bits.

    Args:
        pairs: the pairs of the round, equal on all ranks.
        index: number of the round.
        store: the ledger; None on ranks other than zero.
        when: ``ahead``, ``all`` or ``live``; `WINDOW` steps or fewer are scored at once in any case but ``live``.
        chunk: pairs that all ranks score together, >= 1.
        engine: makes the engine; a context in which sharded models are whole, which every rank enters.
        cache: reference log-probabilities on disk; default: none.
    """

    def __init__(
        self,
        pairs: Sequence[Preference],
        index: int,
        store: PreferenceStore | None,
        when: ReferenceTime,
        chunk: int,
        engine: Callable[[], AbstractContextManager[PolicyEngine]],
        cache: ReferenceCache | None = None,
    ) -> None:
        self.pairs, self.index, self.store, self.when, self.chunk = pairs, index, store, when, chunk
        self._engine, self.cache = engine, cache
        self.totals: NDArray[np.float64] = distributed.from_rank_zero(self._kept)
        """log pi_ref of responses a and b, summed over tokens, nats, NaN where it was not computed; [pairs, 2]."""
        self._steps: EpochPlan | None = None
        self._ready = 0

    def prepare(self, steps: EpochPlan, number: int, last: int) -> None:
        """Score the pairs of a step, and of those ahead of it, unless it is done; every rank must call.

        Args:
            steps: steps of the epoch.
            number: the step, from 0.
            last: the step before which the run will end, as far as it is known.
        """
        if steps is not self._steps:
            # another epoch has another order
            self._steps, self._ready = steps, 0
        if number < self._ready:
            return
        units, self._ready = self._due(steps, number, last)
        with self._engine() as engine:
            for unit in units:
                self._score(unit, engine)

    def _due(self, steps: EpochPlan, number: int, last: int) -> tuple[Iterator[list[list[int]]], int]:
        """Pairs to score, in chunks, in units that are kept together; and the first step that is not among them."""
        if self.when == "live":
            # nothing is kept: each epoch scores its pairs again
            return iter([self._chunks(sorted(steps.pairs(number)))]), number + 1
        if not is_late(self.when, len(steps)):
            # in the order of the round, in which rounds that are sampled are scored
            return self._whole_round(), len(steps)
        # units of whole steps that fill a chunk, counted from the beginning of the epoch
        size = max(-(-self.chunk // steps.pairs_per_step), 1)
        first = number // size * size
        end = min(first + -(-WINDOW // size) * size, -(-last // size) * size)
        starts = range(first, max(end, first + size), size)
        return (self._unknown(steps.pairs(start, size)) for start in starts), starts[-1] + size

    def _whole_round(self) -> Iterator[list[list[int]]]:
        pairs = len(self.pairs)
        for start in range(0, pairs, self.chunk * CHUNKS):
            chunks = self._chunks(range(start, min(start + self.chunk * CHUNKS, pairs)))
            unit = [[place for place in chunk if self._is_unknown(place)] for chunk in chunks]
            if any(unit):
                # nothing is lost here: the units before this one are in the ledger
                preemption.check()
            yield unit

    def _unknown(self, places: Sequence[int]) -> list[list[int]]:
        return self._chunks(sorted(place for place in places if self._is_unknown(place)))

    def _is_unknown(self, place: int) -> bool:
        return math.isnan(self.totals[place, 0])

    def _chunks(self, places: Sequence[int]) -> list[list[int]]:
        return [list(places[start : start + self.chunk]) for start in range(0, len(places), self.chunk)]

    def _score(self, unit: Sequence[Sequence[int]], engine: PolicyEngine) -> None:
        """Score the chunks of a unit, each on all ranks, and keep the values."""
        done: list[int] = []
        rank, world = distributed.rank(), distributed.world_size()
        for places in filter(None, unit):
            mine = places[rank::world]
            self.totals[places] = distributed.interleave(partial(self._totals, mine, engine))
            done += places
        if done and self.when != "live":
            distributed.from_rank_zero(partial(self._keep, np.array(done, np.int32)))

    def _totals(self, places: Sequence[int], engine: PolicyEngine) -> list[tuple[float, float]]:
        comparisons = [self.pairs[place].comparison for place in places]
        scored = with_reference_logps(comparisons, engine, self.cache)
        # fsum rounds once, as in `collate_preferences`
        return [(math.fsum(c.a.reference_logps or ()), math.fsum(c.b.reference_logps or ())) for c in scored]

    def _keep(self, places: NDArray[np.int32]) -> None:
        assert self.store is not None
        RecordedTable(self.store).add_reference_logps(self.index, places, self.totals[places])

    def _kept(self) -> NDArray[np.float64]:
        assert self.store is not None
        return RecordedTable(self.store).reference_logps(self.index, len(self.pairs))
