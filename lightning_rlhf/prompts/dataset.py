"""Prompts and preference rows in the formats that TRL users know, from files, folders and the Hub.

Each row is an object with some of these columns; text is a string or a list of ``{"role": ..., "content": ...}``:

- prompt-only: ``prompt``;
- preference: ``prompt``, ``chosen``, ``rejected``;
- preference with implicit prompt: ``chosen`` and ``rejected``, two conversations with the same beginning;
- optional, with preferences: ``probability`` or ``label``, P(chosen preferred) in [0, 1], and ``weight``, >= 0;
  ``finish_reason_chosen`` and ``finish_reason_rejected``, "length" where a token limit cut the completion off;
- optional: ``source``, a text that names the part of the data a row belongs to, for held-out metrics by source;
- optional, with conversations: ``tools`` and ``chat_template_kwargs``, for the chat template.

Messages may have other fields and roles, such as ``tool_calls`` and ``tool``: the chat template gets them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

from lightning_rlhf.prompts.base import AbstractPromptSource
from lightning_rlhf.prompts.files import Row, describe, read_rows
from lightning_rlhf.prompts.messages import (
    field_error,
    holds_text_alone,
    parse_answer,
    parse_finish_reasons,
    parse_messages,
    parse_prompt,
    parse_template_options,
    turn_text,
    without_final_answer,
)
from lightning_rlhf.prompts.parts import Part, rows_of_part
from lightning_rlhf.types import Message, PromptRow, RecordedPair


IDENTICAL = "identical completions"
EMPTY = "empty completion"


class DatasetPrompts(AbstractPromptSource):
    """Prompts, with recorded pairs where there are any, from a file, a folder or the Hugging Face Hub.

    Rows whose completions are identical or empty hold no preference: they are left out and counted. Any
    other row that cannot be used raises an error which names it. Columns that are not listed here are ignored.

    Args:
        path: local .jsonl, .jsonl.gz, .json or .parquet file, local folder, or Hub id such as "owner/name".
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
        path: str,
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
        self.path = path
        self.split = split
        self.limit = limit
        self.prompt_column = prompt_column
        self.chosen_column = chosen_column
        self.rejected_column = rejected_column
        self.kind = kind
        self.part: Part = part
        self.heldout_share = heldout_share
        self.ignored_fields = tuple(ignored_fields or ())

    def load(self) -> list[PromptRow]:
        """Read and check all rows, in the order of the data.

        Raises:
            ValueError: if the data is missing or empty, lacks a column, or has a malformed row (named with its number).
        """
        self.report.clear()
        rows = read_rows(self.path, self.split, self.limit)
        # the union over rows: optional columns may be missing in the first ones
        columns: dict[str, None] = {}  # ordered
        for _, row in rows:
            columns |= dict.fromkeys(row)
        take_pairs = self._takes_pairs(list(columns))
        kept = []
        for source, row in rows:
            parsed = self._parse(row, source, take_pairs)
            reason = unusable_pair(parsed.pair)
            if reason is None:
                kept.append(parsed)
            else:
                self.report[reason] += 1
        if not kept:
            raise ValueError(f"{self.path}: none of {len(rows)} rows can be used ({dict(self.report)}): check the data")
        return rows_of_part(kept, self.part, self.heldout_share)

    def _takes_pairs(self, columns: list[str]) -> bool:
        """Decide from the columns of all rows whether to read pairs, and check that all needed columns exist."""
        pair_columns = [self.chosen_column, self.rejected_column]
        has_pairs = all(name in columns for name in pair_columns)
        take_pairs = self.kind == "preference" or (self.kind == "auto" and has_pairs)
        # the prompt column may be missing where pairs imply the prompt
        needed = pair_columns if take_pairs else [] if has_pairs else [self.prompt_column]
        missing = [name for name in needed if name not in columns]
        if missing:
            raise ValueError(
                f"{self.path}: no column {' and '.join(map(repr, missing))}; its columns are {columns}: set "
                f"prompt_column, chosen_column or rejected_column to the names in the data, or kind to another than "
                f"{self.kind!r}"
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
            raise field_error(source, self.prompt_column, "is missing", "add it")
        else:
            prompt = self._implicit_prompt(chosen, rejected, source)

        conversational = not isinstance(prompt, str)
        parsed = PromptRow(
            source,
            text=prompt if isinstance(prompt, str) else None,
            messages=None if isinstance(prompt, str) else prompt,
            template_options=parse_template_options(row, source, conversational, self.ignored_fields),
            # data may have a column of this name with other things in it
            subset=subset if isinstance(subset := row.get("source"), str) else "",
        )
        if not take_pairs:
            return parsed
        answers = tuple(
            parse_answer(value, prompt, source, name, self.ignored_fields)
            for name, value in ((self.chosen_column, chosen), (self.rejected_column, rejected))
        )
        first, second = map(turn_text, answers)
        weight = parse_number(row, "weight", source, math.inf, default=1.0)
        return replace(
            parsed,
            pair=RecordedPair(first, second, parse_probability(row, source), weight),
            # `pair` holds plain texts already; messages with other fields are kept for the chat template
            answers=() if all(map(holds_text_alone, answers)) else answers,
            finish_reasons=parse_finish_reasons(row, ("finish_reason_chosen", "finish_reason_rejected")),
        )

    def _implicit_prompt(self, chosen: object, rejected: object, source: str) -> tuple[Message, ...]:
        """Find the messages with which both conversations begin."""
        if isinstance(chosen, str) or isinstance(rejected, str):
            hh = any(isinstance(value, str) and "\n\nHuman:" in value for value in (chosen, rejected))
            remedy = (
                "read Human/Assistant transcripts with HHPrompts"
                if hh
                else f"add a column {self.prompt_column!r}, or write both completions as lists of messages"
            )
            problem = "is missing, and where the prompt ends cannot be told from plain text"
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


def unusable_pair(pair: RecordedPair | None) -> str | None:
    """Reason why a recorded pair holds no preference; None if it does, or if there is no pair."""
    if pair is None:
        return None
    if not pair.chosen.strip() or not pair.rejected.strip():
        return EMPTY
    return IDENTICAL if pair.chosen == pair.rejected else None


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
