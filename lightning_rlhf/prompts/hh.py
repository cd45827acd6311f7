"""Preference pairs from Human/Assistant transcripts, the format of Anthropic's HH-RLHF (arXiv 2204.05862)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

from lightning_rlhf.prompts.base import AbstractPromptSource
from lightning_rlhf.prompts.dataset import parse_number, parse_probability, unusable_pair
from lightning_rlhf.prompts.files import Row, local_files, read_rows, stream_rows
from lightning_rlhf.prompts.formats import SourcedRow
from lightning_rlhf.prompts.messages import field_error, parse_finish_reasons, parse_text, split_turns
from lightning_rlhf.prompts.parts import Part, rows_of_part
from lightning_rlhf.types import Message, PromptRow, RecordedPair


class HHPrompts(AbstractPromptSource):
    r"""Conversations with a better and a worse last answer, from files in the format of HH-RLHF.

    A row has ``chosen`` and ``rejected``, each a transcript ``"\n\nHuman: ...\n\nAssistant: ..."``. All turns but the
    last become the prompt. ``probability`` or ``label``, and ``weight``, are read as `DatasetPrompts` reads them.
    Transcripts that break the format are left out and counted in `report` by reason; a row whose fields are missing or
    no text raises an error. A turn that quotes ``"\n\nHuman:"`` is split in two.

    Args:
        path: local .jsonl, .jsonl.gz, .json or .parquet file, local folder, or Hub id such as "Anthropic/hh-rlhf".
        limit: read only the first rows of the data, >= 1; null reads all.
        split: split of a folder or of a Hub data set; a single file has none.
        part: ``train`` or ``heldout`` takes one side of data that came without a split; ``all`` takes both.
        heldout_share: share of the conversations that ``part`` holds out, by a hash of their first turn, in (0, 1).
    """

    def __init__(
        self,
        path: str,
        limit: int | None = None,
        split: str = "train",
        part: Part = "all",
        heldout_share: float = 0.2,
    ) -> None:
        self.path = path
        self.limit = limit
        self.split = split
        self.part: Part = part
        self.heldout_share = heldout_share

    def load(self) -> list[PromptRow]:
        """Read all rows and parse their transcripts, in the order of the data.

        Raises:
            ValueError: if the data is missing, or a row lacks a transcript, or no row can be used.
        """
        self.report.clear()
        kept = list(self._usable(read_rows(self.path, self.split, self.limit)))
        return rows_of_part(kept, self.part, self.heldout_share)

    def stream(self) -> Iterator[PromptRow]:
        """The rows of `load`, one after another."""
        if self.part != "all":  # a part of the rows may be empty
            yield from self.load()
            return
        self.report.clear()
        yield from self._usable(stream_rows(self.path, self.split, self.limit))

    def data_files(self) -> list[Path]:
        """Local files of the rows."""
        return local_files(self.path)

    def _usable(self, rows: Iterable[SourcedRow]) -> Iterator[PromptRow]:
        """The rows that can be used, parsed; the others are counted."""
        count, used = 0, False
        for source, row in rows:
            count += 1
            parsed = parse_pair(row, source)
            if isinstance(parsed, PromptRow):
                used = True
                yield parsed
            else:
                self.report[parsed] += 1
        if not used:
            raise ValueError(
                f"{self.path}: none of {count} rows can be used ({dict(self.report)}): HHPrompts reads transcripts "
                f"'\\n\\nHuman: ...\\n\\nAssistant: ...'; use DatasetPrompts for other formats"
            )


def parse_pair(row: Row, source: str) -> PromptRow | str:
    """Parse the two transcripts of a row; a text is the reason why it cannot be used."""
    for field in ("chosen", "rejected"):
        if field not in row:
            raise field_error(source, field, f"is missing among {sorted(row)}", "HHPrompts needs chosen and rejected")
    chosen = split_turns(parse_text(row["chosen"], source, "chosen"))
    rejected = split_turns(parse_text(row["rejected"], source, "rejected"))
    for turns in (chosen, rejected):
        problem = find_problem(turns)
        if problem is not None:
            return problem
    if chosen[:-1] != rejected[:-1]:
        return "prompts differ"
    weight = parse_number(row, "weight", source, math.inf, default=1.0)
    pair = RecordedPair(chosen[-1]["content"], rejected[-1]["content"], parse_probability(row, source), weight)
    reasons = parse_finish_reasons(row, ("finish_reason_chosen", "finish_reason_rejected"))
    return unusable_pair(pair) or PromptRow(source, messages=tuple(chosen[:-1]), pair=pair, finish_reasons=reasons)


def find_problem(turns: list[Message]) -> str | None:
    """Reason why turns break the format, or None: Human first, alternating, Assistant last, no empty turn before."""
    roles = [turn["role"] for turn in turns]
    if roles[:1] != ["user"]:
        return "does not begin with Human"
    if roles[-1] != "assistant":
        return "does not end with Assistant"
    if any(first == second for first, second in pairwise(roles)):
        return "turns do not alternate"
    # an empty last turn is no broken transcript: `unusable_pair` reports the empty completion
    if not all(turn["content"] for turn in turns[:-1]):
        return "empty turn in the prompt"
    return None
