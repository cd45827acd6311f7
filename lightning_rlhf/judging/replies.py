"""Replies of OpenAI-compatible servers: bodies to completions, and listed tokens to labels; pure functions.

A local judge reads the probability of any token. A server lists the most probable ones of each place, and nothing about
those it did not list.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

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
        text: the answer.
        places: its tokens; None if the server gave no log-probabilities.
        refusal: why the judge did not answer, where it said so.
        tokens_in: tokens of the prompt; None if the server does not count.
        tokens_out: tokens that were generated; None if the server does not count.
        stopped: whether the judge came to an end by itself.
        cut: whether it was stopped by the limit of tokens.
        reasoning: thoughts that a thinking model writes in a field of its own, before its answer.
    """

    text: str
    places: tuple[Place, ...] | None
    refusal: str = ""
    tokens_in: int | None = None
    tokens_out: int | None = None
    stopped: bool = False
    cut: bool = False
    reasoning: str = ""


@dataclass(frozen=True)
class Reading:
    """Probabilities of labels, as far as a server's list goes.

    Args:
        found: probability of each label, 0 where it is not listed.
        open: probabilities of texts that begin a label and whose continuation is not known, such as a "1" that may
            become "10"; in no label.
        left: probability of everything that is not listed, in [0, 1].
        least: the least probable token that is listed.
    """

    found: tuple[float, ...]
    open: dict[str, float] = field(default_factory=dict)
    left: float = 1.0
    least: float = 1.0

    @property
    def mass(self) -> float:
        """Probability of all listed labels together, in [0, 1]."""
        return min(sum(self.found), 1.0)

    @property
    def logps(self) -> Tensor:
        """Log-probabilities in nats, [labels], float64.

        A label that is not listed gets an upper bound: its share of the rest that the list leaves, and not more than
        the least probable token that is listed.
        """
        # p <= min(least listed, rest / number of labels that are not listed)
        bound = min(self.least, self.left / max(self.found.count(0.0), 1))
        return torch.tensor([p or bound for p in self.found], dtype=torch.float64).clamp_min(TINY).log()


TINY = 1e-12
"""Least probability of a label: log-probabilities stay finite."""


MOST_CHARACTERS = 16 * 2**20
"""Longest body that is read; a label with its log-probabilities takes some thousands."""

MOST_TOKENS = 10**9
"""Counts of tokens beyond this are none."""

SLACK = 0.05
"""How far rounding may take a log-probability above 0, and the sum of the probabilities listed at a place above 1."""


class UnreadableError(ValueError):
    """A body that is no chat completion.

    Args:
        message: the reason.
        cut: whether it begins as JSON does and breaks off.
        code: HTTP status that the body itself names, where it reports an error.
        error_code: the short name of that error.
    """

    def __init__(self, message: str, *, cut: bool = False, code: int | None = None, error_code: str = "") -> None:
        super().__init__(message)
        self.cut, self.code, self.error_code = cut, code, error_code


def parse_completion(body: str) -> Completion:
    """Read the body of a reply; every field is checked before it is used.

    Fields that labels are read from must be as the API says. Fields that only describe the reply (usage, finish reason,
    refusal, reasoning) count as absent where they have another type.

    Raises:
        UnreadableError: if it is no chat completion; the message names the field.
    """
    # a server that streams without end must not fill the memory
    if len(body) > MOST_CHARACTERS:
        raise UnreadableError(f"the reply has {len(body)} characters, more than the {MOST_CHARACTERS} that are read")
    try:
        raw = json.loads(body)
    # deeply nested JSON raises RecursionError
    except (ValueError, RecursionError):
        cut = body.lstrip().startswith("{") and not body.rstrip().endswith("}")
        message = "the reply breaks off in the middle" if cut else f"the reply is no JSON: {body[:80]!r}"
        raise UnreadableError(message, cut=cut) from None
    # JSON may be a list or a number
    if not isinstance(raw, dict):
        raise _wrong("the reply", "an object", raw)
    choices = raw.get("choices")
    if not choices:
        _raise_reported(raw)
    if not isinstance(choices, list) or not choices:
        raise _wrong("choices", "a list with one entry at least", choices)
    choice = choices[0]
    if not isinstance(choice, dict):
        raise _wrong("choices[0]", "an object", choice)
    written = choice.get("message")
    if not isinstance(written, dict):
        _raise_reported(choice)
        raise _wrong("choices[0].message", "an object", written)
    finish = choice.get("finish_reason")
    # some hosts report errors of the model inside of a choice
    if finish == "error":
        _raise_reported(choice)
        raise UnreadableError("the server reports an error (finish_reason 'error')")
    refusal = _text_of(written.get("refusal"))
    # the filter of the host, not the model, has ended the answer
    if finish == "content_filter":
        refusal = refusal or "content filter"
    text = _content(written.get("content"))
    usage = raw.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return Completion(
        text,
        _places(choice.get("logprobs"), text),
        refusal,
        _count(usage.get("prompt_tokens")),
        _count(usage.get("completion_tokens")),
        stopped=finish == "stop",
        cut=finish == "length",
        reasoning=_text_of(written.get("reasoning_content")) or _text_of(written.get("reasoning")),
    )


def _wrong(field: str, expected: str, found: object) -> UnreadableError:
    return UnreadableError(f"the reply is no chat completion: {field} must be {expected}; got {_shown(found)}")


def _shown(value: object) -> str:
    return repr(value)[:80] if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


def _raise_reported(raw: Mapping[str, object]) -> None:
    """Raise the error that a reply of status 200 reports, where it reports one, as hosts that pass on requests do."""
    error = raw.get("error")
    if not error:
        return
    code = error.get("code") if isinstance(error, dict) else None
    said = error.get("message") if isinstance(error, dict) else error
    text = _plain(said if isinstance(said, str) else json.dumps(error))[:300]
    number = int(code) if isinstance(code, int | str) and re.fullmatch(r"[45]\d\d", str(code)) else None
    raise UnreadableError(
        f"the server reports an error in a reply of status 200: {text}",
        code=number,
        error_code=_text_of(code)[:80],
    )


def _plain(text: str) -> str:
    """Text without halves of surrogate pairs, which JSON can spell and no file can hold."""
    return text.encode("utf-8", "replace").decode()


def _text_of(value: object) -> str:
    return _plain(value) if isinstance(value, str) else ""


def _content(value: object) -> str:
    """Text of a message: a string, null, or a list of parts, of which those that are text count."""
    # null where a tool is called, or all is reasoning
    if value is None or isinstance(value, str):
        return _plain(value or "")
    if not isinstance(value, list):
        raise _wrong("message.content", "a string, a list of parts or null", value)
    texts = []
    for part in value:
        if not isinstance(part, dict):
            raise _wrong("message.content", "a string, a list of parts or null", value)
        if part.get("type") == "text":
            if not isinstance(part.get("text"), str):
                raise _wrong("the text of a part of message.content", "a string", part.get("text"))
            texts.append(part["text"])
    return _plain("".join(texts))


def _count(value: object) -> int | None:
    """A number of tokens; None where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MOST_TOKENS:
        return None
    return int(value) if value == int(value) else None


def _places(logprobs: object, text: str) -> tuple[Place, ...] | None:
    """Tokens with the alternatives that are listed for each; None where the server gives no log-probabilities."""
    if logprobs is not None and not isinstance(logprobs, dict):
        raise _wrong("logprobs", "an object or null", logprobs)
    content = (logprobs or {}).get("content")
    if content is None:
        return None
    if not isinstance(content, list):
        raise _wrong("logprobs.content", "a list or null", content)
    # a text has tokens: a server that lists none of them gives no log-probabilities
    return None if text and not content else tuple(map(_place, content))


def _place(raw: object) -> Place:
    chosen, probability = _token(raw, "an entry of logprobs.content")
    # `_token` has refused everything but objects
    others = raw.get("top_logprobs") if isinstance(raw, dict) else None
    if others is not None and not isinstance(others, list):
        raise _wrong("top_logprobs", "a list or null", others)
    listed: dict[str, float] = {}
    for each in others or ():
        # tokens with other ids may have the same text
        token, share = _token(each, "an entry of top_logprobs")
        listed[token] = listed.get(token, 0.0) + share
    # logits or scores in place of log-probabilities would look like sure answers
    if sum(listed.values()) > 1 + SLACK:
        raise UnreadableError(
            f"the reply is no chat completion: the probabilities of top_logprobs sum to {sum(listed.values()):.3g}, so "
            f"that they are no log-probabilities"
        )
    # the chosen token may be missing from the list
    listed.setdefault(chosen, probability)
    return Place(chosen, listed)


def _token(raw: object, field: str) -> tuple[str, float]:
    """Text and probability of a token."""
    if not isinstance(raw, dict):
        raise _wrong(field, "an object", raw)
    token, logprob = raw.get("token"), raw.get("logprob")
    if not isinstance(token, str):
        raise _wrong(f"token in {field}", "a string", token)
    # a bool is an int, and NaN differs from itself
    if isinstance(logprob, bool) or not isinstance(logprob, int | float) or logprob != logprob or logprob > SLACK:
        raise _wrong(f"logprob in {field}", "a number of 0 at most", logprob)
    # clamped to [-1000, 0]: rounding may exceed 0, and math.exp fails on a huge integer of JSON
    return _plain(token), math.exp(max(min(logprob, 0), -1000))


def read_labels(completion: Completion, labels: Sequence[str], stem: str = "", probability: float = 1.0) -> Reading:
    """Sum the probabilities of the ways in which labels are written.

    Case and the space before a label do not matter: "Yes", " yes" and "yes" are one. The judge's own answer is
    followed from token to token for as long as it is empty space or the beginning of a label, so that of the two tokens
    of " 1" or of "10" none is lost: P("10") = P("1") P("0" | "1"), and P("1") is that of a "1" without a digit behind
    it. Off this path nothing is known about a "1" that may become "10", unless "10" is listed as one token: then the
    vocabulary writes it so, and "1" is a label by itself.

    Args:
        completion: the answer, with its places.
        labels: the possible answers.
        stem: beginning of a label that had been written before.
        probability: of the stem.
    """
    assert completion.places is not None
    places = completion.places
    folded = [label.casefold() for label in labels]
    # labels that differ in case alone, such as "A" and "a", are compared as they are
    names = folded if len(set(folded)) == len(labels) else list(labels)

    def plain(text: str) -> str:
        text = text.replace("▁", " ").replace("Ġ", " ").lstrip()  # the space of SentencePiece and of GPT-2
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
            # P(label ends here) = P(written) - sum of P(tokens that continue the number or word)
            if _continues(plain(written), token):
                ended -= here
            # followed only where the next token is known, or the judge stopped behind this one
            if begins and token == place.chosen and (number + 1 < len(places) or completion.stopped):
                path = (written + token, here)
            elif begins and text:
                open_[text] = open_.get(text, 0.0) + here
            elif text in found:
                found[text] += here
        if plain(written) in found:
            found[plain(written)] += max(ended, 0.0)
        listed = {plain(written + token) for token in place.listed}
        # "10" is listed as one token: the vocabulary does not write it as "1" and "0", so "1" is a label
        for text in [text for text in open_ if text in found]:
            if any(name != text and name.startswith(text) for name in listed & set(names)):
                found[text] += open_.pop(text)
        # the judge's own answer has left the labels
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
    # 1 - sum of the listed probabilities; rounding may make it negative
    left = max(1 - sum(first.values()), 0.0)
    return Reading(tuple(found.values()), open_, left, min(first.values(), default=1.0))


def completed(reading: Reading, stem: str, later: Reading) -> Reading:
    """A reading in which an open stem has been followed.

    Args:
        reading: the reading so far.
        stem: the stem, as it stands in ``reading.open``.
        later: labels behind the stem, as `read_labels` gives them with ``stem`` and its probability.
    """
    found = tuple(old + new for old, new in zip(reading.found, later.found, strict=True))
    return replace(reading, found=found, open={k: v for k, v in reading.open.items() if k != stem} | later.open)


def _continues(stem: str, token: str) -> bool:
    """Whether a token goes on with a number or word."""
    return token[:1].isdigit() if stem[-1:].isdigit() else bool(stem) and token[:1].isalpha()
