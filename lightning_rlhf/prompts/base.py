"""Interface of a prompt source."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from lightning_rlhf.prompts.files import Data, holds_rows, name_of
from lightning_rlhf.runtime.fingerprint import KeepsArguments
from lightning_rlhf.types import PromptRow


def note_data(source: KeepsArguments, data: Data) -> None:
    """Note rows in memory by name alone in the arguments of a source: a ledger keeps a digest of the rows."""
    if holds_rows(data):
        source.__dict__["_arguments"]["path"] = name_of(data)


class AbstractPromptSource(KeepsArguments, ABC):
    """Gives the prompts to train on, with recorded completions if there are any.

    Subclass it, implement `load`, and name your class by its path: ``--data.prompts=my_file.MyPrompts``. A source has
    no tokenizer; `tokenize_rows` turns its rows into token ids.
    """

    @cached_property
    def report(self) -> Counter[str]:
        """Number of rows that the last `load` left out, by reason; empty if it kept all.

        A source of your own writes ``self.report["reason"] += 1`` for every row it leaves out.
        """
        return Counter()

    @abstractmethod
    def load(self) -> list[PromptRow]:
        """Read all rows, in an order that is the same on every rank and after every restart.

        Called once per data set and rank. Rows left out on purpose are counted in `report`; rows that cannot be read
        raise an error which names the row.
        """

    def stream(self) -> Iterator[PromptRow]:
        """The rows of `load`, one after another; a source that reads its data in portions needs no memory for all.

        `report` is complete when the last row has been read.
        """
        yield from self.load()

    def data_files(self) -> list[Path]:
        """Local files that `load` reads, where it reads nothing else; their rows are kept on disk once tokenized."""
        return []
