"""Prompts with one response each and a label that says whether it is desirable: the unpaired format of KTO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning_rlhf.prompts.completions import DatasetCompletions
from lightning_rlhf.prompts.dataset import parse_number
from lightning_rlhf.prompts.files import DatasetFiles, Row, describe
from lightning_rlhf.prompts.messages import field_error
from lightning_rlhf.types import PromptRow, RecordedPair


class DatasetUnpaired(DatasetCompletions):
    """Prompts with single responses that were called desirable or not, from a file, a folder or the Hugging Face Hub.

    TRL's unpaired preferences: rows with ``prompt``, ``completion`` and ``label``, which is true or false, or
    P(desirable) in [0, 1]; plain, or as messages. Optional: ``weight`` in the loss, ``source``, and the optional
    columns of `DatasetCompletions`. Rows with an empty completion are left out and counted. `KTOModule` and
    `BCOModule` train on them, with `OfflineSampler` and `RecordedLabeler`.

    Args:
        path, split, limit, prompt_column, completion_column, messages_column, ignored_fields: as in
            `DatasetCompletions`.
        label_column: name of the column with the label.
    """

    def __init__(
        self,
        path: str | list[str] | DatasetFiles | Sequence[Mapping[str, object]],
        split: str = "train",
        limit: int | None = None,
        prompt_column: str = "prompt",
        completion_column: str = "completion",
        messages_column: str = "messages",
        label_column: str = "label",
        ignored_fields: list[str] | None = None,
    ) -> None:
        super().__init__(
            path,
            split=split,
            limit=limit,
            prompt_column=prompt_column,
            completion_column=completion_column,
            messages_column=messages_column,
            ignored_fields=ignored_fields,
        )
        self.label_column = label_column

    @property
    def _read_columns(self) -> set[str]:
        return super()._read_columns | {self.label_column, "weight", "source"}

    def _parse(self, row: Row, source: str) -> list[PromptRow]:
        probability = self._label(row, source)
        weight = parse_number(row, "weight", source, float("inf"), default=1.0)
        subset = row.get("source")
        found = super()._parse({name: value for name, value in row.items() if name != "label"}, source)
        # a pair without a second response; `PromptRow.is_single` knows it by the completion beside it
        return [
            replace(
                parsed,
                pair=RecordedPair(parsed.completion or "", "", probability, weight),
                subset=subset if isinstance(subset, str) else "",
            )
            for parsed in found
        ]

    def _label(self, row: Row, source: str) -> float:
        """P(desirable) of a row, in [0, 1]."""
        value = row.get(self.label_column)
        if isinstance(value, bool | int | float) and 0 <= value <= 1:
            return float(value)
        problem = f"must be true, false, or P(desirable) in [0, 1], got {describe(value)}"
        raise field_error(source, self.label_column, problem, "correct it, or set label_column")
