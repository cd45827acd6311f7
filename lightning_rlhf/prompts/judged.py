"""Pairs that people judged elsewhere: in the form of HelpSteer3 and RewardBench, of Label Studio and Argilla."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal, cast

from lightning_rlhf.annotation.tools import argilla_answers
from lightning_rlhf.prompts.base import AbstractPromptSource
from lightning_rlhf.prompts.dataset import unusable_pair
from lightning_rlhf.prompts.files import Row, describe, read_rows
from lightning_rlhf.types import Message, PromptRow, RecordedPair


UNDECIDED = "without a verdict"
"""Reason of rows that nobody judged."""


class AbstractJudgedPrompts(AbstractPromptSource):
    """Rows of two responses and verdicts on them; the first response becomes the recorded ``chosen``.

    Args:
        path: local file, folder, or Hub id.
        split: split of a folder or Hub data set.
        limit: take only the first rows, >= 1; null takes all.
    """

    def __init__(self, path: str, split: str = "train", limit: int | None = None) -> None:
        self.path, self.split, self.limit = path, split, limit

    @abstractmethod
    def parse(self, row: Row, source: str) -> PromptRow | None:
        """Read a row; None if nobody judged it.

        Raises:
            ValueError: if a field is missing or of the wrong kind, naming it.
        """

    def load(self) -> list[PromptRow]:
        """Read the rows.

        Raises:
            ValueError: if a row cannot be read, or none can be used.
        """
        self.report.clear()
        found = []
        for source, row in read_rows(self.path, self.split, self.limit):
            parsed = self.parse(row, source)
            reason = UNDECIDED if parsed is None else unusable_pair(parsed.pair)
            if parsed is not None and reason is None:
                found.append(parsed)
            else:
                self.report[str(reason)] += 1
        if not found:
            raise ValueError(f"{self.path}: no row can be used ({dict(self.report)}): check the data")
        return found


class HelpSteerPrompts(AbstractJudgedPrompts):
    """Pairs in the form of HelpSteer3: ``context``, ``response1``, ``response2``, ``overall_preference``.

    Preferences are -3 (response 1 is much better) to 3. P(response 1 preferred) is 1, 1/2 or 0 by the sign of the
    overall preference; with ``people`` it is the share of the people in ``individual_preference`` who prefer it, ties
    1/2.

    Args:
        path: local file, folder, or Hub id such as ``nvidia/HelpSteer3``.
        split: split of a folder or Hub data set.
        limit: take only the first rows, >= 1; null takes all.
        verdict: ``overall`` or ``people``.

    Raises:
        ValueError: if the verdict is another.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        limit: int | None = None,
        verdict: Literal["overall", "people"] = "overall",
    ) -> None:
        super().__init__(path, split, limit)
        if verdict not in ("overall", "people"):
            raise ValueError(f"verdict must be overall or people; got {verdict!r}")
        self.verdict = verdict

    def parse(self, row: Row, source: str) -> PromptRow | None:
        """Read a row."""
        first, second = (_text(row, name, source) for name in ("response1", "response2"))
        context = row.get("context")
        if isinstance(context, str):
            turns: tuple[Message, ...] = ({"role": "user", "content": context},)
        else:
            turns = tuple(_turn(turn, source) for turn in _list(row, "context", source))
        scores = [row.get("overall_preference")]
        if self.verdict == "people":
            scores = [entry.get("score") for entry in _list(row, "individual_preference", source)]
        values = [_first_preferred(score, source) for score in scores if score is not None]
        if not values:
            return None
        pair = RecordedPair(first, second, sum(values) / len(values))
        return PromptRow(source, messages=turns, pair=pair)


class RewardBenchPrompts(AbstractJudgedPrompts):
    """Pairs in the form of RewardBench (arXiv 2403.13787): ``prompt``, ``chosen``, ``rejected`` and ``subset``, texts.

    With `lightning_rlhf.commands.label.LabelRun` they measure a labeler, or a reward, by subset.

    Args:
        path: local file, folder, or Hub id such as ``allenai/reward-bench``.
        split: split of a folder or Hub data set.
        limit: take only the first rows, >= 1; null takes all.
        chat: whether a prompt is the user's turn of a conversation, as the benchmark has it; false takes it as plain
            text, for models without a chat template.
    """

    def __init__(self, path: str, split: str = "filtered", limit: int | None = None, chat: bool = True) -> None:
        super().__init__(path, split, limit)
        self.chat = chat

    def parse(self, row: Row, source: str) -> PromptRow:
        """Read a row."""
        if isinstance(row.get("chosen"), list) and isinstance(row.get("prompt"), str):
            raise ValueError(
                f"{source}: field 'chosen' is a list, as in RewardBench 2, which ranks one response among several: "
                f"write a row for each of its pairs"
            )
        prompt, chosen, rejected = (_text(row, name, source) for name in ("prompt", "chosen", "rejected"))
        subset = row.get("subset")
        turns: tuple[Message, ...] = ({"role": "user", "content": prompt},)
        return PromptRow(
            source,
            text=None if self.chat else prompt,
            messages=turns if self.chat else None,
            pair=RecordedPair(chosen, rejected),
            subset=subset if isinstance(subset, str) else "",
        )


class LabelStudioPrompts(AbstractJudgedPrompts):
    """An export of Label Studio in JSON: tasks of its template for pairwise comparison.

    A task has ``data`` with ``prompt``, ``answer1`` and ``answer2``, and annotations with a result of type
    ``pairwise``; ``left`` is answer 1. P(answer 1 preferred) is the share of the annotations that select it.
    Cancelled annotations are left out.

    Args:
        path: the file, ``.json`` or ``.jsonl``.
        limit: take only the first tasks, >= 1; null takes all.
        prompt: name of the prompt in ``data``.
        left: name of the response on the left.
        right: name of the response on the right.
    """

    def __init__(
        self,
        path: str,
        limit: int | None = None,
        prompt: str = "prompt",
        left: str = "answer1",
        right: str = "answer2",
    ) -> None:
        super().__init__(path, limit=limit)
        self.prompt, self.left, self.right = prompt, left, right

    def parse(self, row: Row, source: str) -> PromptRow | None:
        """Read a task."""
        data = row.get("data")
        if not isinstance(data, Mapping):
            raise ValueError(f"{source}: 'data' must be an object, got {describe(data)}: export tasks as JSON")
        prompt, left, right = (_text(data, name, source) for name in (self.prompt, self.left, self.right))
        values = []
        for annotation in _list(row, "annotations", source):
            # somebody began, and left
            if annotation.get("was_cancelled"):
                continue
            for result in _list(annotation, "result", source):
                if result.get("type") == "pairwise":
                    values.append(_is_left(result.get("value"), source))
        if not values:
            return None
        pair = RecordedPair(left, right, sum(values) / len(values))
        return PromptRow(source, messages=({"role": "user", "content": prompt},), pair=pair)


class ArgillaPrompts(AbstractJudgedPrompts):
    """Records of Argilla (``dataset.records.to_json``) with two responses and a label question on them.

    P(first response preferred) is the mean over the people who submitted an answer: 1 for ``response_1``, 0 for
    ``response_2``, 1/2 for ``tie`` and ``both_bad``.

    Args:
        path: the file, ``.json``.
        limit: take only the first records, >= 1; null takes all.
        question: name of the question.
        prompt: name of the field with the prompt.
        first: name of the field with the first response.
        second: name of the field with the second response.
    """

    def __init__(
        self,
        path: str,
        limit: int | None = None,
        question: str = "preference",
        prompt: str = "prompt",
        first: str = "response_1",
        second: str = "response_2",
    ) -> None:
        super().__init__(path, limit=limit)
        self.question, self.names = question, (prompt, first, second)

    def parse(self, row: Row, source: str) -> PromptRow | None:
        """Read a record."""
        fields = row.get("fields")
        if not isinstance(fields, Mapping):
            raise ValueError(f"{source}: 'fields' must be an object, got {describe(fields)}: export by `to_json`")
        prompt, first, second = (_text(fields, name, source) for name in self.names)
        answers = argilla_answers(row, self.question, source)
        if not answers:
            return None
        values = [{"left": 1.0, "right": 0.0}.get(answer.side, 0.5) for answer in answers]
        pair = RecordedPair(first, second, sum(values) / len(values))
        return PromptRow(source, messages=({"role": "user", "content": prompt},), pair=pair)


def _text(row: Mapping[str, object], name: str, source: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{source}: field {name!r} must be text, got {describe(value)}: name the right field")
    return value


def _list(row: Mapping[str, object], name: str, source: str) -> Sequence[Mapping[str, object]]:
    value = row.get(name)
    if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value):
        raise ValueError(f"{source}: field {name!r} must be a list of objects, got {describe(value)}: correct it")
    return value


def _turn(turn: Mapping[str, object], source: str) -> Message:
    return {"role": _text(turn, "role", source), "content": _text(turn, "content", source)}


def _first_preferred(score: object, source: str) -> float:
    """1, 1/2 or 0 by the sign of a preference from -3 (response 1) to 3."""
    # a boolean is an int to Python
    if isinstance(score, bool) or not isinstance(score, int | float) or not -3 <= score <= 3:
        raise ValueError(f"{source}: a preference must be a number from -3 to 3, got {describe(score)}: correct it")
    return 0.5 if score == 0 else float(score < 0)


def _is_left(value: object, source: str) -> float:
    selected = cast(Mapping[str, object], value).get("selected") if isinstance(value, Mapping) else None
    if selected not in ("left", "right"):
        raise ValueError(
            f"{source}: 'selected' must be left or right, got {describe(selected)}: export pairwise results"
        )
    return float(selected == "left")
