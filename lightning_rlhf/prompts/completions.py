"""Prompts with one completion each, for supervised fine-tuning, in the formats that TRL users know.

Each row is an object with some of these columns; text is a string or a list of ``{"role": ..., "content": ...}``:

- prompt-completion: ``prompt`` and ``completion``;
- conversational: ``messages``, which end with the assistant's turn;
- rows of ShareGPT and Alpaca (`lightning_rlhf.prompts.formats`);
- optional: ``finish_reason``, "length" where a token limit cut the completion off, so that no end of turn follows;
- optional, with conversations: ``tools`` and ``chat_template_kwargs``, for the chat template.

Messages may have other fields and roles, such as ``tool_calls`` and ``tool``: the chat template gets them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from lightning_rlhf.prompts.base import AbstractPromptSource, note_data
from lightning_rlhf.prompts.dataset import EMPTY, columns_of
from lightning_rlhf.prompts.files import DatasetFiles, Row, describe, name_of, read_rows
from lightning_rlhf.prompts.formats import SourcedRow, convert_rows, format_of, resemblance
from lightning_rlhf.prompts.messages import (
    TEMPLATE_OPTIONS,
    TOOLS,
    field_error,
    holds_text_alone,
    parse_answer,
    parse_finish_reasons,
    parse_messages,
    parse_prompt,
    parse_template_options,
    prompt_remedy,
    turn_text,
)
from lightning_rlhf.types import FinishReason, Message, PromptRow


UNPROMPTED = "assistant turns that begin a conversation"
UNANSWERABLE = "assistant turns behind another"


class DatasetCompletions(AbstractPromptSource):
    """Prompts with completions to imitate, from a file, a folder or the Hugging Face Hub.

    Rows with an empty completion are left out and counted; any other row that cannot be used raises an error which
    names it. Columns that are not listed here are ignored. Preference rows are read with ``completion_column=chosen``,
    and completions of a teacher come from ``lightning-rlhf sample`` and ``export``.

    Args:
        path: local .jsonl, .json, .csv (each also .gz) or .parquet file, which may have ``*``, local folder, or Hub id
            such as "owner/name"; several of them as a list; `DatasetFiles`, the arguments of `load_dataset`; or rows in
            memory, as a list of dictionaries or a `datasets.Dataset`.
        split: split of a folder or of a Hub data set; a single file has none.
        limit: read only the first rows of the data, >= 1; null reads all.
        prompt_column: name of the column with the prompt.
        completion_column: name of the column with the completion.
        messages_column: name of the column with whole conversations; used for rows that have no completion.
        turns: which of the assistant's turns in a conversation to learn: the ``last``, or ``all``, each a row of its
            own with the turns before it as the prompt.
        ignored_fields: fields of messages, and columns for the chat template, to leave out.
    """

    def __init__(
        self,
        path: str | list[str] | DatasetFiles | Sequence[Mapping[str, object]],
        split: str = "train",
        limit: int | None = None,
        prompt_column: str = "prompt",
        completion_column: str = "completion",
        messages_column: str = "messages",
        turns: Literal["last", "all"] = "last",
        ignored_fields: list[str] | None = None,
    ) -> None:
        self.path, self.split, self.limit = name_of(path), split, limit
        self._data = path
        note_data(self, path)
        self.prompt_column, self.completion_column = prompt_column, completion_column
        self.messages_column, self.turns = messages_column, turns
        self.ignored_fields = tuple(ignored_fields or ())
        self.format_name: str | None = None
        """Format that the last `load` has converted; None if rows were as they are read."""
        self.unread_columns: list[str] = []
        """Columns that the last `load` has left out."""

    def load(self) -> list[PromptRow]:
        """Read and check all rows, in the order of the data.

        Raises:
            ValueError: if the data is missing or empty, or has a malformed row (named with its number).
        """
        self.report.clear()
        kept = []
        rows = self._in_known_format(read_rows(self._data, self.split, self.limit))
        self.unread_columns = [name for name in columns_of(rows) if name not in self._read_columns]
        for source, row in rows:
            for parsed in self._parse(row, source):
                if (parsed.completion or "").strip():
                    kept.append(parsed)
                else:
                    self.report[EMPTY] += 1
        if not kept:
            raise ValueError(f"{self.path}: no row can be used ({dict(self.report)}): check the data")
        return kept

    @property
    def _read_columns(self) -> set[str]:
        """Columns that this source itself reads."""
        used = {self.prompt_column, self.completion_column, self.messages_column, "label", TOOLS, TEMPLATE_OPTIONS}
        return used | {"finish_reason", f"finish_reason_{self.completion_column}", *self.ignored_fields}

    def _in_known_format(self, rows: list[SourcedRow]) -> list[SourcedRow]:
        """Rows of ShareGPT and Alpaca as rows of this source."""
        columns, self.format_name = columns_of(rows), None
        if self.completion_column in columns or self.messages_column in columns:
            return rows
        form = format_of(columns, pairs=False)
        if form is None or form.has_pairs:
            remedy = "set completion_column or messages_column to the name in the data"
            if "text" in columns:
                remedy = "a text alone is not read; split it into 'prompt' and 'completion', or give 'messages'"
            elif {"chosen", "rejected"} <= set(columns):
                remedy = "of preference pairs, completion_column=chosen reads the chosen response"
            raise ValueError(
                f"{self.path}: no column {self.completion_column!r} or {self.messages_column!r}; its columns are "
                f"{columns}; {resemblance(columns)}: {remedy}"
            )
        self.format_name = form.name
        names = {"completion": self.completion_column, "messages": self.messages_column, "prompt": self.prompt_column}
        return convert_rows(form, rows, self.report, names)

    def _parse(self, row: Row, source: str) -> list[PromptRow]:
        completion = row.get(self.completion_column)
        if completion is None:
            return self._conversation(row, source)
        if row.get(self.prompt_column) is None:
            raise field_error(source, self.prompt_column, "is missing", prompt_remedy(row))
        # the unpaired format of KTO: a bad completion must not be imitated
        if isinstance(row.get("label"), bool):
            problem = f"says whether the completion is a good one, got {describe(row['label'])}"
            remedy = "read such rows with DatasetUnpaired, for KTO; or keep the good ones and drop the column"
            raise field_error(source, "label", problem, remedy)
        prompt = parse_prompt(row[self.prompt_column], source, self.prompt_column, self.ignored_fields)
        # a text prompt beside messages is the user's turn (so in many data sets on the Hub)
        if isinstance(prompt, str) and isinstance(completion, list):
            prompt = ({"role": "user", "content": prompt},)
        answer = parse_answer(completion, prompt, source, self.completion_column, self.ignored_fields)
        # exported preference rows, read with completion_column=chosen, have finish_reason_chosen
        names = (
            ("finish_reason",)
            if self.completion_column == "completion"
            else (f"finish_reason_{self.completion_column}",)
        )
        return [self._row(row, source, prompt, answer, parse_finish_reasons(row, names))]

    def _row(
        self,
        row: Row,
        source: str,
        prompt: str | tuple[Message, ...],
        answer: Message,
        finish_reasons: tuple[FinishReason, ...] = (),
    ) -> PromptRow:
        conversational = not isinstance(prompt, str)
        return PromptRow(
            source,
            text=prompt if isinstance(prompt, str) else None,
            messages=None if isinstance(prompt, str) else prompt,
            completion=turn_text(answer),
            template_options=parse_template_options(row, source, conversational, self.ignored_fields),
            # `completion` holds plain text already; a message with other fields is kept for the chat template
            answers=() if holds_text_alone(answer) else (answer,),
            finish_reasons=finish_reasons,
        )

    def _conversation(self, row: Row, source: str) -> list[PromptRow]:
        if row.get(self.messages_column) is None:
            problem = f"and {self.messages_column!r} are both missing among {sorted(row)}"
            raise field_error(source, self.completion_column, problem, "add one, or set completion_column")
        messages = parse_messages(row[self.messages_column], source, self.messages_column, self.ignored_fields)
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            problem = "does not end with the assistant's answer"
            raise field_error(source, self.messages_column, problem, "add the answer, or drop the row")
        places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        rows = []
        # turn i is the completion, turns 0 to i - 1 are its prompt
        for i in places if self.turns == "all" else places[-1:]:
            if i == 0:
                self.report[UNPROMPTED] += 1
            elif messages[i - 1]["role"] == "assistant":  # its prompt would end with the assistant's turn
                self.report[UNANSWERABLE] += 1
            else:
                # finish_reason is that of the conversation's end: earlier turns were answered, so they are whole
                reasons = parse_finish_reasons(row, ("finish_reason",)) if i == places[-1] else ()
                rows.append(self._row(row, source, messages[:i], messages[i], reasons))
        return rows
