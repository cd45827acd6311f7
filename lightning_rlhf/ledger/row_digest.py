"""Digests of rows: by their content, row by row, so that a table that is too large for the memory has one as well."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import NotRequired, TypedDict

from lightning_rlhf.runtime.lazy import AbstractLazySequence
from lightning_rlhf.types import Prompt, Response


NAMED = 100_000
"""Rows up to which a digest of each is kept, so that a message can name the first that differs."""
SHORT = 4
"""Bytes of the digest that is kept of each row."""


class RowDigest(TypedDict):
    """Digest of a list of rows, as plain JSON.

    Attributes:
        count: number of rows.
        digest: digest of all of them.
        each: short digests of each, one after the other; for at most `NAMED` rows.
    """

    count: int
    digest: str
    each: NotRequired[str]


class RowHasher:
    """Digests of rows that come one after another: of their content, and of their other columns."""

    def __init__(self) -> None:
        self.count = 0
        self._whole, self._each = hashlib.blake2b(digest_size=16), bytearray()
        self._columns, self._has_columns = hashlib.blake2b(digest_size=16), False

    def add(self, prompt: Prompt) -> None:
        """Add the next row.

        Token ids count, so that another tokenizer, chat template or limit of length gives other rows.
        """
        self.add_digests([digest_of_row(prompt)])

    def add_digests(self, digests: Sequence[bytes]) -> None:
        """Add the next rows by their digests, see `digest_of_row`."""
        self._whole.update(b"".join(digests))
        for digest in digests[: max(0, NAMED - self.count)]:
            self._each += digest[:SHORT]
        self.count += len(digests)

    def add_columns(self, columns: Mapping[str, object]) -> None:
        """Add the other columns of the next row."""
        self.add_encoded_columns(encoded_columns(columns), has_columns=bool(columns))

    def add_encoded_columns(self, columns: bytes, *, has_columns: bool) -> None:
        """Add the other columns of the next rows, joined, see `encoded_columns`."""
        self._has_columns = self._has_columns or has_columns
        self._columns.update(columns)

    def digest(self) -> RowDigest:
        """Digest of the rows so far."""
        found: RowDigest = {"count": self.count, "digest": self._whole.hexdigest()}
        if self.count <= NAMED:
            found["each"] = self._each.hex()
        return found

    def columns_digest(self) -> str | None:
        """Digest of the other columns of the rows so far; None if no row has any."""
        return self._columns.hexdigest() if self._has_columns else None


class AbstractDigestedRows(AbstractLazySequence[Prompt]):
    """Rows that know their digests, so that nobody has to read them all again."""

    @property
    @abstractmethod
    def row_digest(self) -> RowDigest:
        """Result of `digest_of_rows`."""

    @property
    @abstractmethod
    def columns_digest(self) -> str | None:
        """Result of `digest_of_columns`."""


def digest_of_rows(prompts: Sequence[Prompt]) -> RowDigest:
    """Digest of a list of rows; see `RowHasher.add`."""
    if isinstance(prompts, AbstractDigestedRows):
        return prompts.row_digest
    hasher = RowHasher()
    for prompt in prompts:
        hasher.add(prompt)
    return hasher.digest()


def digest_of_columns(prompts: Sequence[Prompt]) -> str | None:
    """Digest of the other columns of rows, which rewards may read; None if no row has any."""
    if isinstance(prompts, AbstractDigestedRows):
        return prompts.columns_digest
    if not any(prompt.columns for prompt in prompts):
        return None
    hasher = RowHasher()
    for prompt in prompts:
        hasher.add_columns(prompt.columns)
    return hasher.columns_digest()


def digest_of_row(prompt: Prompt) -> bytes:
    """Digest of one row."""
    content: list[bytes] = []
    for part in _parts(prompt):
        # the length first: without it ("ab", "c") and ("a", "bc") would have one digest
        content += len(part).to_bytes(8, "little"), part
    return hashlib.blake2b(b"".join(content), digest_size=16).digest()


def encoded_columns(columns: Mapping[str, object]) -> bytes:
    """The other columns of a row as they are hashed."""
    return json.dumps(dict(columns), sort_keys=True, default=repr).encode("utf-8", "surrogatepass")


def _parts(prompt: Prompt) -> Iterator[bytes]:
    yield from _content(prompt.ids, prompt.text)
    yield b"" if prompt.messages is None else json.dumps(prompt.messages, sort_keys=True).encode()
    for response in prompt.pair or ():
        yield from _response(response)
    if prompt.recorded is not None:
        yield repr((float(prompt.recorded.probability), float(prompt.recorded.weight))).encode()
    if prompt.completion is not None:
        yield from _response(prompt.completion)


def _response(response: Response) -> Iterator[bytes]:
    yield from _content(response.ids, response.text)


def _content(ids: Sequence[int], text: str) -> Iterator[bytes]:
    yield array("q", ids).tobytes()
    # a text may hold lone surrogates, which strict UTF-8 refuses to encode
    yield text.encode("utf-8", "surrogatepass")
