"""Principles as data (SALMON, arXiv 2310.05910): what an answer is judged by, as text that can be negated."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib import resources
from pathlib import Path

import yaml

from lightning_rlhf.judging.task import PairTask, Task
from lightning_rlhf.types import Message, Prompt


@dataclass(frozen=True)
class Principle:
    """A principle.

    Args:
        id: name, without spaces.
        text: the principle as a sentence about "the response".
        negated: the opposite principle, as a sentence.
        weight: how often it is sampled in reinforcement learning, relative to others, >= 0.
        tags: groups that it belongs to.
    """

    id: str
    text: str
    negated: str
    weight: float = 1.0
    tags: tuple[str, ...] = ()

    def stated(self, sign: float) -> str:
        """The text, or the negated one where the sign is negative."""
        return self.negated if sign < 0 else self.text


HEADING = "The response is judged by these principles:"


def load_principles(source: str, tags: Collection[str] = ()) -> tuple[Principle, ...]:
    """Read a set of principles.

    Args:
        source: name of a set that ships with the package, such as ``assistant``, or path of a YAML file: a list of
            mappings with ``id``, ``text``, ``negated``, and optionally ``weight`` and ``tags``.
        tags: keep principles with one of these tags; default: all.

    Raises:
        FileNotFoundError: if there is no such set.
        ValueError: if the file is no set of principles, naming entry and field, or none has such a tag.
    """
    path = Path(source).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise FileNotFoundError(f"principles {source!r}: no such file")
        text = path.read_text(encoding="utf-8")
    else:
        file = resources.files("lightning_rlhf.judging.principles") / f"{source}.yaml"
        if not file.is_file():
            raise FileNotFoundError(
                f"no principles {source!r}: name one of {', '.join(principle_sets())}, or the path of a .yaml file of "
                f"your own"
            )
        text = file.read_text(encoding="utf-8")
    principles = parse_principles(text, f"principles {source}")
    kept = tuple(p for p in principles if not tags or set(tags) & set(p.tags))
    if not kept:
        known = sorted({tag for p in principles for tag in p.tags})
        raise ValueError(f"principles {source}: none has a tag of {sorted(tags)}; tags are {', '.join(known)}")
    return kept


def principle_sets() -> list[str]:
    """Names of the sets that ship with the package."""
    folder = resources.files("lightning_rlhf.judging.principles")
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def parse_principles(text: str, source: str) -> tuple[Principle, ...]:
    """Build principles from YAML.

    Args:
        text: the YAML.
        source: where it came from, for messages.

    Raises:
        ValueError: if something is missing, unknown, or of the wrong kind.
    """
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: not valid YAML ({error})") from error
    if not isinstance(raw, list) or not raw:
        raise ValueError(f"{source}: must be a list of principles; got {raw!r}")
    principles = tuple(_parsed(row, f"{source}, entry {number}") for number, row in enumerate(raw))
    names = [principle.id for principle in principles]
    if len(set(names)) < len(names):
        raise ValueError(f"{source}: two principles have one id: {', '.join(sorted(names))}")
    return principles


def _parsed(row: object, where: str) -> Principle:
    known = {f.name for f in fields(Principle)}
    if not isinstance(row, Mapping) or not {"id", "text", "negated"} <= set(row) <= known:
        raise ValueError(f"{where}: needs id, text and negated, and takes weight and tags; got {row!r}")
    for name in ("id", "text", "negated"):
        if not isinstance(row[name], str) or not row[name].strip():
            raise ValueError(f"{where}: {name} must be text; got {row[name]!r}")
    weight, tags = row.get("weight", 1.0), row.get("tags", [])
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise ValueError(f"{where}: weight must be a number >= 0; got {weight!r}")
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise ValueError(f"{where}: tags must be a list of texts; got {tags!r}")
    if any(character.isspace() for character in row["id"]):
        raise ValueError(f"{where}: an id has no spaces; got {row['id']!r}")
    return Principle(row["id"], row["text"].strip(), row["negated"].strip(), float(weight), tuple(tags))


def principle_task(principle: Principle) -> Task:
    """The question which of two responses fits a principle better."""
    return Task(
        name=f"principle {principle.id}",
        context="Context",
        candidate="Response",
        dialogue=True,
        pair=PairTask(
            preambles={
                "base": "You are given a conversation and two possible responses of the assistant. Judge them by one "
                f"principle alone: {principle.text}"
            },
            verdict="Say which response fits this principle better by answering 1 or 2.",
            reasons="Explain which response fits this principle better.",
            thinking="Rationale:",
            ending="Better response: ",
        ),
    )


def named(principles: Sequence[Principle], ids: Sequence[str]) -> list[float]:
    """Use of each principle by its id: 1, -1 where the id stands behind ``not:``, 0 for others.

    Raises:
        ValueError: if there is no principle of an id.
    """
    signs = {id_.removeprefix("not:"): -1.0 if id_.startswith("not:") else 1.0 for id_ in ids}
    unknown = sorted(set(signs) - {principle.id for principle in principles})
    if unknown:
        raise ValueError(f"no principle {unknown[0]!r}; there are {', '.join(p.id for p in principles)}")
    return [signs.get(principle.id, 0.0) for principle in principles]


def statement(principles: Sequence[Principle], signs: Sequence[float]) -> str:
    """The principles in use as a list, empty if there is none.

    Args:
        principles: all principles.
        signs: use of each: 1 as it is, -1 negated, 0 not at all.
    """
    lines = [f"- {p.stated(sign)}" for p, sign in zip(principles, signs, strict=True) if sign]
    return "\n".join([HEADING, *lines]) if lines else ""


def conditioned_text(text: str, stated: str) -> str:
    """A plain prompt with principles behind it."""
    return f"{text}\n\n{stated}\n\n" if stated else text


def conditioned_messages(messages: Sequence[Message], stated: str) -> tuple[Message, ...]:
    """A conversation with principles at the end of its last turn."""
    if not stated:
        return tuple(messages)
    last = messages[-1]
    return (*messages[:-1], {**last, "content": f"{last.get('content') or ''}\n\n{stated}"})


def conditioned(prompt: Prompt, stated: str) -> Prompt:
    """A prompt with principles, for readers of its text; the token ids stay those without."""
    if prompt.messages is None:
        return replace(prompt, text=conditioned_text(prompt.text, stated))
    return replace(prompt, messages=conditioned_messages(prompt.messages, stated))
