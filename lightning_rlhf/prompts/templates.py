"""Many instructions from few lines: templates with slots, filled in with all combinations of their values."""

from __future__ import annotations

import string
from collections.abc import Sequence
from itertools import product

from lightning_rlhf.prompts.base import AbstractPromptSource
from lightning_rlhf.types import PromptRow


class TemplatePrompts(AbstractPromptSource):
    """Templates such as ``Tell me about {thing}.`` with every combination of the values of their slots.

    Synonyms in templates and values make the instructions diverse, as in the pretraining of LAMP (arXiv 2308.12270).

    Args:
        templates: texts with slots in braces; ``{{`` is a brace.
        slots: values of each slot by its name.
        conversational: make each text the turn of a user; else it is a plain prompt.

    Raises:
        ValueError: if there is no template, or a template has a slot without values.
    """

    def __init__(
        self, templates: Sequence[str], slots: dict[str, list[str]] | None = None, conversational: bool = True
    ) -> None:
        self.templates, self.slots, self.conversational = list(templates), dict(slots or {}), conversational
        if not self.templates:
            raise ValueError("TemplatePrompts.templates is empty: give at least one text")
        for template in self.templates:
            lacking = [name for name in _slots(template) if not self.slots.get(name)]
            if lacking:
                raise ValueError(f"TemplatePrompts: {template!r} has the slot {lacking[0]!r}; give slots its values")

    def load(self) -> list[PromptRow]:
        """List all texts, template after template; equal texts are left out and counted."""
        self.report.clear()
        found: dict[str, None] = {}
        for template in self.templates:
            names = _slots(template)
            for values in product(*(self.slots[name] for name in names)):
                text = template.format(**dict(zip(names, values, strict=True)))
                self.report["repeated text"] += text in found
                found[text] = None
        return [self._row(number, text) for number, text in enumerate(found)]

    def _row(self, number: int, text: str) -> PromptRow:
        source = f"template text {number + 1}"
        if self.conversational:
            return PromptRow(source, messages=({"role": "user", "content": text},))
        return PromptRow(source, text=text)


def _slots(template: str) -> list[str]:
    """Names of the slots of a template, each once.

    Raises:
        ValueError: if its braces do not match, or a slot has no name.
    """
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"TemplatePrompts: {template!r} is no template ({error}): write {{{{ for a brace") from error
    if not all(name.isidentifier() for name in names):
        raise ValueError(f"TemplatePrompts: {template!r} has a slot without a name: write it as {{thing}}")
    return list(dict.fromkeys(names))
