"""One labeler in many processes: chunks of pairs are labeled by the workers of an executor."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from functools import lru_cache

from lightning_rlhf.labelers.base import AbstractLabeler, Answer, Question
from lightning_rlhf.randomness import Key
from lightning_rlhf.runtime import preemption
from lightning_rlhf.runtime.executors import ATTEMPTS, submitted, worker_error
from lightning_rlhf.runtime.plugins import returned
from lightning_rlhf.types import Comparison, Label


IN_FLIGHT = 256
"""Chunks that are given to the executor at a time."""


@dataclass
class _Chunk:
    """Questions from ``start`` on."""

    start: int
    comparisons: Sequence[Comparison]
    future: Future[list[Label] | str]


class SpreadLabeler(AbstractLabeler):
    """Labels the pairs of a round chunk by chunk in the workers of an executor; the labels are those of one process.

    A worker loads the labeler once. A chunk whose worker is lost is labeled by another one.

    Args:
        labeler: labels a chunk; it must pickle, and answer each chunk by itself.
        executor: runs the chunks.
        chunk: pairs that are labeled at once, >= 1.

    Raises:
        ValueError: if the labeler asks about whole rounds, or does not pickle.
    """

    whole_rounds = True

    def __init__(self, labeler: AbstractLabeler, executor: Executor, chunk: int) -> None:
        name = type(labeler).__name__
        if labeler.whole_rounds:
            raise ValueError(f"{name} asks about all pairs at once, which cannot be spread: leave out --processes")
        try:
            self._pickled = pickle.dumps(labeler)
        # whatever a user's own class raises
        except Exception as error:
            raise ValueError(f"{name} does not pickle ({error}), as workers need: leave out --processes") from error
        self.labeler, self.executor, self.chunk = labeler, executor, chunk

    def label(self, comparisons: Sequence[Comparison], key: Key) -> list[Label]:
        """Label comparisons in this process."""
        return self.labeler.label(comparisons, key)

    def stream(self, questions: Sequence[Question], answered: int, key: Key) -> Iterator[list[tuple[int, Answer]]]:
        """Answer chunk after chunk, in order, so that the ledger is that of one process.

        Raises:
            RuntimeError: at the end, if chunks have no labels; those of the other chunks are in the ledger.
        """
        del answered
        pairs = [question.comparison for question in questions]
        starts = deque(range(0, len(pairs), self.chunk))
        flying: deque[_Chunk] = deque()
        failed: list[str] = []
        try:
            while starts or flying:
                preemption.check()
                while starts and len(flying) < IN_FLIGHT:
                    part = pairs[starts[0] : starts[0] + self.chunk]
                    flying.append(_Chunk(starts.popleft(), part, self._submit(part, key)))
                first = flying.popleft()
                labels = self._result(first, key)
                if isinstance(labels, str):
                    failed.append(f"pairs {first.start + 1} to {first.start + len(first.comparisons)}: {labels}")
                    continue
                made = returned(self.labeler, "label", labels, len(first.comparisons), Label, "comparisons")
                yield [(first.start + place, Answer(label)) for place, label in enumerate(made)]
        finally:
            for left in flying:
                left.future.cancel()
        if failed:
            raise RuntimeError(
                f"{len(failed)} chunks have no labels, and the same command asks for them again; {failed[0]}"
            )

    def _submit(self, comparisons: Sequence[Comparison], key: Key) -> Future[list[Label] | str]:
        return submitted(self.executor.submit, label_chunk, self._pickled, comparisons, key)

    def _result(self, chunk: _Chunk, key: Key) -> list[Label] | str:
        """Labels of a chunk, or the reason why there are none."""
        future, text = chunk.future, ""
        for attempt in range(ATTEMPTS):
            if attempt:
                future = self._submit(chunk.comparisons, key)
            wait([future])
            error = worker_error(future)
            if error is None:
                return future.result()
            text = f"the worker was lost ({type(error).__name__}: {error})"
        return text


@lru_cache(maxsize=1)
def _unpickled(pickled: bytes) -> AbstractLabeler:
    labeler: AbstractLabeler = pickle.loads(pickled)
    return labeler


def label_chunk(pickled: bytes, comparisons: Sequence[Comparison], key: Key) -> list[Label] | str:
    """Label a chunk in a worker; an error of the labeler is returned as a text, since the worker is not to blame."""
    try:
        # a judge that has been loaded stays in the memory of the worker
        return _unpickled(pickled).label(comparisons, key)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
