"""What an OpenAI-compatible server answers: bodies to completions, and listed tokens to labels; pure functions.

A local judge reads the probability of any token. A server lists the most probable ones of each place, and nothing about
those it did not list.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """One generated token.

    Args:
        chosen: text of the token that was generated.
        listed: probabilities of the most probable tokens, by their text.
    """

    chosen: str
    listed: dict[str, float]


@dataclass(frozen=True)
class Completion:
    """A chat completion.

    Args:
        text: what the judge wrote.
        places: its tokens; None if the server gave no log-probabilities.
        refusal: why the judge did not answer, where it said so.
        tokens_in: tokens of the prompt; None if the server does not count.
        tokens_out: tokens that were generated; None if the server does not count.
        stopped: whether the judge came to an end by itself.
    """

    text: str
    places: tuple[Place, ...] | None
    refusal: str = ""
    tokens_in: int | None = None
    tokens_out: int | None = None
    stopped: bool = False


@dataclass(frozen=True)
class Reading:
    """Probabilities of labels, as far as a server's list goes.

    Args:
        found: probability of each label, 0 where it is not listed.
        open: probabilities of texts that begin a label and whose continuation is not known, such as a "1" that may
            become "10"; in no label.
        left: what the list leaves for all that is not listed, in [0, 1].
        least: the least probable token that is listed.
    """

    found: tuple[float, ...]
    open: dict[str, float] = field(default_factory=dict)
    left: float = 1.0
    least: float = 1.0

    @property
    def mass(self) -> float:
        """What the labels that are listed have together, in [0, 1]."""
        return min(sum(self.found), 1.0)

    @property
    def logps(self) -> Tensor:
        """Log-probabilities in nats, [labels], float64.

        A label that is not listed gets the most it can have: its share of what the list leaves, and not more than the
        least probable token that is listed.
        """
        bound = min(self.least, self.left / max(self.found.count(0.0), 1))
        return torch.tensor([p or bound for p in self.found], dtype=torch.float64).clamp_min(TINY).log()


TINY = 1e-12
"""Least probability of a label: log-probabilities stay finite."""


class UnreadableError(ValueError):
    """A body that is no chat completion.

    Args:
        message: what is wrong with it.
        cut: whether it begins as JSON does and breaks off.
    """

    def __init__(self, message: str, *, cut: bool = False) -> None:
        super().__init__(message)
        self.cut = cut


def parse_completion(body: str) -> Completion:
    """Read the body of a reply.

    Raises:
        UnreadableError: if it is no chat completion.
    """
    try:
        raw = json.loads(body)
    except ValueError:
        cut = body.lstrip().startswith("{")
        message = "the reply breaks off in the middle" if cut else f"the reply is no JSON: {body[:80]!r}"
        raise UnreadableError(message, cut=cut) from None
    try:
        choice = raw["choices"][0]
        message, logprobs = choice["message"], choice.get("logprobs")
        text, refusal = message.get("content") or "", message.get("refusal") or ""
        usage = raw.get("usage") or {}
        if choice.get("finish_reason") == "content_filter":
            refusal = refusal or "content filter"
        content = (logprobs or {}).get("content")
        places = None if content is None or (text and not content) else tuple(map(_place, content))
        if not isinstance(text, str) or not isinstance(refusal, str):
            raise TypeError
        counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
        return Completion(text, places, refusal, *counts, stopped=choice.get("finish_reason") == "stop")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise UnreadableError(f"the reply is no chat completion: {body[:80]!r}") from None


def _place(raw: Mapping[str, Any]) -> Place:
    listed: dict[str, float] = {}
    for each in raw.get("top_logprobs") or ():
        # tokens with other ids may have the same text
        listed[str(each["token"])] = listed.get(str(each["token"]), 0.0) + _probability(each)
    listed.setdefault(str(raw["token"]), _probability(raw))
    return Place(str(raw["token"]), listed)


def _probability(raw: Mapping[str, Any]) -> float:
    value = float(raw["logprob"])
    if math.isnan(value):
        raise ValueError
    return math.exp(min(value, 0.0))


def read_labels(completion: Completion, labels: Sequence[str], stem: str = "", probability: float = 1.0) -> Reading:
    """Sum the probabilities of the ways in which labels are written.

    Case and the space before a label do not matter: "Yes", " yes" and "yes" are one. What the judge really wrote is
    followed from token to token for as long as it is empty space or the beginning of a label, so that of the two tokens
    of " 1" or of "10" none is lost: P("10") = P("1") P("0" | "1"), and P("1") is what no digit follows. Off this path
    nothing is known about a "1" that may become "10", unless "10" is listed as one token: then the vocabulary writes it
    so, and "1" is a label by itself.

    Args:
        completion: the answer, with its places.
        labels: what the judge may answer.
        stem: beginning of a label that had been written before.
        probability: of the stem.
    """
    assert completion.places is not None
    places = completion.places
    folded = [label.casefold() for label in labels]
    names = folded if len(set(folded)) == len(labels) else list(labels)

    def plain(text: str) -> str:
        text = text.replace("▁", " ").replace("Ġ", " ").lstrip()  # how SentencePiece and GPT-2 write a space
        return text.casefold() if names is folded else text

    found, open_ = dict.fromkeys(names, 0.0), dict[str, float]()
    written = stem
    for number, place in enumerate(places):
        path = None
        ended = probability if plain(written) in found else 0.0  # a label that nothing continues
        for token, share in place.listed.items():
            text, here = plain(written + token), probability * share
            if written and text == plain(written):
                continue  # an end of text that is spelt with nothing: `ended` holds it
            begins = any(name != text and name.startswith(text) for name in names)
            if _continues(plain(written), token):
                ended -= here
            if begins and token == place.chosen and (number + 1 < len(places) or completion.stopped):
                path = (written + token, here)
            elif begins and text:
                open_[text] = open_.get(text, 0.0) + here
            elif text in found:
                found[text] += here
        if plain(written) in found:
            found[plain(written)] += max(ended, 0.0)
        listed = {plain(written + token) for token in place.listed}
        for text in [text for text in open_ if text in found]:
            if any(name != text and name.startswith(text) for name in listed & set(names)):
                found[text] += open_.pop(text)
        if path is None:
            break
        written, probability = path
    else:
        # the judge stopped, or its last token was followed as far as there are tokens
        if plain(written) in found and completion.stopped:
            found[plain(written)] += probability
        elif plain(written):
            open_[plain(written)] = open_.get(plain(written), 0.0) + probability
    first = places[0].listed if places else {}
    left = max(1 - sum(first.values()), 0.0)
    return Reading(tuple(found.values()), open_, left, min(first.values(), default=1.0))


def completed(reading: Reading, stem: str, later: Reading) -> Reading:
    """A reading in which an open stem has been followed.

    Args:
        reading: what was known.
        stem: the stem, as it stands in ``reading.open``.
        later: labels behind the stem, as `read_labels` gives them with ``stem`` and its probability.
    """
    found = tuple(old + new for old, new in zip(reading.found, later.found, strict=True))
    return replace(reading, found=found, open={k: v for k, v in reading.open.items() if k != stem} | later.open)


def _continues(stem: str, token: str) -> bool:
    """Whether a token goes on with a number or word."""
    return token[:1].isdigit() if stem[-1:].isdigit() else bool(stem) and token[:1].isalpha()
