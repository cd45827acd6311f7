"""Prompts with principles, for models that read both (SALMON, arXiv 2310.05910)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lightning_rlhf.judging.principle import conditioned_messages, conditioned_text, load_principles, named, statement
from lightning_rlhf.prompts.base import AbstractPromptSource
from lightning_rlhf.runtime.plugins import check_plugin
from lightning_rlhf.types import PromptRow


class PrincipledPrompts(AbstractPromptSource):
    """The rows of another source, each with the same principles: held-out pairs of a model that reads principles.

    Args:
        prompts: the other source.
        fixed: ids of the principles; ``not:ID`` is the negated one.
        principles: name of a set of principles, or a ``.yaml`` file.

    Raises:
        ValueError: if there is no principle of that id.
    """

    def __init__(self, prompts: AbstractPromptSource, fixed: Sequence[str], principles: str = "assistant") -> None:
        check_plugin("PrincipledPrompts.prompts", prompts, AbstractPromptSource)
        known = load_principles(principles)
        self.prompts = prompts
        self._stated = statement(known, named(known, fixed))

    def load(self) -> list[PromptRow]:
        """Read the rows of the other source, and add the principles."""
        rows = []
        for row in self.prompts.load():
            if row.messages is not None:
                rows.append(replace(row, messages=conditioned_messages(row.messages, self._stated)))
            else:
                rows.append(replace(row, text=conditioned_text(row.text or "", self._stated)))
        self.report.clear()
        self.report.update(self.prompts.report)
        return rows
