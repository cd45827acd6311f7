"""Rewards that check a response by a rule: the right answer, a pattern, a JSON schema, a length."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_rlhf.rewards.base import AbstractReward, RewardOutput
from lightning_rlhf.types import Prompt, Response


if TYPE_CHECKING:
    from jsonschema.protocols import Validator

SECONDS = 5
"""Time that math-verify may take to read or to compare one answer."""


class ExactAnswerReward(AbstractReward):
    r"""1 for a response with the right answer, 0 for any other; answers are compared as mathematics (math-verify).

    math-verify reads numbers, expressions and LaTeX, of which the last or the boxed one in the response is taken, so
    that "1,000", "\boxed{10^3}" and "1000.0" are equal. It needs ``pip install "lightning-rlhf[rewards]"``.

    Args:
        column: column of the data with the right answer.
        column_pattern: regular expression whose first group is the answer in the column, such as ``#### (.+)`` for
            GSM8K; of several matches the last counts. Default: the whole text.
        answer_pattern: the same for the response; a response that it does not match is wrong. Default: the whole
            response.

    Raises:
        ModuleNotFoundError: if math-verify is not installed.
        ValueError: if a pattern is not one, or has no group.
    """

    def __init__(
        self, column: str = "answer", column_pattern: str | None = None, answer_pattern: str | None = None
    ) -> None:
        _needs("math_verify", "ExactAnswerReward")
        self.column = column
        self._column = _compiled(column_pattern, "ExactAnswerReward.column_pattern", groups=1)
        self._answer = _compiled(answer_pattern, "ExactAnswerReward.answer_pattern", groups=1)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Check that every row has an answer.

        Raises:
            ValueError: naming the row without one.
        """
        for prompt in prompts:
            self._gold(prompt)

    def columns_read(self, names: Sequence[str]) -> set[str]:
        """The column with the answer."""
        return set(names) & {self.column}

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        """Compare the answer of each response with that of its row."""
        right = [float(self._is_right(p, r.text)) for p, r in zip(prompts, responses, strict=True)]
        return RewardOutput(torch.tensor(right, dtype=torch.float64))

    def _is_right(self, prompt: Prompt, response: str) -> bool:
        gold = self._gold(prompt)
        answer = _found(self._answer, response)
        if answer is None:
            return False
        if not parsed(gold):
            raise ValueError(
                f"ExactAnswerReward: prompt {prompt.index} has {gold[:80]!r} as its {self.column!r}, in which "
                f"math-verify finds no number and no expression: set column_pattern, or drop the row"
            )
        return same_value(gold, answer)

    def _gold(self, prompt: Prompt) -> str:
        value = prompt.columns.get(self.column)
        if value is None:
            known = ", ".join(prompt.columns) or "no other columns"
            raise ValueError(
                f"ExactAnswerReward reads the column {self.column!r}, which prompt {prompt.index} lacks (it has "
                f"{known}): set column to the name in the data, or read prompts with DatasetPrompts, which keeps them"
            )
        gold = _found(self._column, str(value))
        if gold is None:
            raise ValueError(
                f"ExactAnswerReward: {self.column!r} of prompt {prompt.index}, {str(value)[-80:]!r}, does not match "
                f"column_pattern: correct the pattern, or drop the row"
            )
        return gold


class PatternReward(AbstractReward):
    """1 for a response that matches a regular expression, 0 for any other.

    Args:
        pattern: the regular expression; ``.`` matches newlines, ``^`` and ``$`` match at lines.
        whole: the whole response must match, white space around it left out; default: a part of it.

    Raises:
        ValueError: if it is no regular expression.
    """

    def __init__(self, pattern: str, whole: bool = False) -> None:
        self.whole = whole
        self._pattern = _compiled(pattern, "PatternReward.pattern")

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        """Match each response; the prompts are not read."""
        del prompts
        assert self._pattern is not None
        match = self._pattern.fullmatch if self.whole else self._pattern.search
        found = [match(response.text.strip()) is not None for response in responses]
        return RewardOutput(torch.tensor(found, dtype=torch.float64))


class JSONSchemaReward(AbstractReward):
    """1 for a response that is JSON and fits a schema, 0 for any other.

    The response is JSON itself, or holds it in its last fenced block. It needs
    ``pip install "lightning-rlhf[rewards]"``.

    Args:
        schema: the schema, as JSON or as the path of a ``.json`` file; default: that of the row, see ``column``.
        column: column of the data with the schema of each row, as JSON text.
        readable: reward of JSON that does not fit, in [0, 1].

    Raises:
        ModuleNotFoundError: if jsonschema is not installed.
        ValueError: unless exactly one of ``schema`` and ``column`` is given, or if the schema is not one.
    """

    def __init__(self, schema: str | None = None, column: str | None = None, readable: float = 0.0) -> None:
        _needs("jsonschema", "JSONSchemaReward")
        if (schema is None) == (column is None):
            raise ValueError("JSONSchemaReward needs either a schema or the column that holds it; give one of the two")
        if not 0 <= readable <= 1:
            raise ValueError(f"JSONSchemaReward.readable must be in [0, 1]; got {readable}")
        self.column, self.readable = column, readable
        self._schema: str | None = None
        if schema is not None:
            self._schema = Path(schema).read_text(encoding="utf-8") if schema.endswith(".json") else schema
            validator(self._schema)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Check that every row has a schema, where rows have their own.

        Raises:
            ValueError: naming the row without one.
        """
        for prompt in prompts:
            self._validator(prompt)

    def columns_read(self, names: Sequence[str]) -> set[str]:
        """The column with the schema."""
        return set(names) & {self.column}

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        """Read and check each response."""
        scores = []
        for prompt, response in zip(prompts, responses, strict=True):
            found = read_json(response.text)
            fits = found is not None and self._validator(prompt).is_valid(found[0])
            scores.append(1.0 if fits else self.readable if found is not None else 0.0)
        return RewardOutput(torch.tensor(scores, dtype=torch.float64))

    def _validator(self, prompt: Prompt) -> Validator:
        if self._schema is not None:
            return validator(self._schema)
        assert self.column is not None
        schema = prompt.columns.get(self.column)
        if not isinstance(schema, str):
            raise ValueError(
                f"JSONSchemaReward reads the column {self.column!r}, which prompt {prompt.index} lacks: add the schema "
                f"as JSON text, or set schema"
            )
        return validator(schema)


class LengthReward(AbstractReward):
    """A penalty on long responses: DAPO's soft overlong punishment (arXiv 2503.14476, equation 13).

    0 up to ``most_tokens`` - ``buffer_tokens``, then a line down to -1 at ``most_tokens``, and -1 beyond.

    Args:
        most_tokens: length from which the penalty is full, tokens, >= 1.
        buffer_tokens: tokens over which the penalty grows, from 0 to ``most_tokens``.

    Raises:
        ValueError: if a length is out of range.
    """

    def __init__(self, most_tokens: int, buffer_tokens: int = 0) -> None:
        if most_tokens < 1 or not 0 <= buffer_tokens <= most_tokens:
            raise ValueError(
                f"LengthReward needs most_tokens >= 1 and buffer_tokens from 0 to most_tokens; got {most_tokens} and "
                f"{buffer_tokens}"
            )
        self.most_tokens, self.buffer_tokens = most_tokens, buffer_tokens

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        """Score each response by its length in tokens, EOS included."""
        del prompts
        lengths = torch.tensor([len(response.ids) for response in responses])
        return RewardOutput(overlong_penalty(lengths, self.most_tokens, self.buffer_tokens))


def overlong_penalty(lengths: Tensor, most: int, buffer: int) -> Tensor:
    """Penalty of responses by their length, in [-1, 0], float64; DAPO, equation 13.

    Args:
        lengths: lengths, tokens, [B].
        most: L_max, tokens.
        buffer: L_cache, tokens; 0 makes a step behind L_max.
    """
    # 0 for |y| <= L_max - L_cache; (L_max - L_cache - |y|) / L_cache up to L_max; -1 beyond
    over = lengths.double() - (most - buffer)
    if buffer == 0:
        return -(over > 0).double()
    return -(over / buffer).clamp(0.0, 1.0)


def read_json(text: str) -> tuple[object] | None:
    """JSON in a text, as a tuple of one since null is JSON, too; None if there is none.

    Args:
        text: JSON, or a text whose last fenced block is JSON.
    """
    blocks = re.findall(r"```(?:json)?[ \t]*\n(.*?)```", text, re.DOTALL)
    for candidate in (text, *blocks[-1:]):
        try:
            return (json.loads(candidate),)
        # a deep list of brackets ends in a RecursionError
        except (ValueError, RecursionError):
            continue
    return None


@lru_cache(maxsize=1024)
def validator(schema: str) -> Validator:
    """Make the validator of a schema, given as JSON.

    Raises:
        ValueError: if it is no schema.
    """
    import jsonschema

    try:
        tree = json.loads(schema)
        kind = jsonschema.validators.validator_for(tree)
        kind.check_schema(tree)
    except (ValueError, jsonschema.SchemaError) as error:
        raise ValueError(f"JSONSchemaReward: {schema[:80]!r} is no JSON schema ({error}): correct it") from error
    made: Validator = kind(tree)
    return made


@lru_cache(maxsize=4096)
def parsed(text: str) -> tuple[object, ...]:
    """Mathematical expressions that math-verify reads in a text; empty if there is none."""
    from math_verify import parse

    return tuple(parse(text, parsing_timeout=_seconds()))


def same_value(gold: str, answer: str) -> bool:
    """Whether an answer is mathematically the same as the right one, by math-verify.

    Args:
        gold: the right answer.
        answer: text with an answer.
    """
    from math_verify import parse, verify

    found = parse(answer, parsing_timeout=_seconds())
    return bool(verify(list(parsed(gold)), found, timeout_seconds=_seconds()))


def _seconds() -> int | None:
    # math-verify interrupts itself by a signal, which only the main thread receives
    return SECONDS if threading.current_thread() is threading.main_thread() else None


def _needs(module: str, name: str) -> None:
    """Raise unless an optional package is installed."""
    try:
        __import__(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name} needs the package {module.replace('_', '-')}, which is not installed; run: pip install "
            f'"lightning-rlhf[rewards]"'
        ) from error


def _compiled(pattern: str | None, name: str, groups: int = 0) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        # an answer ends with its line; a pattern of a whole response may span lines
        compiled = re.compile(pattern, re.MULTILINE if groups else re.MULTILINE | re.DOTALL)
    except re.error as error:
        raise ValueError(f"{name} {pattern!r} is no regular expression ({error}): correct it") from error
    if compiled.groups < groups:
        raise ValueError(f"{name} {pattern!r} needs a group around the answer, as in '#### (.+)'")
    return compiled


def _found(pattern: re.Pattern[str] | None, text: str) -> str | None:
    """First group of the last match of a pattern, without white space around it; the whole text without a pattern."""
    if pattern is None:
        return text.strip()
    matches = list(pattern.finditer(text))
    return matches[-1].group(1).strip() if matches else None
