"""Row formats of well-known data sets, turned into TRL's columns: ``prompt``, ``chosen``, ``rejected``, ``completion``.

A format is known by its columns. Scores and rankings become one pair per prompt, of the best and the worst answer; an
equal verdict holds no preference, and is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeAlias

from lightning_rlhf.prompts.files import Row, describe
from lightning_rlhf.prompts.messages import field_error, split_turns
from lightning_rlhf.types import Message


SourcedRow: TypeAlias = tuple[str, Row]
"""Origin of a row, for messages, and the row."""

Converter: TypeAlias = Callable[[str, Row], Row | str]
"""From the origin of a row and the row to columns of TRL, or to the reason why the row is left out."""

NO_PREFERENCE = "answers with the same score"
ONE_ANSWER = "fewer than two answers"

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}


@dataclass(frozen=True)
class RowFormat:
    """A row format.

    Args:
        name: its name, for messages.
        columns: columns by which it is known.
        convert: makes columns of TRL of a row.
        has_pairs: whether its rows hold two answers.
        by_prompt: whether an answer is a row, so that the adjacent rows of a prompt are read together.
    """

    name: str
    columns: frozenset[str]
    convert: Converter
    has_pairs: bool = True
    by_prompt: bool = False


def convert_rows(
    form: RowFormat, rows: Sequence[SourcedRow], report: Counter[str], names: Mapping[str, str]
) -> list[SourcedRow]:
    """Turn rows of a format into rows with the columns of TRL; other columns stay.

    Args:
        form: the format.
        rows: the rows, with their origin.
        report: receives the number of rows that are left out, by reason.
        names: names of the columns of TRL, where they differ.

    Raises:
        ValueError: if a row is malformed; the message names it.
    """
    found = []
    for source, row in _joined(rows) if form.by_prompt else rows:
        made = form.convert(source, row)
        if isinstance(made, str):
            report[made] += 1
            continue
        others = {name: row[name] for name in row if name not in form.columns}
        found.append((source, others | {names.get(name, name): value for name, value in made.items()}))
    return found


def format_of(columns: Collection[str], pairs: bool) -> RowFormat | None:
    """The format that has these columns, the most specific first; None if there is none.

    Args:
        columns: columns of the rows.
        pairs: ask for formats with two answers alone.
    """
    known = [form for form in FORMATS if form.columns <= set(columns) and (form.has_pairs or not pairs)]
    return max(known, key=lambda form: len(form.columns), default=None)


def resemblance(columns: Collection[str]) -> str:
    """The formats that columns look like, in one line: those with all of their columns, else the nearest one."""
    have = set(columns)
    whole = [name for name, needed in KNOWN_COLUMNS.items() if needed <= have]
    if whole:
        return f"its columns look like {' or '.join(whole)}"
    # share of the columns that are there; the first of equals
    name = max(KNOWN_COLUMNS, key=lambda name: len(KNOWN_COLUMNS[name] & have) / len(KNOWN_COLUMNS[name]))
    shared = KNOWN_COLUMNS[name] & have
    if not shared:
        return "its columns look like no known format"
    lacking = ", ".join(sorted(KNOWN_COLUMNS[name] - have))
    return f"its columns look most like {name}, without {lacking}"


def _joined(rows: Sequence[SourcedRow]) -> list[SourcedRow]:
    """Adjacent rows of one prompt as one row, with the rows in a list."""
    found: list[SourcedRow] = []
    for _, same in groupby(rows, key=lambda row: row[1].get("prompt")):
        own = list(same)
        source, first = own[0]
        found.append((source, {**first, "rows": [row for _, row in own]}))
    return found


# -- pairs -------------------------------------------------------------------------------------------------------------


def best_and_worst(prompt: object, answers: Sequence[object], scores: Sequence[float]) -> Row | str:
    """The pair of the answers with the highest and the lowest score; the first of equals."""
    if len(answers) < 2:
        return ONE_ANSWER
    best = max(range(len(scores)), key=lambda place: scores[place])
    worst = min(range(len(scores)), key=lambda place: scores[place])
    if scores[best] == scores[worst]:
        return NO_PREFERENCE
    return {"prompt": prompt, "chosen": answers[best], "rejected": answers[worst]}


def _number(value: object, source: str, field: str) -> float:
    # a boolean is a number to Python, and no score
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise field_error(source, field, f"must be a number, got {describe(value)}", "correct it, or drop the row")
    return float(value)


def _objects(row: Row, source: str, field: str, needed: Collection[str]) -> list[Row]:
    """A column that is a list of objects with some fields."""
    value = row[field]
    fits = isinstance(value, list) and all(isinstance(item, Mapping) and set(needed) <= set(item) for item in value)
    if not fits:
        problem = f"must be a list of objects with {', '.join(sorted(needed))}, got {describe(value)}"
        raise field_error(source, field, problem, "correct it, or drop the row")
    return [dict(item) for item in value]


def _ultrafeedback(source: str, row: Row) -> Row | str:
    answers = _objects(row, source, "completions", {"response", "overall_score"})
    scores = [_number(answer["overall_score"], source, "completions.overall_score") for answer in answers]
    return best_and_worst(row["instruction"], [answer["response"] for answer in answers], scores)


def _nectar(source: str, row: Row) -> Row | str:
    answers = _objects(row, source, "answers", {"answer", "rank"})
    # rank 1 is the best
    scores = [-_number(answer["rank"], source, "answers.rank") for answer in answers]
    return best_and_worst(_transcript(row["prompt"]), [answer["answer"] for answer in answers], scores)


def _transcript(prompt: object) -> object:
    """A prompt in the format of HH as messages; other prompts as they are."""
    if not isinstance(prompt, str) or "\n\nHuman:" not in prompt:
        return prompt
    turns = split_turns(prompt)
    # it ends where the assistant speaks
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def _helpsteer2(source: str, row: Row) -> Row | str:
    rows = row["rows"]
    scores = [_number(each["helpfulness"], source, "helpfulness") for each in rows]
    return best_and_worst(row["prompt"], [each["response"] for each in rows], scores)


def _by_strength(prompt: object, first: object, second: object, strength: float) -> Row | str:
    # from -3, the first is much better, to 3, the second is
    return best_and_worst(prompt, [first, second], [-strength, strength])


def _helpsteer2_preference(source: str, row: Row) -> Row | str:
    strength = _number(row["preference_strength"], source, "preference_strength")
    return _by_strength(row["prompt"], row["response_1"], row["response_2"], strength)


def _helpsteer3(source: str, row: Row) -> Row | str:
    strength = _number(row["overall_preference"], source, "overall_preference")
    return _by_strength(row["context"], row["response1"], row["response2"], strength)


def _sharegpt_preference(source: str, row: Row) -> Row | str:
    chosen, rejected = (_turns([row[name]], source, name) for name in ("chosen", "rejected"))
    return {"prompt": _turns(row["conversations"], source, "conversations"), "chosen": chosen, "rejected": rejected}


def _alpaca_preference(source: str, row: Row) -> Row | str:
    return {"prompt": _instruction(source, row), "chosen": row["chosen"], "rejected": row["rejected"]}


# -- single answers ----------------------------------------------------------------------------------------------------


def _sharegpt(source: str, row: Row) -> Row | str:
    turns = _turns(row["conversations"], source, "conversations")
    prompt = turns[:-1] if turns[-1]["role"] == "assistant" else turns
    return {"prompt": prompt, "messages": turns} if prompt else ONE_ANSWER


def _turns(value: object, source: str, field: str) -> list[Message]:
    """Turns of ShareGPT, ``{"from": "human", "value": ...}``, as messages."""
    if not isinstance(value, list) or not value:
        raise field_error(source, field, f"must be a list of turns, got {describe(value)}", "correct it")
    found = []
    for turn in value:
        known = isinstance(turn, Mapping) and turn.get("from") in SHAREGPT_ROLES and isinstance(turn.get("value"), str)
        if not known:
            problem = f"has a turn that is none of ShareGPT's, got {describe(turn)}"
            raise field_error(source, field, problem, 'write {"from": "human", "value": "..."}')
        found.append({"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]})
    return found


def _alpaca(source: str, row: Row) -> Row | str:
    return {"prompt": _instruction(source, row), "completion": row["output"]}


def _instruction(source: str, row: Row) -> str:
    """Instruction of Alpaca, with its input in a paragraph of its own."""
    parts = [row["instruction"], row.get("input") or ""]
    if not all(isinstance(part, str) for part in parts):
        raise field_error(source, "instruction", f"must be text, got {describe(parts)}", "correct it")
    return "\n\n".join(part for part in parts if part)


FORMATS = (
    RowFormat("UltraFeedback", frozenset({"instruction", "completions"}), _ultrafeedback),
    RowFormat("Nectar", frozenset({"prompt", "answers"}), _nectar),
    RowFormat("HelpSteer3", frozenset({"context", "response1", "response2", "overall_preference"}), _helpsteer3),
    RowFormat(
        "HelpSteer2 preferences",
        frozenset({"prompt", "response_1", "response_2", "preference_strength"}),
        _helpsteer2_preference,
    ),
    RowFormat("HelpSteer2 scores", frozenset({"prompt", "response", "helpfulness"}), _helpsteer2, by_prompt=True),
    RowFormat("ShareGPT pairs", frozenset({"conversations", "chosen", "rejected"}), _sharegpt_preference),
    RowFormat("Alpaca pairs", frozenset({"instruction", "chosen", "rejected"}), _alpaca_preference),
    RowFormat("ShareGPT", frozenset({"conversations"}), _sharegpt, has_pairs=False),
    RowFormat("Alpaca", frozenset({"instruction", "output"}), _alpaca, has_pairs=False),
)
"""Formats that are converted, by their columns."""

KNOWN_COLUMNS: dict[str, frozenset[str]] = {
    **{form.name: form.columns for form in FORMATS},
    "preference pairs (DatasetPrompts)": frozenset({"chosen", "rejected"}),
    "single completions (DatasetCompletions)": frozenset({"prompt", "completion"}),
    "single completions with labels (DatasetUnpaired)": frozenset({"prompt", "completion", "label"}),
    "conversations (DatasetCompletions)": frozenset({"messages"}),
    "prompts (DatasetPrompts)": frozenset({"prompt"}),
}
"""Columns of all formats that are read, by name; for messages."""
