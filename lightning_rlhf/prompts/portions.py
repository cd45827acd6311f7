"""Rows to the columns of a table, portion by portion, in this process or in several.

A portion depends on its rows and on their place in the data set alone, so that a table is the same however many
processes made it. They are forked: a child has the tokenizer, and the pieces of text that it knows, without a copy.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.ledger.row_digest import digest_of_row, encoded_columns
from lightning_rlhf.prompts.encode import TEXTS_AT_ONCE, TextEncoder
from lightning_rlhf.prompts.tokenize import TokenLimits, tokenized
from lightning_rlhf.runtime.children import follow_parent
from lightning_rlhf.types import NO_RESPONSE, FinishReason, Message, Prompt, PromptRow, Response


if TYPE_CHECKING:
    import pyarrow


ROWS_PER_PROCESS = 5_000
"""Rows for which a process is worth its start; as many are tokenized before any is started."""


class NotStorableError(Exception):
    """A row holds an object that JSON does not give back as it was."""


class More(TypedDict, total=False):
    """Parts of a prompt that many rows do not have, as JSON in one column."""

    messages: list[Message]
    template_options: dict[str, object]
    subset: str
    columns: dict[str, object]
    recorded: NotRequired[list[str]]
    reasons: NotRequired[list[FinishReason]]
    is_completion: bool


@dataclass(frozen=True)
class Tokenization:
    """How rows become tokens, as `tokenized` takes it.

    Args:
        tokenizer: tokenizer of the policy.
        limits: limits of prompts and responses.
        system_prompt: system message for conversations that have none.
        end_ids: token ids at which generation stops.
        chat: take a plain prompt as the user's turn of a conversation.
    """

    tokenizer: PreTrainedTokenizerBase
    limits: TokenLimits
    system_prompt: str | None
    end_ids: tuple[int, ...]
    chat: bool

    @cached_property
    def encoder(self) -> TextEncoder:
        """Keeps the pieces of text that it knows from one portion to the next."""
        return TextEncoder(self.tokenizer)

    def prompts(self, rows: Iterable[PromptRow], counts: Counter[str], first: int = 0) -> Iterator[Prompt]:
        """Tokenize rows one after another; the first one has the number ``first`` in its data set."""
        return tokenized(
            rows,
            self.tokenizer,
            self.limits,
            counts=counts,
            system_prompt=self.system_prompt,
            end_ids=self.end_ids,
            chat=self.chat,
            encoder=self.encoder,
            first=first,
        )


@dataclass(frozen=True)
class Portion:
    """Rows of a table, and counts over them.

    Args:
        batch: columns, see `schema`.
        lengths: tokens of the prompt, of the first and of the second response, 0 where there is none; [rows, 3].
        digests: digests of the rows, see `RowHasher.add_digests`.
        columns: other columns of the rows as JSON, in the same order.
        column_names: names of these columns.
        counts: rows with ``messages``, ``pairs``, ``singles`` and ``ties``.
        left_out: rows that were dropped or truncated, by reason.
        read: rows that were tokenized, with those that were dropped.
    """

    batch: pyarrow.RecordBatch
    lengths: NDArray[np.int32]
    digests: list[bytes]
    columns: bytes
    column_names: list[str]
    counts: Counter[str]
    left_out: Counter[str]
    read: int


def schema() -> pyarrow.Schema:
    """Columns of a table."""
    # takes a second to import
    import pyarrow

    texts, ids = pyarrow.binary(), pyarrow.list_(pyarrow.int32())
    kinds = {"index": pyarrow.int64(), "ids": ids, "text": texts, "a_ids": ids, "a_text": texts, "b_ids": ids}
    kinds |= {"b_text": texts, "probability": pyarrow.float64(), "weight": pyarrow.float64(), "more": texts}
    return pyarrow.schema(list(kinds.items()))


def portions(rows: Iterable[PromptRow], how: Tokenization, workers: int | None) -> Iterator[Portion]:
    """Tokenize rows in portions, in the order of the rows.

    Args:
        rows: rows of a prompt source.
        how: how rows become tokens.
        workers: number of processes, >= 1; default: one per core for many rows, with this one alone for the first
            `ROWS_PER_PROCESS` rows.

    Raises:
        ValueError: as `tokenized` does.
        RuntimeError: if a process is killed, naming the rows.
    """
    stream, first = iter(rows), 0
    alone = ROWS_PER_PROCESS if workers is None else 0
    workers = most_workers() if workers is None else workers
    while (workers == 1 or first < alone) and (part := list(islice(stream, TEXTS_AT_ONCE))):
        yield portion_of(part, how, first)
        first += len(part)
    if workers > 1 and (part := list(islice(stream, TEXTS_AT_ONCE))):
        yield from _in_processes(part, stream, how, first, workers)


def most_workers() -> int:
    """Number of processes by default: the cores of this process; one where processes cannot be forked."""
    # a daemon may have no children
    if "fork" not in multiprocessing.get_all_start_methods() or multiprocessing.current_process().daemon:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    return max(1, cores // ranks)


def portion_of(rows: Sequence[PromptRow], how: Tokenization, first: int) -> Portion:
    """Tokenize rows, of which the first one has the number ``first`` in its data set.

    Raises:
        NotStorableError: if a row holds an object that JSON does not give back.
    """
    import pyarrow

    left_out = Counter[str]()
    prompts = list(how.prompts(rows, left_out, first))
    cells = [_encode(prompt) for prompt in prompts]
    fields = schema()
    # cells -> columns
    columns = list(zip(*cells, strict=True)) or [()] * len(fields)
    arrays = [pyarrow.array(column, field.type) for column, field in zip(columns, fields, strict=True)]
    names, counts = dict[str, None](), Counter[str]()
    for prompt in prompts:
        names |= dict.fromkeys(prompt.columns)
        counts["messages"] += prompt.messages is not None
        counts["pairs"] += prompt.pair is not None
        counts["singles"] += prompt.is_single
        counts["ties"] += has_equal_responses(prompt)
    return Portion(
        pyarrow.record_batch(arrays, schema=fields),
        np.array([_token_counts(prompt) for prompt in prompts], np.int32).reshape(-1, 3),
        [digest_of_row(prompt) for prompt in prompts],
        b"".join(encoded_columns(prompt.columns) for prompt in prompts),
        list(names),
        counts,
        left_out,
        len(rows),
    )


def has_equal_responses(prompt: Prompt) -> bool:
    """Whether the two recorded responses of a prompt are a tie, as `Comparison.has_equal_responses` says it."""
    if prompt.pair is None or prompt.is_single:
        return False
    a, b = prompt.pair
    return a.ids == b.ids or (a.text == b.text and "\ufffd" not in a.text)


# -- processes ---------------------------------------------------------------------------------------------------------

_inherited: list[Tokenization] = []
"""Settings for child processes, by place; children are forked after the settings are appended."""


def _in_processes(
    part: list[PromptRow], stream: Iterator[PromptRow], how: Tokenization, first: int, workers: int
) -> Iterator[Portion]:
    """Portions of ``part`` and of the rows behind it, from several processes."""
    _inherited.append(how)
    context = multiprocessing.get_context("fork")
    place = len(_inherited) - 1
    pool = ProcessPoolExecutor(workers, context, _begin)
    running: deque[tuple[list[PromptRow], Future[Portion]]] = deque()
    try:
        with _single_threads():
            while part or running:
                # two per process: one that it works on, and one that waits
                while part and len(running) < 2 * workers:
                    running.append((part, pool.submit(_work, place, part, first)))
                    first += len(part)
                    part = list(islice(stream, TEXTS_AT_ONCE))
                yield _result(running)
    finally:
        pool.shutdown(cancel_futures=True)
        _inherited.pop()


def _result(running: deque[tuple[list[PromptRow], Future[Portion]]]) -> Portion:
    rows, future = running[0]
    try:
        portion = future.result()
    except BrokenProcessPool as error:
        last = running[-1][0][-1]
        raise RuntimeError(
            f"a process was killed, perhaps for want of memory, while it tokenized rows from {rows[0].source} to "
            f"{last.source}: set data.prompt_options.workers to fewer processes (1 is this one alone)"
        ) from error
    running.popleft()
    return portion


def _begin() -> None:
    """Begin the life of a child."""
    threading.Thread(target=follow_parent, daemon=True).start()


def _work(place: int, rows: Sequence[PromptRow], first: int) -> Portion:
    return portion_of(rows, _inherited[place], first)


@contextmanager
def _single_threads() -> Iterator[None]:
    """Let the tokenizers of children use one thread each; without this the library warns in every child."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


# -- cells -------------------------------------------------------------------------------------------------------------


def _token_counts(prompt: Prompt) -> tuple[int, int, int]:
    first, second = _responses(prompt)
    return len(prompt.ids), len(first.ids), len(second.ids)


def _responses(prompt: Prompt) -> tuple[Response, Response]:
    """The pair of a prompt, or its completion and none."""
    return prompt.pair or (prompt.completion or NO_RESPONSE, NO_RESPONSE)


def _encode(prompt: Prompt) -> tuple[object, ...]:
    """Cells of a row of the table."""
    first, second = _responses(prompt)
    more: More = {}
    if prompt.messages is not None:
        more["messages"] = list(prompt.messages)
    if prompt.template_options:
        more["template_options"] = prompt.template_options
    if prompt.subset:
        more["subset"] = prompt.subset
    if prompt.columns:
        more["columns"] = dict(prompt.columns)
    if prompt.completion is not None:
        more["is_completion"] = True
    recorded = prompt.recorded
    if recorded is not None and (recorded.chosen, recorded.rejected) != (first.text, second.text):
        more["recorded"] = [recorded.chosen, recorded.rejected]
    if "length" in (first.finish_reason, second.finish_reason):
        more["reasons"] = [first.finish_reason, second.finish_reason]
    known = (None, None) if recorded is None else (recorded.probability, recorded.weight)
    row = (
        prompt.index,
        prompt.ids,
        _bytes(prompt.text),
        first.ids,
        _bytes(first.text),
        second.ids,
        _bytes(second.text),
    )
    return *row, *known, _json(more, prompt.index) if more else None


def _json(more: More, index: int) -> bytes:
    try:
        text = json.dumps(more)
        # tuples come back as lists, and some keys as strings
        same = json.loads(text) == more
    except (TypeError, ValueError) as error:
        raise NotStorableError(f"row {index} holds an object that is no JSON ({error})") from error
    if not same:
        raise NotStorableError(f"row {index} holds an object that JSON does not give back")
    return text.encode()


def _bytes(text: str) -> bytes:
    # a text may hold lone surrogates, which strict UTF-8 refuses to encode
    return text.encode("utf-8", "surrogatepass")
