"""Prompts and preference rows in the formats that TRL users know, from files, folders and the Hub.

Each row is an object with some of these columns; text is a string or a list of ``{"role": ..., "content": ...}``:

- prompt-only: ``prompt``;
- preference: ``prompt``, ``chosen``, ``rejected``;
- preference with implicit prompt: ``chosen`` and ``rejected``, conversations or texts with the same beginning;
- rows of UltraFeedback, Nectar, HelpSteer2, HelpSteer3, ShareGPT and Alpaca (`lightning_rlhf.prompts.formats`);
- optional, with preferences: ``probability`` or ``label``, P(chosen preferred) in [0, 1], and ``weight``, >= 0;
  ``finish_reason_chosen`` and ``finish_reason_rejected``, "length" where a token limit cut the completion off;
- optional: ``source``, a text that names the part of the data a row belongs to, for held-out metrics by source;
- optional, with conversations: ``tools`` and ``chat_template_kwargs``, for the chat template.

Messages may have other fields and roles, such as ``tool_calls`` and ``tool``: the chat template gets them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from lightning_rlhf.prompts.base import AbstractPromptSource, note_data
from lightning_rlhf.prompts.files import DatasetFiles, Row, describe, local_files, name_of, read_rows, stream_rows
from lightning_rlhf.prompts.formats import RowFormat, SourcedRow, convert_rows, format_of, resemblance
from lightning_rlhf.prompts.messages import (
    field_error,
    holds_text_alone,
    likely_prompt,
    other_columns,
    parse_answer,
    parse_finish_reasons,
    parse_messages,
    parse_prompt,
    parse_template_options,
    prompt_remedy,
    turn_text,
    without_final_answer,
)
from lightning_rlhf.prompts.parts import Part, rows_of_part
from lightning_rlhf.types import Message, PromptRow, RecordedPair


PAIR_FIELDS = (
    *("probability", "label", "weight", "margin"),
    *("finish_reason_chosen", "finish_reason_rejected", "tools", "chat_template_kwargs"),
)
"""Columns beside the prompt and the completions that are read."""

MADE = {"completion", "messages"}
"""Columns that the conversion of a format may add."""

IDENTICAL = "identical completions"
EMPTY = "empty completion"


class DatasetPrompts(AbstractPromptSource):
    """Prompts, with recorded pairs where there are any, from a file, a folder or the Hugging Face Hub.

    Rows whose completions are identical or empty hold no preference: they are left out and counted. Any
    other row that cannot be used raises an error which names it. Other columns with text, numbers or lists of them
    are kept for rewards, which read the right answer or a test there.

    Args:
        path: local .jsonl, .json, .csv (each also .gz) or .parquet file, which may have ``*``, local folder, or Hub id
            such as "owner/name"; several of them as a list; `DatasetFiles`, the arguments of `load_dataset`; or rows in
            memory, as a list of dictionaries or a `datasets.Dataset`.
        split: split of a folder or of a Hub data set; a single file has none.
        limit: read only the first rows of the data, >= 1; null reads all.
        prompt_column: name of the column with the prompt.
        chosen_column: name of the column with the preferred completion.
        rejected_column: name of the column with the other completion.
        kind: "preference" requires pairs, "prompt" ignores them, "auto" takes them if the data has both columns.
        part: ``train`` or ``heldout`` takes one side of data that came without a split; ``all`` takes both.
        heldout_share: share of the prompts that ``part`` holds out, by a hash of their first message, in (0, 1).
        ignored_fields: fields of messages, and columns for the chat template, to leave out.
    """

    def __init__(
        self,
        path: str | list[str] | DatasetFiles | Sequence[Mapping[str, object]],
        split: str = "train",
        limit: int | None = None,
        prompt_column: str = "prompt",
        chosen_column: str = "chosen",
        rejected_column: str = "rejected",
        kind: Literal["auto", "prompt", "preference"] = "auto",
        part: Part = "all",
        heldout_share: float = 0.2,
        ignored_fields: list[str] | None = None,
    ) -> None:
        self.path, self._data = name_of(path), path
        note_data(self, path)
        self.split = split
        self.limit = limit
        self.prompt_column = prompt_column
        self.chosen_column = chosen_column
        self.rejected_column = rejected_column
        self.kind = kind
        self.part: Part = part
        self.heldout_share = heldout_share
        self.ignored_fields = tuple(ignored_fields or ())
        self.format_name: str | None = None
        """Format that the last `load` has converted; None if rows were as they are read."""
        self.unread_columns: list[str] = []
        """Columns that the last `load` has left out."""

    def load(self) -> list[PromptRow]:
        """Read and check all rows, in the order of the data.

        Raises:
            ValueError: if the data is missing or empty, lacks a column, or has a malformed row (named with its number).
        """
        self.report.clear()
        rows = self._in_known_format(read_rows(self._data, self.split, self.limit))
        kept = list(self._usable(rows, columns_of(rows)))
        return rows_of_part(kept, self.part, self.heldout_share)

    def stream(self) -> Iterator[PromptRow]:
        """The rows of `load`, one after another: files are read twice, first for the names of their columns."""
        # rows of another format may belong together, and a part of the rows may be empty
        columns = columns_of(stream_rows(self._data, self.split, self.limit))
        if self.part != "all" or self._other_format(columns) is not None or not self.data_files():
            yield from self.load()
            return
        self.report.clear()
        self.format_name = None
        yield from self._usable(stream_rows(self._data, self.split, self.limit), columns)

    def data_files(self) -> list[Path]:
        """Local files of the rows."""
        return local_files(self._data)

    def _usable(self, rows: Iterable[SourcedRow], columns: list[str]) -> Iterator[PromptRow]:
        """The rows that can be used, parsed; the others are counted."""
        take_pairs = self._takes_pairs(columns)
        # columns that a conversion adds are no columns of the data
        known = self._read_columns | (MADE if self.format_name else set())
        count, first = 0, None
        for source, row in rows:
            count += 1
            parsed = self._parse(row, source, take_pairs)
            reason = unusable_pair(parsed.pair)
            if reason is not None:
                self.report[reason] += 1
                continue
            if first is None:
                first = parsed
                self.unread_columns = [name for name in columns if name not in known and name not in first.columns]
            yield parsed
        if first is None:
            raise ValueError(f"{self.path}: none of {count} rows can be used ({dict(self.report)}): check the data")

    @property
    def _read_columns(self) -> set[str]:
        """Columns that this source itself reads."""
        return {self.prompt_column, *self._pair_columns, *PAIR_FIELDS, *self.ignored_fields}

    def _in_known_format(self, rows: list[SourcedRow]) -> list[SourcedRow]:
        """Rows of another format as rows of this one, where the columns to be read are not there."""
        self.format_name = None
        form = self._other_format(columns_of(rows))
        if form is None:
            return rows
        self.format_name = form.name
        names = dict(zip(("prompt", "chosen", "rejected"), (self.prompt_column, *self._pair_columns), strict=True))
        converted = convert_rows(form, rows, self.report, names)
        if not converted:
            raise ValueError(
                f"{self.path}: none of {len(rows)} rows can be used ({dict(self.report)}), read as {form.name}: check "
                f"the data"
            )
        return converted

    def _other_format(self, columns: list[str]) -> RowFormat | None:
        """The format of rows without the columns to be read; None if they are there, or no format is known."""
        has_pairs = all(name in columns for name in self._pair_columns)
        if self.prompt_column in columns and (has_pairs or self.kind != "preference"):
            return None
        # two answers before one: a format with pairs has prompts, too
        form = format_of(columns, pairs=True)
        if form is None and self.kind != "preference":
            form = format_of(columns, pairs=False)
        return form

    @property
    def _pair_columns(self) -> tuple[str, str]:
        return self.chosen_column, self.rejected_column

    def _takes_pairs(self, columns: list[str]) -> bool:
        """Decide from the columns of all rows whether to read pairs, and check that all needed columns exist."""
        pair_columns = list(self._pair_columns)
        has_pairs = all(name in columns for name in pair_columns)
        take_pairs = self.kind == "preference" or (self.kind == "auto" and has_pairs)
        # the prompt column may be missing where pairs imply the prompt
        needed = pair_columns if take_pairs else [] if has_pairs else [self.prompt_column]
        missing = [name for name in needed if name not in columns]
        if missing:
            raise ValueError(
                f"{self.path}: no column {' and '.join(map(repr, missing))}; its columns are {columns}; "
                f"{resemblance(columns)}: set prompt_column, chosen_column or rejected_column to the names in the "
                f"data, or kind to another than {self.kind!r}"
            )
        return take_pairs

    def _parse(self, row: Row, source: str, take_pairs: bool) -> PromptRow:
        chosen, rejected = row.get(self.chosen_column), row.get(self.rejected_column)
        if take_pairs:
            for name, value in ((self.chosen_column, chosen), (self.rejected_column, rejected)):
                if value is None:
                    raise field_error(source, name, "is missing", 'add it, or set kind="prompt" to read prompts alone')

        prompt: str | tuple[Message, ...]
        if row.get(self.prompt_column) is not None:
            prompt = parse_prompt(row[self.prompt_column], source, self.prompt_column, self.ignored_fields)
            # a text prompt beside completions that are messages is the user's turn (so in many sets on the Hub)
            if isinstance(prompt, str) and (isinstance(chosen, list) or isinstance(rejected, list)):
                prompt = ({"role": "user", "content": prompt},)
        elif chosen is None and rejected is None:
            raise field_error(source, self.prompt_column, "is missing", prompt_remedy(row))
        else:
            prompt = self._implicit_prompt(row, source)
            if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
                chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]

        conversational = not isinstance(prompt, str)
        parsed = PromptRow(
            source,
            text=prompt if isinstance(prompt, str) else None,
            messages=None if isinstance(prompt, str) else prompt,
            template_options=parse_template_options(row, source, conversational, self.ignored_fields),
            # data may have a column of this name with other things in it
            subset=subset if isinstance(subset := row.get("source"), str) else "",
            columns=other_columns(row, {self.prompt_column, *(self._pair_columns if take_pairs else ())}),
        )
        if not take_pairs:
            return parsed
        answers = tuple(
            parse_answer(value, prompt, source, name, self.ignored_fields)
            for name, value in ((self.chosen_column, chosen), (self.rejected_column, rejected))
        )
        first, second = map(turn_text, answers)
        self._refuse_margin(row, source)
        weight = parse_number(row, "weight", source, math.inf, default=1.0)
        return replace(
            parsed,
            pair=RecordedPair(first, second, parse_probability(row, source), weight),
            # `pair` holds plain texts already; messages with other fields are kept for the chat template
            answers=() if all(map(holds_text_alone, answers)) else answers,
            finish_reasons=parse_finish_reasons(row, ("finish_reason_chosen", "finish_reason_rejected")),
        )

    def _refuse_margin(self, row: Row, source: str) -> None:
        # no loss here takes a margin for each pair: to leave it out in silence would train something else
        if row.get("margin") not in (None, 0) and "margin" not in self.ignored_fields:
            problem = "asks for a margin of its own, which no loss here reads"
            remedy = "set ignored_fields=[margin]; model.loss.margin of RewardModule is one for all pairs"
            raise field_error(source, "margin", problem, remedy)

    def _implicit_prompt(self, row: Row, source: str) -> str | tuple[Message, ...]:
        """Find the words, or the messages, with which both completions begin."""
        chosen, rejected = row.get(self.chosen_column), row.get(self.rejected_column)
        if isinstance(chosen, str) or isinstance(rejected, str):
            texts = [value for value in (chosen, rejected) if isinstance(value, str)]
            if any("\n\nHuman:" in text for text in texts):
                remedy = "read Human/Assistant transcripts with HHPrompts"
                raise field_error(source, self.prompt_column, "is missing", remedy)
            likely = likely_prompt(row, self.ignored_fields)
            if likely is not None:
                # two answers often begin with the same word, which is no prompt
                remedy = f"{prompt_remedy(row)}, or ignored_fields=[{likely}] if the common beginning is"
                raise field_error(source, self.prompt_column, "is missing", remedy)
            shared = common_words(*texts) if len(texts) == 2 else ""
            if shared:
                return shared
            problem = "is missing, and the completions are no texts with a common beginning"
            remedy = f"add a column {self.prompt_column!r}, or write both completions as lists of messages"
            raise field_error(source, self.prompt_column, problem, remedy)
        first = parse_messages(chosen, source, self.chosen_column, self.ignored_fields)
        second = parse_messages(rejected, source, self.rejected_column, self.ignored_fields)
        length = 0
        # - 1: the last message of a conversation is its answer, even if both have the same
        while length < min(len(first), len(second)) - 1 and first[length] == second[length]:
            length += 1
        if length == 0:
            problem = f"begins with another message than {self.rejected_column!r}, or has a single one"
            raise field_error(source, self.chosen_column, problem, f"add a column {self.prompt_column!r}")
        return without_final_answer(first[:length], source, self.chosen_column)


def columns_of(rows: Iterable[SourcedRow]) -> list[str]:
    """Columns of rows, in the order of their appearance: optional ones may be missing in the first rows."""
    columns: dict[str, None] = {}
    for _, row in rows:
        # most rows have no new column
        if not columns.keys() >= row.keys():
            columns |= dict.fromkeys(row)
    return list(columns)


def common_words(first: str, second: str) -> str:
    """Longest common beginning of two texts that ends between words: TRL's rule, which never splits one here."""
    length = 0
    while length < min(len(first), len(second)) and first[length] == second[length]:
        length += 1
    shared = first[:length]
    # back to the white space before the first difference, which belongs to the completions
    return shared[: max((place for place, letter in enumerate(shared) if letter.isspace()), default=0)]


def unusable_pair(pair: RecordedPair | None) -> str | None:
    """Reason why a recorded pair holds no preference; None if it does, or if there is no pair."""
    if pair is None:
        return None
    if not pair.chosen.strip() or not pair.rejected.strip():
        return EMPTY
    return IDENTICAL if pair.chosen == pair.rejected else None


def unusable_response(pair: RecordedPair) -> str | None:
    """Reason why a recorded single response cannot be used; None if it can."""
    return None if pair.chosen.strip() else EMPTY


def parse_number(row: Row, field: str, source: str, high: float, default: float) -> float:
    """Check a number between 0 and ``high``; a missing or null field is the default."""
    value = row.get(field)
    if value is None:
        return default
    # comparing before converting: float() of a huge integer raises OverflowError; NaN fails every comparison
    # a boolean is an int to Python, but says "this one is good", not how probable it is
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= high or value > 1e300:
        bound = "in [0, 1]" if high == 1 else "finite and at least 0"
        problem = f"must be a number {bound}, got {describe(value)}"
        raise field_error(source, field, problem, "correct it, or rename the column if it means something else")
    return float(value)


def parse_probability(row: Row, source: str) -> float:
    """Read P(chosen preferred) from ``probability`` or ``label``; 1 if neither is there."""
    # -1 stands for a missing field: no valid number is negative, and `max` takes the other field
    probability = parse_number(row, "probability", source, 1, default=-1.0)
    label = parse_number(row, "label", source, 1, default=-1.0)
    if min(probability, label) >= 0 and probability != label:
        problem = f"says {label}, but 'probability' says {probability}"
        raise field_error(source, "label", problem, "both mean P(chosen preferred): keep one of them")
    return max(probability, label) if max(probability, label) >= 0 else 1.0
