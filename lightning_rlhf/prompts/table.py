"""Tokenized rows on disk: an Arrow table that is mapped into memory, so that prompts are objects while they are used.

Rows are read and tokenized once, in portions, and kept under a digest of the files, of the settings of the source, of
the tokenizer with its chat template, and of the limits of length. A later run opens the table.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, cast

import numpy as np
import tokenizers
import transformers
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.ledger.row_digest import AbstractDigestedRows, RowDigest, RowHasher
from lightning_rlhf.models.cache import cached, file_digest
from lightning_rlhf.prompts.base import AbstractPromptSource
from lightning_rlhf.prompts.portions import More, NotStorableError, Portion, Tokenization, portions, schema
from lightning_rlhf.prompts.tokenize import check_some_left
from lightning_rlhf.types import NO_RESPONSE, FinishReason, Prompt, PromptRow, RecordedPair, Response


if TYPE_CHECKING:
    import pyarrow


Storage = Literal["auto", "memory", "disk"]

SMALL_FILES = 2**20
"""Bytes of files up to which ``auto`` keeps rows in memory."""
SMALL_LISTS = 2_000
"""Rows up to which ``auto`` keeps rows in memory that come from no local files."""
VERSION = 1
"""Version of the format; raise it when the tables or the rules of tokenization change."""
_BY_THEMSELVES: list[FinishReason] = ["eos", "eos"]
BATCH = 512
"""Rows of a record batch."""
TABLE, LENGTHS, FACTS = "rows.arrow", "lengths.npy", "facts.json"


class Facts(TypedDict):
    """What a run asks of all rows, counted once; plain JSON.

    Attributes:
        digest: digest of the rows.
        columns_digest: digest of their other columns; None if there are none.
        column_names: names of these columns.
        counts: rows that were left out or truncated, by reason.
        format_name: format that the source converted.
        unread_columns: columns that the source left out.
        has_messages: whether some row is a conversation.
        pairs, singles, ties: numbers of rows with a pair or single response, with a single response, and with a pair of
            equal responses.
    """

    digest: RowDigest
    columns_digest: str | None
    column_names: list[str]
    counts: dict[str, int]
    format_name: str | None
    unread_columns: list[str]
    has_messages: bool
    pairs: int
    singles: int
    ties: int


class PromptTable(AbstractDigestedRows):
    """Prompts in a folder, read one by one; equal to those that were written.

    Args:
        folder: the folder, as `write_table` filled it.
        owner: keeps a temporary folder alive as long as the table.
    """

    def __init__(self, folder: Path, owner: tempfile.TemporaryDirectory[str] | None = None) -> None:
        self.folder, self._owner = folder, owner
        self.facts: Facts = json.loads((folder / FACTS).read_text())
        self.lengths: NDArray[np.int32] = np.load(folder / LENGTHS)
        """Tokens of the prompt, of the first and of the second response, 0 where there is none; [rows, 3]."""
        self._reader: pyarrow.RecordBatchFileReader | None = None
        self._open: tuple[int, pyarrow.RecordBatch] | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def make(self, place: int) -> Prompt:
        """Read a row."""
        number, row = divmod(place, BATCH)
        return _decode(self._batch(number), row)

    def __getstate__(self) -> dict[str, object]:
        # a mapped file belongs to its process
        return {**vars(self), "_reader": None, "_open": None}

    @property
    def row_digest(self) -> RowDigest:
        """Digest of the rows."""
        return self.facts["digest"]

    @property
    def columns_digest(self) -> str | None:
        """Digest of the other columns of the rows."""
        return self.facts["columns_digest"]

    def _batch(self, number: int) -> pyarrow.RecordBatch:
        if self._reader is None:
            import pyarrow

            # mapped, not read: pages come when a row is decoded, and the system takes them back when memory is short
            self._reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(self.folder / TABLE)))
        if self._open is None or self._open[0] != number:
            self._open = (number, self._reader.get_batch(number))
        return self._open[1]


def load_prompts(
    source: AbstractPromptSource, how: Tokenization, storage: Storage, workers: int | None = None
) -> tuple[Sequence[Prompt], dict[str, int]]:
    """Read and tokenize the rows of a source, or open the table of an earlier run.

    Args:
        source: the source; its report and the facts that `load` notes are those of the earlier run.
        how: how rows become tokens.
        workers: processes that tokenize the rows of a table, see `portions`.
        storage: ``memory`` makes a list, ``disk`` a table; ``auto`` a table from `SMALL_FILES` or `SMALL_LISTS` on.

    Returns:
        The prompts, and the numbers of rows that were dropped or truncated, by reason.

    Raises:
        ValueError: as the source and `tokenize_rows` do.
    """
    if storage not in ("auto", "memory", "disk"):
        raise ValueError(f"data.prompt_options.rows must be 'auto', 'memory' or 'disk'; got {storage!r}")
    files = source.data_files() if _streams(source) else []
    small = bool(files) and sum(file.stat().st_size for file in files) < SMALL_FILES
    if storage == "memory" or (storage == "auto" and small):
        return _in_memory(source.load(), source, how)
    key = _key(source, files, how)

    def build(scratch: Path) -> None:
        _build(source.stream(), source, how, workers, scratch)

    if key is not None:
        try:
            folder = cached(f"rows-{files[0].stem}", key, build)
        except (NotStorableError, OSError) as error:
            return _kept(error, source, how)
        table = PromptTable(folder)
        _restore(source, table.facts)
        return table, table.facts["counts"]
    rows = source.load()
    if storage == "auto" and len(rows) < SMALL_LISTS:
        return _in_memory(rows, source, how)
    owner = tempfile.TemporaryDirectory(prefix="lightning_rlhf-rows-")
    try:
        _build(rows, source, how, workers, Path(owner.name))
    except (NotStorableError, OSError) as error:
        return _kept(error, source, how)
    table = PromptTable(Path(owner.name), owner)
    return table, table.facts["counts"]


def _in_memory(
    rows: Sequence[PromptRow], source: AbstractPromptSource, how: Tokenization
) -> tuple[Sequence[Prompt], dict[str, int]]:
    counts: Counter[str] = Counter()
    prompts = list(how.prompts(rows, counts))
    check_some_left(len(prompts), len(rows), +counts)
    return prompts, {**source.report, **counts}


def _kept(error: Exception, source: AbstractPromptSource, how: Tokenization) -> tuple[Sequence[Prompt], dict[str, int]]:
    rank_zero_info(f"the rows stay in memory, and are tokenized in every run: {error}")
    return _in_memory(source.load(), source, how)


def _build(
    rows: Iterable[PromptRow], source: AbstractPromptSource, how: Tokenization, workers: int | None, folder: Path
) -> None:
    """Tokenize rows into a table."""
    facts = write_table(portions(rows, how, workers), folder)
    facts["counts"] = {**source.report, **facts["counts"]}
    facts["format_name"] = getattr(source, "format_name", None)
    facts["unread_columns"] = list(getattr(source, "unread_columns", ()))
    (folder / FACTS).write_text(json.dumps(facts))


def _restore(source: AbstractPromptSource, facts: Facts) -> None:
    """Let a source know what its `load` noted when the table was written."""
    for name in ("format_name", "unread_columns"):
        if hasattr(source, name):
            setattr(source, name, facts[name])


def _streams(source: AbstractPromptSource) -> bool:
    """Whether `stream` and `data_files` of a source belong to its `load`: a subclass may have a `load` of its own."""
    kind = type(source)
    if not kind.__module__.startswith("lightning_rlhf.prompts."):
        return False
    return "stream" in vars(next(base for base in kind.__mro__ if vars(base).keys() & {"load", "stream"}))


def _key(source: AbstractPromptSource, files: Sequence[Path], how: Tokenization) -> str | None:
    """Digest of everything that the tokens of a source depend on; None if that cannot be told."""
    tokenizer = _tokenizer_digest(how.tokenizer)
    if not files or tokenizer is None:
        return None
    # the content of the files counts, not their place
    arguments = {name: value for name, value in vars(source).get("_arguments", {}).items() if name != "path"}
    parts: list[object] = [VERSION, transformers.__version__, tokenizers.__version__, type(source).__qualname__]
    parts += [arguments, [file_digest(file) for file in files], tokenizer]
    parts += [how.limits, how.system_prompt, how.end_ids, how.chat]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Digest of a tokenizer; None for one that is written in Python, or whose template writes the date."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    template = tokenizer.chat_template
    if backend is None or "strftime" in json.dumps(template):
        return None
    # a call of the tokenizer may have set truncation and padding, which are no part of it
    state = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    parts = [type(tokenizer).__qualname__, state, template, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


# -- rows of the table -------------------------------------------------------------------------------------------------


def write_table(parts: Iterable[Portion], folder: Path) -> Facts:
    """Write portions to a folder, and count their rows for the checks of runs.

    Raises:
        ValueError: if no row is left.
    """
    import pyarrow

    hasher, names, counts, left_out, read = RowHasher(), dict[str, None](), Counter[str](), Counter[str](), 0
    lengths: list[NDArray[np.int32]] = [np.zeros((0, 3), np.int32)]
    waiting = pyarrow.Table.from_batches([], schema=schema())
    with pyarrow.OSFile(str(folder / TABLE), "wb") as sink, pyarrow.ipc.new_file(sink, schema()) as writer:
        for part in parts:
            hasher.add_digests(part.digests)
            hasher.add_encoded_columns(part.columns, has_columns=bool(part.column_names))
            lengths.append(part.lengths)
            names |= dict.fromkeys(part.column_names)
            counts, left_out, read = counts + part.counts, left_out + part.left_out, read + part.read
            # portions are uneven where rows are dropped, and a row is found by its place: all batches but the last
            # have the same size
            waiting = pyarrow.concat_tables([waiting, pyarrow.Table.from_batches([part.batch])]).combine_chunks()
            whole = len(waiting) - len(waiting) % BATCH
            for batch in waiting.slice(0, whole).to_batches(BATCH):
                writer.write_batch(batch)
            waiting = waiting.slice(whole)
        for batch in waiting.to_batches(BATCH):
            writer.write_batch(batch)
    check_some_left(hasher.count, read, left_out)
    np.save(folder / LENGTHS, np.concatenate(lengths))
    return {
        "digest": hasher.digest(),
        "columns_digest": hasher.columns_digest(),
        "column_names": list(names),
        "counts": dict(left_out),
        "format_name": None,
        "unread_columns": [],
        "has_messages": counts["messages"] > 0,
        "pairs": counts["pairs"],
        "singles": counts["singles"],
        "ties": counts["ties"],
    }


def _decode(batch: pyarrow.RecordBatch, row: int) -> Prompt:
    """Read a row of a record batch."""

    def ids(column: int) -> tuple[int, ...]:
        values = batch.column(column)[row].values
        if not len(values):
            return ()
        # not `to_numpy`, which imports pandas: 0.3 s of CPU and 50 MB
        numbers = np.frombuffer(values.buffers()[1], np.int32, len(values), offset=4 * values.offset)
        return tuple(numbers.tolist())

    def text(column: int) -> str:
        return cast(bytes, batch.column(column)[row].as_py()).decode("utf-8", "surrogatepass")

    cell = batch.column(9)[row].as_py()
    more: More = {} if cell is None else json.loads(cell)
    reasons = more.get("reasons", _BY_THEMSELVES)
    # in the order of `_encode`; a response without tokens is none
    responses = [
        Response(ids(column), text(column + 1), reason, source="dataset")
        if len(batch.column(column)[row])
        else NO_RESPONSE
        for column, reason in zip((3, 5), reasons, strict=True)
    ]
    probability, weight = (cast(float | None, batch.column(column)[row].as_py()) for column in (7, 8))
    recorded = None
    if probability is not None and weight is not None:
        chosen, rejected = more.get("recorded", [response.text for response in responses])
        recorded = RecordedPair(chosen, rejected, probability, weight)
    is_completion = more.get("is_completion", False)
    messages = more.get("messages")
    return Prompt(
        index=batch.column(0)[row].as_py(),
        ids=ids(1),
        text=text(2),
        messages=None if messages is None else tuple(messages),
        pair=(responses[0], responses[1]) if responses[0].ids and not is_completion else None,
        recorded=recorded,
        completion=responses[0] if is_completion else None,
        template_options=more.get("template_options", {}),
        subset=more.get("subset", ""),
        columns=cast(Mapping[str, object], more.get("columns", {})),
    )
