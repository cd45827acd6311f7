"""Rows to prompts for judges and rewards, which read texts: no policy, and so no tokenizer, is involved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lightning_rlhf.prompts.messages import turn_text
from lightning_rlhf.types import NO_RESPONSE, Message, Prompt, PromptRow, Response


SPEAKERS = {"user": "Human", "assistant": "Assistant"}


def text_prompts(rows: Sequence[PromptRow]) -> list[Prompt]:
    """Make prompts, and responses of their recorded pairs, whose token ids are the bytes of their texts in UTF-8.

    No tokenizer is involved, and nothing is cut or left out: ids only tell texts apart. ``Prompt.index`` is the
    position of the row. The text of a conversation is a transcript; its turns are in ``messages`` as well.
    """
    prompts = []
    for index, row in enumerate(rows):
        text = transcript(row.messages) if row.messages is not None else row.text or ""
        recorded = row.pair
        pair = None
        if recorded is not None:
            ends = row.finish_reasons or ("eos", "eos")
            chosen, rejected = text_response(recorded.chosen), text_response(recorded.rejected)
            pair = (replace(chosen, finish_reason=ends[0]), replace(rejected, finish_reason=ends[-1]))
            if row.is_single:
                pair = (pair[0], NO_RESPONSE)
        ids = tuple(text.encode())
        options, columns = row.template_options, row.columns
        prompts.append(
            Prompt(index, ids, text, row.messages, pair, recorded, template_options=options, columns=columns)
        )
    return prompts


def text_response(text: str, source: str = "dataset") -> Response:
    """A response that is known by its text alone; its ids are its bytes in UTF-8, and a 0 at the end."""
    return Response((*text.encode(), 0), text, "eos", source=source)


def transcript(messages: Sequence[Message]) -> str:
    """A conversation as text, one paragraph per turn, up to where the assistant speaks next."""
    turns = [
        f"{SPEAKERS.get(m['role'], m['role'].capitalize())}: {turn_text(m)}" if m["role"] != "system" else turn_text(m)
        for m in messages
    ]
    return "\n\n".join([*turns, "Assistant:"])
