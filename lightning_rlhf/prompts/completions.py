"""Prompts with one completion each, for supervised fine-tuning, in the formats that TRL users know.

Each row is an object with some of these columns; text is a string or a list of ``{"role": ..., "content": ...}``:

- prompt-completion: ``prompt`` and ``completion``;
- conversational: ``messages``, which end with the assistant's turn.
"""

from __future__ import annotations

from typing import Literal

from lightning_rlhf.prompts.base import AbstractPromptSource
from lightning_rlhf.prompts.dataset import EMPTY, field_error, parse_completion, parse_messages, parse_prompt
from lightning_rlhf.prompts.files import Row, read_rows
from lightning_rlhf.types import PromptRow


class DatasetCompletions(AbstractPromptSource):
    """Prompts with completions to imitate, from a file, a folder or the Hugging Face Hub.

    Rows with an empty completion are left out and counted; any other row that cannot be used raises an error which
    names it. Fields that are not listed here are ignored. Preference rows are read with ``completion_column=chosen``,
    and completions of a teacher are what ``lightning-rlhf sample`` and ``export`` write.

    Args:
        path: local .jsonl, .jsonl.gz, .json or .parquet file, local folder, or Hub id such as "owner/name".
        split: split of a folder or of a Hub data set; a single file has none.
        limit: read only the first rows of the data, >= 1; null reads all.
        prompt_column: name of the column with the prompt.
        completion_column: name of the column with the completion.
        messages_column: name of the column with whole conversations; used for rows that have no completion.
        turns: which of the assistant's turns in a conversation to learn: the ``last``, or ``all``, each a row of its
            own with the turns before it as the prompt.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        limit: int | None = None,
        prompt_column: str = "prompt",
        completion_column: str = "completion",
        messages_column: str = "messages",
        turns: Literal["last", "all"] = "last",
    ) -> None:
        self.path, self.split, self.limit = path, split, limit
        self.prompt_column, self.completion_column = prompt_column, completion_column
        self.messages_column, self.turns = messages_column, turns

    def load(self) -> list[PromptRow]:
        """Read and check all rows, in the order of the data.

        Raises:
            ValueError: if the data is missing or empty, or has a malformed row (named with its number).
        """
        self.report.clear()
        kept = []
        for source, row in read_rows(self.path, self.split, self.limit):
            for parsed in self._parse(row, source):
                if (parsed.completion or "").strip():
                    kept.append(parsed)
                else:
                    self.report[EMPTY] += 1
        if not kept:
            raise ValueError(f"{self.path}: no row can be used ({dict(self.report)}): check the data")
        return kept

    def _parse(self, row: Row, source: str) -> list[PromptRow]:
        completion = row.get(self.completion_column)
        if completion is None:
            return self._conversation(row, source)
        if row.get(self.prompt_column) is None:
            raise field_error(source, self.prompt_column, "is missing", "add it, or set prompt_column")
        prompt = parse_prompt(row[self.prompt_column], source, self.prompt_column)
        if isinstance(prompt, str) and isinstance(completion, list):
            prompt = ({"role": "user", "content": prompt},)
        text = parse_completion(completion, prompt, source, self.completion_column)
        if isinstance(prompt, str):
            return [PromptRow(source, text=prompt, completion=text)]
        return [PromptRow(source, messages=prompt, completion=text)]

    def _conversation(self, row: Row, source: str) -> list[PromptRow]:
        if row.get(self.messages_column) is None:
            problem = f"and {self.messages_column!r} are both missing among {sorted(row)}"
            raise field_error(source, self.completion_column, problem, "add one, or set completion_column")
        messages = parse_messages(row[self.messages_column], source, self.messages_column)
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            problem = "does not end with the assistant's answer to something"
            raise field_error(source, self.messages_column, problem, "add the answer, or drop the row")
        places = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > 0]
        return [
            PromptRow(source, messages=messages[:i], completion=messages[i]["content"])
            for i in (places if self.turns == "all" else places[-1:])
            if messages[i - 1]["role"] != "assistant"
        ]
