"""What a prompt source promises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from functools import cached_property

from lightning_rlhf.runtime.fingerprint import KeepsArguments
from lightning_rlhf.types import PromptRow


class AbstractPromptSource(KeepsArguments, ABC):
    """Says which prompts to train on, and which recorded completions come with them.

    Subclass it, implement `load`, and name your class by its path: ``--data.prompts=my_file.MyPrompts``. A source knows
    no tokenizer; `tokenize_rows` turns what it returns into token ids.
    """

    @cached_property
    def report(self) -> Counter[str]:
        """How many rows the last `load` left out, by reason; empty when it kept them all.

        An own source writes ``self.report["reason"] += 1`` for every row it leaves out.
        """
        return Counter()

    @abstractmethod
    def load(self) -> list[PromptRow]:
        """Read all rows, in an order that is the same on every rank and after every restart.

        Called once per data set and rank. Rows left out on purpose are counted in `report`; rows that cannot be read
        raise an error which names the row.
        """
