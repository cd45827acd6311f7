"""Prompts that come with the package, so that first runs need no data."""

from __future__ import annotations

import json
from importlib import resources
from typing import Literal

from lightning_rlhf.prompts.base import AbstractPromptSource
from lightning_rlhf.types import PromptRow


class BuiltinPrompts(AbstractPromptSource):
    """Instructions and questions about everyday life, each one user turn, written for this package.

    Answers are short and open, and may be glad, sour or neither: the prompts suit demonstrations that steer sentiment.
    They measure nothing beyond that. 256 are for training, 64 others are held out; each topic has four to one of them.

    Args:
        split: "train" for the 256 prompts to train on, "heldout" for the 64 others.
        limit: take only the first prompts, >= 1; null takes all. Topics take turns, so that the first are varied.
    """

    def __init__(self, split: Literal["train", "heldout"] = "train", limit: int | None = None) -> None:
        self.split = split
        self.limit = limit

    def load(self) -> list[PromptRow]:
        """Read the prompts of the split.

        Raises:
            ValueError: if the split or the limit makes no sense.
        """
        if self.split not in ("train", "heldout"):
            raise ValueError(f"split must be 'train' or 'heldout'; got {self.split!r}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, or null for all prompts; got {self.limit}")
        self.report.clear()
        text = (resources.files(__package__) / "data" / "instructions.jsonl").read_text(encoding="utf-8")
        rows = []
        for number, line in enumerate(text.splitlines(), start=1):
            record = json.loads(line)
            if record["split"] == self.split:
                messages = ({"role": "user", "content": record["prompt"]},)
                rows.append(PromptRow(source=f"instructions.jsonl row {number}", messages=messages))
        return rows[: self.limit]
