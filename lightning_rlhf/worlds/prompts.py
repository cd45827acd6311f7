"""Prompts of worlds: made by code, some of them held out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Literal

from lightning_rlhf.prompts.base import AbstractPromptSource
from lightning_rlhf.types import PromptRow


class AbstractWorldPrompts(AbstractPromptSource):
    """All prompts of a world, of which a part is held out.

    Args:
        split: ``train`` or ``heldout``.
        repeats: times that each prompt is listed, >= 1: held-out answers are then averaged over as many samples.
    """

    NAME: ClassVar[str]
    """Name of the prompts in messages."""

    def __init__(self, split: Literal["train", "heldout"] = "train", repeats: int = 1) -> None:
        if split not in ("train", "heldout") or repeats < 1:
            raise ValueError(
                f"{type(self).__name__} takes split 'train' or 'heldout' and repeats >= 1; got {split!r} and {repeats}"
            )
        self.split, self.repeats = split, repeats

    @abstractmethod
    def texts(self) -> Iterator[tuple[str, bool]]:
        """Give each prompt, and whether it is held out."""

    def load(self) -> list[PromptRow]:
        """List the prompts of the split."""
        self.report.clear()
        kept = [text for text, is_heldout in self.texts() if is_heldout == (self.split == "heldout")]
        return [PromptRow(source=f"{self.NAME} {i}", text=text) for i, text in enumerate(kept * self.repeats)]
