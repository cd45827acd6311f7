"""The sequence of a round that all collectors share: sample the missing items, finish the round, read it back."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Generic, Protocol, TypeVar

from lightning_rlhf.collectors.chunks import chunks_without_repeats
from lightning_rlhf.collectors.progress import Progress, count_tokens, silent
from lightning_rlhf.generation import PolicyEngine
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.randomness import Key, Stream
from lightning_rlhf.runtime import distributed
from lightning_rlhf.types import Prompt


class CollectedRound(Protocol):
    """Costs of a round, as a collector fills them in."""

    sampling_seconds: float
    labeling_seconds: float
    labels_bought: int


Source = TypeVar("Source")
Item = TypeVar("Item")
Result = TypeVar("Result", bound=CollectedRound)


class AbstractRoundCollector(ABC, Generic[Source, Item, Result]):
    """Collects rounds through the ledger; an item is all that is sampled for one prompt.

    A run that was killed continues from the ledger: only missing items are sampled and labeled.

    Args:
        store: the ledger; None on ranks other than zero.
        key: key of the run; rounds and purposes are folded in.
        progress: makes progress bars; default: none are shown.
    """

    def __init__(self, store: PreferenceStore | None, key: Key, progress: Progress | None = None) -> None:
        self.store, self.key = store, key
        self._columns: dict[int, Mapping[str, object]] = {}
        self.progress: Progress = progress or silent

    def collect(self, index: int, prompts: Sequence[Prompt], source: Source, chunk: int) -> Result:
        """Finish round ``index``, or read it from the ledger if it is finished.

        Args:
            index: number of the round.
            prompts: prompts of the round, in order.
            source: samples the responses.
            chunk: prompts that are sampled, stored and labeled together, >= 1.
        """
        result = self._new_round(index)
        closed = distributed.from_rank_zero(lambda: self._ledger.round_info(index) is not None)
        start = time.perf_counter()
        if not closed:
            self.sample(index, prompts, source, chunk)
            result.sampling_seconds = time.perf_counter() - start
        start = time.perf_counter()
        self._before_labels(index, prompts)
        if not closed:
            bought = distributed.from_rank_zero(lambda: self._finish(index, len(prompts), chunk))
            # every rank has the number, but only rank zero has paid
            result.labels_bought = bought if self.store is not None else 0
            result.labeling_seconds = time.perf_counter() - start
        # from the ledger also if this process sampled the round: a resumed run trains on the same values
        self._read(result, index)
        return result

    def sample(self, index: int, prompts: Sequence[Prompt], source: Source, chunk: int) -> None:
        """Sample the items of a round that the ledger does not hold yet."""
        # prompts that are read from the ledger have none
        self._note_columns(prompts)
        held = set(distributed.from_rank_zero(lambda: self._held(index)))
        missing = [position for position in range(len(prompts)) if position not in held]
        if not missing:
            return
        engine = self._engine(source)
        with self.progress(f"round {index}: {self._doing(engine)}", len(missing)) as bar:
            if engine is not None:
                engine.on_tokens = count_tokens(bar)
            for repeat, positions in chunks_without_repeats(prompts, missing, chunk):
                key = self.key.fold(Stream.SAMPLING, index, repeat)
                # every rank samples its share; the key folds the prompt, so that results do not depend on the ranks
                mine = [prompts[position] for position in positions[distributed.rank() :: distributed.world_size()]]
                everyone = distributed.interleave(partial(self._sample_chunk, mine, source, key))
                distributed.from_rank_zero(partial(self._keep, index, everyone, positions))
                bar.update(len(positions))

    def _doing(self, engine: PolicyEngine | None) -> str:
        """The work on the items of a round, for its progress bar."""
        return "reading recorded rows" if engine is None else "sampling"

    def _note_columns(self, prompts: Sequence[Prompt]) -> None:
        self._columns = {prompt.index: prompt.columns for prompt in prompts if prompt.columns}

    def _with_columns(self, prompt: Prompt) -> Prompt:
        """A prompt of the ledger, which keeps no columns, with those of its row."""
        columns = self._columns.get(prompt.index)
        return prompt if columns is None else replace(prompt, columns=columns)

    @property
    def _ledger(self) -> PreferenceStore:
        assert self.store is not None  # asked on rank zero
        return self.store

    @abstractmethod
    def _new_round(self, index: int) -> Result:
        """Make an empty round."""

    @abstractmethod
    def _held(self, index: int) -> Iterable[int]:
        """Positions of a round that are in the ledger; on rank zero."""

    @abstractmethod
    def _engine(self, source: Source) -> PolicyEngine | None:
        """The engine that counts tokens for the progress bar; None if nothing is generated."""

    @abstractmethod
    def _sample_chunk(self, prompts: Sequence[Prompt], source: Source, key: Key) -> list[Item]:
        """Sample the items of some prompts, on every rank; ``prompts`` may be empty."""

    def _before_labels(self, index: int, prompts: Sequence[Prompt]) -> None:
        """Called on every rank when all items of a round are in the ledger; nothing by default."""
        del index, prompts

    @abstractmethod
    def _keep(self, index: int, items: Sequence[Item], positions: Sequence[int]) -> None:
        """Write the items of a chunk to the ledger; on rank zero."""

    @abstractmethod
    def _finish(self, index: int, num_prompts: int, chunk: int) -> int:
        """Label the items of a round, close it, and return how many labels were bought; on rank zero."""

    @abstractmethod
    def _read(self, result: Result, index: int) -> None:
        """Fill in a round from the ledger; on every rank."""
