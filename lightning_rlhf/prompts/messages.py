"""Messages of data rows: parsing, and their text where no chat template is involved.

A message keeps all non-empty fields, and the chat template gets them; `lightning_rlhf.prompts.tokenize` checks that it
writes them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Mapping

from lightning_rlhf.prompts.files import Row, describe
from lightning_rlhf.types import FinishReason, Message


ROLE_OF = {"Human": "user", "Assistant": "assistant"}
"""Roles of the speakers in transcripts of HH-RLHF."""

ROLES = ("system", "user", "assistant", "tool", "developer", "function", "ipython", "observation")
TOOLS = "tools"
TEMPLATE_OPTIONS = "chat_template_kwargs"
NO_TEXT = ("image", "images", "video", "videos", "audio", "audios")
"""Columns of rows with more than text."""

RESERVED = ("conversation", "messages", "chat_template", "add_generation_prompt", "tokenize", "continue_final_message")
"""Arguments of the chat template that the library sets, so that a row may not."""


def field_error(source: str, field: str, problem: str, remedy: str) -> ValueError:
    """Build the error for a malformed field: place, problem and remedy."""
    return ValueError(f"{source}: field {field!r} {problem}: {remedy}")


PROMPT_NAMES = ("messages", "question", "query", "instruction", "input", "context", "conversation", "conversations")
"""Names that columns with prompts have in other data sets."""


def likely_prompt(row: Mapping[str, object], ignored: Collection[str] = ()) -> str | None:
    """The column of a row that looks like its prompt, by its name."""
    return next((name for name in PROMPT_NAMES if name not in ignored and isinstance(row.get(name), str | list)), None)


def prompt_remedy(row: Mapping[str, object]) -> str:
    """The remedy for a row without its prompt column."""
    likely = likely_prompt(row)
    return "add it, or set prompt_column" if likely is None else f"set prompt_column={likely} if that is the prompt"


def parse_text(value: object, source: str, field: str) -> str:
    """Check that a value is text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise field_error(source, field, f"must be text, got {describe(value)}", "write a string")
    try:
        # JSON can hold half of a surrogate pair, which no tokenizer or ledger takes
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        problem = f"holds half of a surrogate pair at character {error.start}"
        raise field_error(source, field, problem, "remove it, or write the whole character") from error
    return value


def parse_messages(value: object, source: str, field: str, ignored: Collection[str] = ()) -> tuple[Message, ...]:
    """Check a list of messages, keeping all non-empty fields.

    Args:
        value: the list.
        source: where the row came from.
        field: the column.
        ignored: fields of messages to leave out.

    Raises:
        ValueError: if an entry is no message, naming row, field and number.
    """
    if not isinstance(value, list) or not value:
        problem = f"must be text or a list of messages, got {describe(value)}"
        raise field_error(source, field, problem, 'write a string or [{"role": "user", "content": "..."}]')
    return tuple(_parse_message(message, number, source, field, ignored) for number, message in enumerate(value))


def _parse_message(message: object, number: int, source: str, field: str, ignored: Collection[str]) -> Message:
    place = f"{field}[{number}]"
    remedy = 'write {"role": "user", "content": "..."}'
    if not isinstance(message, dict) or "role" not in message:
        raise field_error(
            source, field, f"has no role and content in message {number + 1}, got {describe(message)}", remedy
        )
    role = message["role"]
    if role not in ROLES:
        problem = f"has an unknown role in message {number + 1}, got {describe(role)}"
        raise field_error(source, field, problem, f"use one of {', '.join(ROLES)}")
    named = {key: kept for key, kept in message.items() if key not in ("role", "content") and key not in ignored}
    others = {key: kept for key, kept in named.items() if kept is not None and kept not in ("", [], {})}
    # an assistant's turn with tool calls may have no content
    content = message.get("content")
    if content is None and not others:
        problem = f"has no role and content in message {number + 1}, got {describe(message)}"
        raise field_error(source, field, problem, remedy)
    if isinstance(content, list):
        content = _joined_parts(content, source, f"{place}.content")
    elif content is not None:
        content = parse_text(content, source, f"{place}.content")
    for key, kept in others.items():
        _check_json(kept, source, f"{place}.{key}")
    return {"role": role, "content": content, **others}


def _joined_parts(parts: list[object], source: str, field: str) -> str:
    """Text of a content that is a list of parts."""
    texts = []
    for number, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("type") != "text" or set(part) - {"type", "text"}:
            problem = f"has a part {number + 1} that is no text, got {describe(part)}"
            raise field_error(source, field, problem, 'models here read text: write {"type": "text", "text": "..."}')
        texts.append(parse_text(part.get("text"), source, f"{field}[{number}].text"))
    return "".join(texts)


def _check_json(value: object, source: str, field: str) -> None:
    """Check that a value can be written as JSON, since ledgers do."""
    try:
        # by default json.dumps writes NaN, which is no JSON, and escapes halves of surrogate pairs
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError) as error:  # UnicodeEncodeError is a ValueError
        problem = f"cannot be written as JSON ({error}), got {describe(value)}"
        raise field_error(source, field, problem, "write text, numbers, lists and objects") from error


def parse_prompt(value: object, source: str, field: str, ignored: Collection[str] = ()) -> str | tuple[Message, ...]:
    """Check a prompt, plain or conversational."""
    if isinstance(value, str):
        return parse_text(value, source, field)
    return without_final_answer(parse_messages(value, source, field, ignored), source, field)


def without_final_answer(messages: tuple[Message, ...], source: str, field: str) -> tuple[Message, ...]:
    """Check that the next turn of a conversation is the assistant's."""
    if messages[-1]["role"] == "assistant":
        problem = "has a prompt that ends with the assistant's turn"
        raise field_error(source, field, problem, "end the prompt with the user's turn; completions hold the answers")
    return messages


def parse_answer(
    value: object, prompt: str | tuple[Message, ...], source: str, field: str, ignored: Collection[str] = ()
) -> Message:
    """Check a completion: text, or the assistant's message, with or without the prompt's messages before it."""
    if isinstance(value, str):
        return {"role": "assistant", "content": parse_text(value, source, field)}
    messages = parse_messages(value, source, field, ignored)
    # TRL allows whole conversations as completions
    if messages[: len(prompt)] == prompt:
        messages = messages[len(prompt) :]
    if [message["role"] for message in messages] != ["assistant"]:
        roles = ", ".join(message["role"] for message in messages) or "none"
        problem = f"must have one message by the assistant after the prompt, got messages by: {roles}"
        raise field_error(source, field, problem, "put earlier turns into the prompt, the same for both completions")
    return messages[0]


def parse_completion(value: object, prompt: str | tuple[Message, ...], source: str, field: str) -> str:
    """Text of a completion; see `parse_answer`."""
    return turn_text(parse_answer(value, prompt, source, field))


def parse_template_options(
    row: Row, source: str, conversational: bool, ignored: Collection[str] = ()
) -> dict[str, object]:
    """Arguments of the chat template that a row gives beside its messages: ``tools`` and ``chat_template_kwargs``.

    Both are objects, or JSON in a string.

    Args:
        row: the row.
        source: where it came from.
        conversational: whether its prompt is a conversation.
        ignored: columns to leave out.

    Raises:
        ValueError: if a column is malformed, goes with a plain prompt, or holds more than text.
    """
    for name in NO_TEXT:
        if name not in ignored and row.get(name) not in (None, "", [], {}):
            raise field_error(source, name, "cannot be read: models here read text", "drop it, or set ignored_fields")
    options: dict[str, object] = {}
    for name, kind in ((TOOLS, list), (TEMPLATE_OPTIONS, dict)):
        value = row.get(name)
        if name in ignored or value in (None, "", [], {}):
            continue
        # Arrow has one type per column, so that data sets store objects as JSON
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise field_error(source, name, f"is no JSON ({error})", "write it as JSON") from error
        if not isinstance(value, kind):
            expected = "a list of tools" if kind is list else "an object"
            raise field_error(source, name, f"must be {expected}, got {describe(value)}", "correct it, or drop it")
        if not conversational:
            problem = "is for the chat template, and the prompt is plain text"
            raise field_error(source, name, problem, "write the prompt as messages, or set ignored_fields")
        _check_json(value, source, name)
        if name == TOOLS:
            options[TOOLS] = value
            continue
        # `options` may hold `tools` from its own column, which must not be replaced silently
        for key in sorted(set(value) & {*RESERVED, *options}):
            raise field_error(source, name, f"may not hold {key!r}", "drop it: the library says so itself")
        options |= value
    return options


def other_columns(row: Row, used: Collection[str]) -> dict[str, object]:
    """Columns for rewards: text, numbers, and lists of them, without those that the source reads itself.

    Values are those of the row, not copies, and names are shared between rows.

    Args:
        row: the row.
        used: columns that the source reads.
    """
    left_out = {*used, TOOLS, TEMPLATE_OPTIONS, *NO_TEXT}
    return {sys.intern(name): value for name, value in row.items() if name not in left_out and _is_plain(value)}


def _is_plain(value: object) -> bool:
    if isinstance(value, list):
        return all(isinstance(item, str | int | float) for item in value)
    return isinstance(value, str | int | float)


def parse_finish_reasons(row: Row, names: tuple[str, ...]) -> tuple[FinishReason, ...]:
    """Finish reasons of the recorded completions of a row; empty if none was cut off by a token limit."""
    found: tuple[FinishReason, ...] = tuple("length" if row.get(name) == "length" else "eos" for name in names)
    return found if "length" in found else ()


def holds_text_alone(message: Message) -> bool:
    """Whether a message has a role and text, and no other field."""
    return isinstance(message["content"], str) and len(message) == 2


def turn_text(message: Message) -> str:
    """A message as text, for judges and transcripts: its content, and its other fields as JSON, one a line."""
    content = message["content"] or ""
    fields = [
        f"[{name}] {kept if isinstance(kept, str) else json.dumps(kept, ensure_ascii=False)}"
        for name, kept in message.items()
        if name not in ("role", "content")
    ]
    return "\n".join([content, *fields] if content else fields)


def split_turns(transcript: str) -> list[Message]:
    """Split a transcript into turns, without white space around each; text before the first mark is a system turn."""
    # [text before, name, content, name, content, ...]
    before, *parts = re.split(r"\n\n(Human|Assistant):", transcript)
    turns = [{"role": "system", "content": before.strip()}] if before.strip() else []
    for name, content in zip(parts[::2], parts[1::2], strict=True):
        turns.append({"role": ROLE_OF[name], "content": content.strip()})
    return turns
