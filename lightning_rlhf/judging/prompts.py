"""Prompts for judges, built of a task, a context and candidates: text to text.

RLAIF vs. RLHF (arXiv 2309.00267), section 2.1 and appendix D: preamble, exemplars, the sample, and an ending whose
natural continuation is the label. Context and candidates are untrusted: text that looks like a part of the prompt is
made harmless in them, and each is inserted once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from lightning_rlhf.judging.task import PairTask, Style, Task
from lightning_rlhf.prompts.messages import turn_text
from lightning_rlhf.types import Message, Prompt


SPEAKERS = {"user": "Human", "assistant": "Assistant", "system": "System"}
EXAMPLE = "=== Example ==="
YOUR_TURN = "=== Follow the instructions and the examples above ==="
CUT = "[...]"


@dataclass(frozen=True)
class Sample:
    """A context and one or two candidates to be judged, as plain untrusted text.

    Args:
        context: the turns of a conversation, or one text.
        candidates: answers to it.
    """

    context: str | tuple[Message, ...]
    candidates: tuple[str, ...]


@dataclass(frozen=True)
class JudgePrompt:
    """A prompt for a judge.

    Args:
        body: instructions and sample; a chat model gets them as the user's turn.
        ending: text that is to be continued.
        thoughts: text of the judge before the ending, if anything.
    """

    body: str
    ending: str
    thoughts: str = ""

    @property
    def answer(self) -> str:
        """The beginning of a chat model's answer: thoughts and ending."""
        return f"{self.thoughts}\n\n{self.ending}" if self.thoughts else self.ending

    @property
    def text(self) -> str:
        """The whole prompt for a plain model."""
        return f"{self.body}\n\n{self.answer}"


def sample_of(prompt: Prompt, *candidates: str) -> Sample:
    """Take the context from a prompt: its conversation if it is one, its text otherwise."""
    return Sample(prompt.text if prompt.messages is None else tuple(prompt.messages), candidates)


def pair_prompt(
    task: Task,
    sample: Sample,
    *,
    style: Style = "base",
    shots: int = 0,
    thinking: bool = False,
    rationale: str | None = None,
    max_candidate_chars: int | None = None,
) -> JudgePrompt:
    """Ask which of two candidates is better.

    Args:
        task: the task.
        sample: context and two candidates, in the order in which they are shown.
        style: which preamble.
        shots: number of exemplars, >= 0.
        thinking: ask for a rationale first (chain of thought); without ``rationale`` the prompt ends where the
            rationale begins, with it where the label begins.
        rationale: the rationale of the judge.
        max_candidate_chars: longest candidate in characters; the rest is cut off and marked.

    Raises:
        ValueError: if the task has no such preamble, or too few exemplars.
    """
    pair = task.asked_for_pairs()
    # fewer exemplars than asked for would be another prompt
    if shots > len(pair.exemplars):
        raise ValueError(f"task {task.name!r} has {len(pair.exemplars)} exemplars; got shots={shots}")
    parts = [f"{_preamble(task, pair.preambles, style)} {pair.reasons if thinking else pair.verdict}"]
    # exemplars are ours and stay as they are; the sample below is not
    for exemplar in pair.exemplars[:shots]:
        shown = Sample(exemplar.context, (exemplar.first, exemplar.second))
        parts += [EXAMPLE, _shown(task, shown, None)]
        if thinking:
            parts.append(f"{pair.thinking} {exemplar.rationale}")
        parts.append(f"{pair.ending}{exemplar.label}")
    if shots:
        parts.append(YOUR_TURN)
    parts.append(_shown(task, sample, max_candidate_chars))
    # without a chain of thought the label is asked for at once
    if not thinking:
        return JudgePrompt("\n\n".join(parts), pair.ending)
    # the request to think is the user's, the word before the rationale begins the judge's answer
    request, _, opening = pair.thinking.rpartition("\n\n")
    body = "\n\n".join([*parts, request] if request else parts)
    if rationale is None:
        return JudgePrompt(body, opening)
    return JudgePrompt(body, pair.ending, f"{opening} {kept_rationale(pair.ending, rationale)}".rstrip())


def rating_prompt(
    task: Task,
    sample: Sample,
    *,
    question: Literal["score", "check"] = "score",
    style: Style = "base",
    max_candidate_chars: int | None = None,
) -> JudgePrompt:
    """Ask how good one candidate is, as direct-RLAIF does (section 2.2.2), or a yes-no question about it.

    Args:
        task: the task.
        sample: context and one candidate.
        question: which question of the task.
        style: which preamble.
        max_candidate_chars: longest candidate in characters; the rest is cut off and marked.

    Raises:
        ValueError: if the task does not ask this, or has no such preamble.
    """
    rating = task.asked_for_ratings(question)
    preamble = _preamble(task, rating.preambles, style)
    return JudgePrompt(f"{preamble}\n\n{_shown(task, sample, max_candidate_chars)}", rating.ending)


def fitted(sample: Sample, dialogue: bool, excess: Callable[[Sample], int]) -> Sample | None:
    """Keep as much of the context as fits; None if the sample does not even fit without.

    The context alone is cut: a conversation at its beginning, another text at its end. The cut is marked.

    Args:
        sample: the sample.
        dialogue: whether the context is a conversation.
        excess: by how many tokens the prompt of a sample is too long; 0 or less if it fits.
    """
    # excess counts tokens, the cut characters: it takes some steps
    over = excess(sample)
    text = context_text(sample.context)
    kept = len(text)
    while over > 0 and kept > 0:
        # a token has a character at least, four as a rule: some steps, none of which cuts much more than it must
        kept = max(0, kept - max(over, 16))
        sample = replace(sample, context=f"{CUT} {text[len(text) - kept :]}" if dialogue else f"{text[:kept]} {CUT}")
        over = excess(sample)
    return sample if over <= 0 else None


def kept_rationale(ending: str, rationale: str) -> str:
    """The rationale up to its first verdict, which the next call would merely copy."""
    found = _pattern(ending).search(rationale)
    return rationale[: found.start()].strip() if found else rationale.strip()


def context_text(context: str | Sequence[Message]) -> str:
    """Write a context as text; a conversation as turns, but a single question as it is."""
    if isinstance(context, str):
        return context
    # a single question needs no speaker
    if len(context) == 1:
        return turn_text(context[0])
    # a turn may not speak for another
    return "\n\n".join(f"{_speaker(turn['role'])}: {harmless(turn_text(turn), _TURNS)}" for turn in context)


def markers(task: Task) -> tuple[str, ...]:
    """Texts with a meaning in the prompts of a task, which candidates and contexts must not contain."""
    endings = [r.ending for r in (task.pair, task.score, task.check) if r is not None]
    thinking = [task.pair.thinking.rpartition("\n")[2]] if task.pair is not None else []
    shown = [f"{task.context} -", *(f"{task.candidate}{number} -" for number in ("", " 1", " 2"))]
    found = [*endings, *thinking, *shown, *(f"{speaker}:" for speaker in SPEAKERS.values())]
    return tuple(dict.fromkeys(marker.strip() for marker in found if marker.strip()))


def harmless(text: str, marks: tuple[str, ...]) -> str:
    """Take the punctuation from text that looks like a part of the prompt, and so its meaning.

    ``Response 2 - `` becomes ``Response 2 ``, rulers of equal signs are shortened. Writing, case and spaces do not
    matter; twice is the same as once.

    Args:
        text: untrusted text.
        marks: the markers of `markers`.
    """
    # writing and spaces do not hide a marker from the pattern
    for mark in marks:
        text = _pattern(mark).sub(lambda found: f"{found[1]} ", text)
    return re.sub(r"={3,}", "==", text)


_PUNCTUATION = ":=\\-–—：＝"  # noqa: RUF001  an attacker would try full-width twins next
_TURNS = tuple(f"{speaker}:" for speaker in SPEAKERS.values())


@lru_cache(maxsize=256)
def _pattern(mark: str) -> re.Pattern[str]:
    """Find a marker however it is spaced or written; group 1 is the part that stays."""
    words = re.sub(rf"[\s{_PUNCTUATION}]+$", "", mark.strip())
    spaced = r"\s+".join(map(re.escape, words.split()))
    return re.compile(rf"(?<!\w)({spaced})\s*[{_PUNCTUATION}](?:\s*[{_PUNCTUATION}])*[^\S\n]*", re.IGNORECASE)


def without_verdicts(text: str, pair: PairTask) -> str:
    """Cut out text that looks like a verdict on a pair, label and all: even without its colon it would sway a judge."""
    labels = "|".join(map(re.escape, pair.labels))
    return re.sub(rf"(?:{_pattern(pair.ending).pattern})+(?:(?:{labels})(?!\w))?", f"{CUT} ", text, flags=re.IGNORECASE)


def _shown(task: Task, sample: Sample, max_chars: int | None) -> str:
    marks = markers(task)
    # the speakers of a conversation are ours, and each turn has been made harmless by itself
    in_context = tuple(mark for mark in marks if mark not in _TURNS)
    lines = [f"{task.context} - {harmless(context_text(sample.context), in_context)}"]
    for number, candidate in enumerate(sample.candidates, start=1):
        # before `harmless`, which removes the punctuation by which verdicts are found
        text = candidate.strip() if task.pair is None else without_verdicts(candidate, task.pair).strip()
        if max_chars is not None and len(text) > max_chars:
            text = f"{text[:max_chars]} {CUT}"
        which = f" {number}" if len(sample.candidates) > 1 else ""
        lines.append(f"{task.candidate}{which} - {harmless(text, marks)}")
    return "\n\n".join(lines)


def _preamble(task: Task, preambles: dict[str, str], style: str) -> str:
    # a task may have one preamble only
    if style not in preambles:
        raise ValueError(f"task {task.name!r} has preambles {sorted(preambles)}; got style={style!r}")
    return preambles[style]


def _speaker(role: str) -> str:
    return SPEAKERS.get(role, role.capitalize())
