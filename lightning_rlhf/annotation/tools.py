"""Files of annotation tools: pairs for Argilla and potato to show, and the answers that people gave there.

Argilla reads and writes lists of records (``Dataset.records.from_json`` and ``to_json`` of its Python library), potato
items in JSON lines, and answers in a folder per person, with ``user_state.json`` or ``annotated_instances.jsonl``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from lightning_rlhf.annotation.votes import JSON, Screen, Side, Vote, first_shown, item_key, other, verdict_of


Tool = Literal["argilla", "potato"]

ARGILLA: dict[object, Screen] = {"response_1": "left", "response_2": "right", "tie": "tie", "both_bad": "both_bad"}
"""Labels of the question in Argilla."""
_POTATO: dict[object, Screen] = {"A": "left", "B": "right", "tie": "tie"}
_UNSUBMITTED = ("draft", "discarded", "pending")


@dataclass(frozen=True)
class Answer:
    """An answer of a person in an annotation tool.

    Args:
        where: file and row, for messages.
        pair: name of the pair, as `pair_name` made it.
        annotator: name or id of the person in the tool.
        side: the better response by its place on the screen.
        strength: 1 to 3; None if the question does not ask for it.
    """

    where: str
    pair: str
    annotator: str
    side: Screen
    strength: int | None = None


def pair_name(run: str, round_: int, position: int) -> str:
    """Name of a pair in a tool: unique, and it says nothing of the run to those who judge."""
    return item_key(run, f"{round_}/{position}")


def pair_row(tool: Tool, name: str, prompt: str, a: str, b: str) -> JSON:
    """A pair as the tool reads it; which response is the first is a fair coin per pair."""
    texts = {"a": a, "b": b}
    first = _first(name)
    responses = [texts[first], texts[other(first)]]
    if tool == "potato":
        return {"id": name, "text": prompt, "responses": responses}
    fields = {"prompt": prompt, "response_1": responses[0], "response_2": responses[1]}
    return {"id": name, "fields": fields, "metadata": {}, "suggestions": {}, "responses": {}, "vectors": {}}


def vote_of_answer(tool: Tool, answer: Answer) -> Vote:
    """The vote that an answer is; the same answer always has the same uid."""
    first = _first(answer.pair)
    parts = [tool, answer.pair, answer.annotator, answer.side, answer.strength]
    uid = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
    return Vote(uid, answer.annotator, first, verdict_of(answer.side, first), answer.strength)


def read_answers(tool: Tool, path: str, question: str) -> list[Answer]:
    """Read the answers to one question.

    Args:
        tool: the tool that wrote the file.
        path: of Argilla the file of records; of potato the folder ``annotation_output``, or one file in it.
        question: name of the question (Argilla) or annotation scheme (potato).

    Raises:
        ValueError: if there is no such file, a row cannot be read, or nobody answered the question.
    """
    if not Path(path).exists():
        raise ValueError(f"{path}: no such file or folder; give what {tool} wrote")
    asked: set[str] = set()
    found = list((_argilla if tool == "argilla" else _potato)(Path(path), question, asked))
    if not found:
        raise ValueError(
            f"{path}: nobody answered the question {question!r}; its questions with answers are {sorted(asked)}: "
            f"name one of them"
        )
    return found


def argilla_answers(record: Mapping[str, object], question: str, where: str) -> list[Answer]:
    """Submitted answers to one question in a record of Argilla; drafts and discarded ones are left out.

    Raises:
        ValueError: if an answer is none of `ARGILLA`.
    """
    found = []
    for response in _responses(record, where):
        if response.get("question") != question or response.get("status", "submitted") in _UNSUBMITTED:
            continue
        value = response.get("value")
        if value not in ARGILLA:
            raise ValueError(
                f"{where}: question {question!r} has the answer {value!r}; expected one of "
                f"{', '.join(map(str, ARGILLA))}: give the labels of the question these names"
            )
        found.append(Answer(where, str(record.get("id")), str(response.get("user_id")), ARGILLA[value]))
    return found


def _first(name: str) -> Side:
    """The response that stands first."""
    return first_shown("tool", name)


def _responses(record: Mapping[str, object], where: str) -> list[dict[str, object]]:
    """Responses with their question: Argilla writes lists by question, or one list in which each names its question."""
    given = record.get("responses") or {}
    if isinstance(given, Mapping):
        found: list[dict[str, object]] = []
        for name, entries in given.items():
            found += [{"question": name, **entry} for entry in entries]
        return found
    if not isinstance(given, list) or not all(isinstance(entry, dict) for entry in given):
        raise ValueError(f"{where}: 'responses' must be an object of lists: export records by `to_json`")
    return given


def _argilla(path: Path, question: str, asked: set[str]) -> Iterator[Answer]:
    records = _parsed(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(records, list):
        raise ValueError(f"{path}: expected a list of records: export them by `dataset.records.to_json`")
    for number, record in enumerate(records, 1):
        where = f"{path} row {number}"
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected a record, got {record!r:.60}: export by `dataset.records.to_json`")
        asked.update(str(response.get("question")) for response in _responses(record, where))
        yield from argilla_answers(record, question, where)


def _potato(path: Path, question: str, asked: set[str]) -> Iterator[Answer]:
    if path.is_file():
        files = [path]
    else:
        files = []
        for folder in sorted(filter(Path.is_dir, path.iterdir())):
            # the state of a person has what the other file repeats
            given = [folder / name for name in ("user_state.json", "annotated_instances.jsonl")]
            files += [file for file in given if file.is_file()][:1]
    for file in files:
        for where, annotator, pair, schemes in _instances(file):
            asked.update(schemes)
            if question in schemes:
                side, strength = _potato_answer(schemes[question], question, where)
                yield Answer(where, pair, annotator, side, strength)


def _instances(file: Path) -> Iterator[tuple[str, str, str, dict[str, dict[str, object]]]]:
    """Origin, person, id and schemes (value by label) of the instances in a file of potato."""
    text = file.read_text(encoding="utf-8")
    try:
        if file.suffix == ".jsonl":
            for number, line in enumerate(text.splitlines(), 1):
                where = f"{file} row {number}"
                row = cast(dict[str, object], _parsed(line, where))
                user, pair = str(row.get("user_id", file.parent.name)), str(row.get("instance_id", row.get("id")))
                yield where, user, pair, _schemes(row["label_annotations"])
        else:
            state = cast(dict[str, object], _parsed(text, str(file)))
            user = str(state.get("user_id", file.parent.name))
            for pair, labels in cast(dict[str, object], state["instance_id_to_label_to_value"]).items():
                yield f"{file} instance {pair}", user, pair, _schemes(labels)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: {type(error).__name__}: {error}; give potato's annotation_output folder") from error


def _schemes(labels: object) -> dict[str, dict[str, object]]:
    """Values by scheme and label; potato has them nested, or as a list of [{schema, name}, value]."""
    if isinstance(labels, dict):
        return labels
    found: dict[str, dict[str, object]] = {}
    for label, value in cast(list[tuple[dict[str, str], object]], labels):
        found.setdefault(label["schema"], {})[label["name"]] = value
    return found


def _potato_answer(values: Mapping[str, object], question: str, where: str) -> tuple[Screen, int | None]:
    """Side and strength of a pairwise answer: ``selection`` A, B or tie, or a ``scale_value`` of -3 (A) to 3 (B)."""
    if values.get("selection") in _POTATO:
        return _POTATO[values["selection"]], None
    scale = {str(step): step for step in range(-3, 4)}
    step = scale.get(str(values.get("scale_value")))
    if step is None:
        raise ValueError(
            f"{where}: scheme {question!r} has the answer {dict(values)}; expected a selection of A, B or tie, or a "
            f"scale_value from -3 to 3 in whole steps: use the annotation type pairwise"
        )
    # negative numbers are on the left
    return ("tie", None) if step == 0 else ("left" if step < 0 else "right", abs(step))


def _parsed(text: str, where: str) -> object:
    try:
        return cast(object, json.loads(text))
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: is not JSON ({error}); export it again") from error
