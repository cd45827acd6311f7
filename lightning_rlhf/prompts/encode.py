"""Token ids of many texts: tokenizers that split texts at words are asked once for every word.

Most byte-level tokenizers (GPT-2, Llama-3, Qwen, SmolLM, Mistral's Tekken) first split a text with a regular
expression, and then tokenize the parts one by one. At some places every text is split, whatever is around them: behind
a letter or digit that a space, a line break or punctuation follows, and in front of the space of a word. So the ids of
a text are those of the pieces between these places, one after another, and most pieces are words that came before. A
dictionary of pieces takes a fifth of the time of the tokenizer. Texts of other tokenizers go there whole.
"""

from __future__ import annotations

import json
import re
import string
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, cast

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


Ids: TypeAlias = tuple[int, ...]

TEXTS_AT_ONCE = 1024
"""Number of texts per call of the tokenizer."""
MOST_PIECES = 100_000
"""Pieces of text that are remembered, about 200 bytes each; with more of them the dictionary is emptied."""

_ALTERNATIVES = {
    *(r"'s", r"'t", r"'re", r"'ve", r"'m", r"'ll", r"'d", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"),
    *(r" ?\p{L}+", r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?\p{N}+", r"\p{N}+", r"\p{N}", r"\p{N}{1,3}", r"\p{N}{1,2}"),
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    *(r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"),
    *(r"\s*[\r\n]+", r"\s*[\r\n]", r"\s+(?!\S)", r"\s+"),
}
"""Alternatives of regular expressions that match nothing with a cut inside, and read nothing in front of a match."""
_SPLITS = ({"behavior": "Isolated", "invert": False}, {"behavior": "Removed", "invert": True})
"""Options with which a ``Split`` keeps its matches as parts."""
_LETTERS = "A-Za-z0-9"


@dataclass(frozen=True)
class Encoded:
    """Token ids of a text that goes on.

    Args:
        ids: ids of the text.
        tail: its last piece, whose ids may depend on the text behind it; those in front of it do not.
        tail_ids: ids of the tail, the last ones of ``ids``.
    """

    ids: Ids
    tail: str
    tail_ids: Ids

    def whole(self, rest: Ids) -> Ids:
        """Ids of the text and more text as one, from the ids of the tail and more text as one."""
        return self.ids[: len(self.ids) - len(self.tail_ids)] + rest


class TextEncoder:
    """Token ids of texts, without added special tokens; equal to those of the tokenizer.

    Args:
        tokenizer: the tokenizer; a slow one, or one that splits texts elsewhere, gets whole texts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._pieces = pieces_of(tokenizer)
        self._ids: dict[str, bytes] = {}

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text."""
        if self._pieces is None:
            return encode_all(self.tokenizer, texts)
        return [_numbers(b"".join(known)) for _, known in self._portions(texts)]

    def encode_open(self, texts: Sequence[str]) -> list[Encoded]:
        """Ids of each text, and its last piece."""
        if self._pieces is None:
            return [Encoded(ids, text, ids) for text, ids in zip(texts, encode_all(self.tokenizer, texts), strict=True)]
        return [
            Encoded(_numbers(b"".join(known)), pieces[-1], _numbers(known[-1])) if pieces else Encoded((), "", ())
            for pieces, known in self._portions(texts)
        ]

    def _portions(self, texts: Sequence[str]) -> Iterator[tuple[list[str], list[bytes]]]:
        """Pieces of each text, and the ids of each piece."""
        assert self._pieces is not None
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            split = [self._pieces.findall(text) for text in texts[start : start + TEXTS_AT_ONCE]]
            # most texts have no new piece, and are looked up once
            found = [self._known(pieces) for pieces in split]
            self._learn([pieces for pieces, known in zip(split, found, strict=True) if known is None])
            for pieces, known in zip(split, found, strict=True):
                yield pieces, known if known is not None else [self._ids[piece] for piece in pieces]

    def _known(self, pieces: Sequence[str]) -> list[bytes] | None:
        """Ids of pieces; None if one is new."""
        try:
            return [self._ids[piece] for piece in pieces]
        except KeyError:
            return None

    def _learn(self, split: Sequence[Sequence[str]]) -> None:
        """Let the tokenizer encode the pieces that are new."""
        new = set[str]().union(*split).difference(self._ids)
        if len(self._ids) + len(new) > MOST_PIECES:
            # frequent pieces come back at once
            self._ids.clear()
            new = set[str]().union(*split)
        if not new:
            return
        backend = _backend(self.tokenizer)
        # an earlier call of the tokenizer may have set any of these
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = bool(getattr(self.tokenizer, "split_special_tokens", False))
        texts = list(new)
        encoded = backend.encode_batch_fast(texts, add_special_tokens=False)
        self._ids.update((text, array("i", one.ids).tobytes()) for text, one in zip(texts, encoded, strict=True))


def encode_all(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Ids]:
    """Token ids of texts, without added special tokens.

    Texts go to the tokenizer in lists, since fast tokenizers then use all cores.
    """
    ids: list[Ids] = []
    # in portions: a fast tokenizer also returns offsets and strings, which take 100 bytes per token and more
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        # verbose=False: no warning about texts longer than the context window, since lengths are checked here
        encoding = tokenizer(list(texts[start : start + TEXTS_AT_ONCE]), add_special_tokens=False, verbose=False)
        ids.extend(map(tuple, encoding["input_ids"]))
    return ids


def pieces_of(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Pattern of the pieces of a text that a tokenizer encodes independently; None if it is not known to do so.

    A text is cut behind an ASCII letter or digit that a space, a line break or punctuation follows, behind ASCII
    punctuation that a space follows, and behind a space or line break that a space and an ASCII character follow,
    unless an added token begins with that character. No added token may have a cut inside, or depend on what is around
    it.
    """
    kind = type(tokenizer)
    ordinary = isinstance(tokenizer, PreTrainedTokenizerFast) and all(
        getattr(kind, name) is getattr(PreTrainedTokenizerFast, name) for name in ("__call__", "_encode_plus")
    )
    if not ordinary:
        return None
    backend = _backend(tokenizer)
    if getattr(backend.model, "dropout", None) or not _is_local(backend.normalizer) or not _cuts(backend.pre_tokenizer):
        return None
    tokens = list(backend.get_added_tokens_decoder().values())
    # these take white space around them, or look at the letters around them
    if any(token.lstrip or token.rstrip or token.single_word for token in tokens):
        return None
    if any(re.search(rf"[!-~] |[{_LETTERS}]\n|[ \n] ([!-~]|$)", token.content) for token in tokens):
        return None
    # an apostrophe begins a contraction, which some expressions keep with the word before it
    marks = set(string.punctuation) - {"'"}
    marks = {mark for mark in marks if not any(re.search(f"[{_LETTERS}]{re.escape(mark)}", t.content) for t in tokens)}
    end = _any_of({" ", "\n", *marks})
    # white space in front of an added token does not end with the space of a word
    begin = _any_of({*string.ascii_letters, *string.digits, *string.punctuation} - {t.content[:1] for t in tokens})
    letter, other, mark = f"[{_LETTERS}]", f"[^{_LETTERS}]", r"[!-/:-@\[-`{-~]"
    pieces = (
        # a word; punctuation; punctuation and white space up to the space of the next word
        *(rf" ?{letter}+(?=[{end}])", rf" ?{mark}+(?= )", rf" ?{mark}*[ \n]+(?= [{begin}])"),
        # behind a letter that no end follows, as in "it's", a piece goes on to the end of the next word
        rf"{other}*{letter}+(?:[^{_LETTERS}{end}]{other}*{letter}*)*",
        rf"{other}+",
    )
    return re.compile("|".join(pieces))


def _any_of(characters: set[str]) -> str:
    """Inside of a character class."""
    return "".join(map(re.escape, sorted(characters)))


def _is_local(normalizer: _Part | None) -> bool:
    """Whether a normalizer changes no text across a cut."""
    # a space composes with no character, and neither does what follows a cut
    return normalizer is None or all(step["type"] == "NFC" for step in _steps(normalizer, "normalizers"))


def _cuts(pre_tokenizer: _Part | None) -> bool:
    """Whether a pre-tokenizer splits every text at the cuts, each side independent of the other."""
    if pre_tokenizer is None:
        return False
    found = False
    steps = _steps(pre_tokenizer, "pretokenizers")
    for place, step in enumerate(steps):
        if step["type"] == "ByteLevel":
            # later steps would see other characters, and a prefix space would be put in front of every piece
            if step["add_prefix_space"] or place < len(steps) - 1:
                return False
            found = found or bool(step.get("use_regex", True))
        elif step["type"] == "Split":
            pattern = cast(Mapping[str, str], step["pattern"]).get("Regex", "")
            # at "|" outside of parentheses
            alternatives = set(re.split(r"\|(?![^(]*\))", pattern))
            options = {name: step[name] for name in ("behavior", "invert")}
            if not alternatives <= _ALTERNATIVES or options not in _SPLITS:
                return False
            # white space and punctuation are parts of their own, so that what is between them is one as well, and white
            # space leaves its last character to the word behind it
            spaces = alternatives >= {r"\s+", r"\s+(?!\S)"}
            whole = spaces and any(r" ?[^\s\p{L}\p{N}]+" in one for one in alternatives)
            if step["invert"] and not whole:
                return False
            found = found or whole
        elif step["type"] != "Digits":
            return False
    return found


def _steps(part: _Part, name: str) -> list[dict[str, object]]:
    """Settings of a part of a tokenizer, or of the parts of a sequence."""
    settings: dict[str, object] = json.loads(part.__getstate__())
    return cast(list[dict[str, object]], settings[name]) if settings["type"] == "Sequence" else [settings]


def _numbers(ids: bytes) -> Ids:
    return tuple(array("i", ids))


# the library of tokenizers has no types
class _Part(Protocol):
    def __getstate__(self) -> bytes: ...


class _AddedToken(Protocol):
    content: str
    lstrip: bool
    rstrip: bool
    single_word: bool


class _Encoding(Protocol):
    ids: list[int]


class _Backend(Protocol):
    model: object
    normalizer: _Part | None
    pre_tokenizer: _Part | None
    encode_special_tokens: bool

    def get_added_tokens_decoder(self) -> dict[int, _AddedToken]: ...

    def no_truncation(self) -> None: ...

    def no_padding(self) -> None: ...

    def encode_batch_fast(self, texts: list[str], *, add_special_tokens: bool) -> list[_Encoding]: ...


def _backend(tokenizer: PreTrainedTokenizerBase) -> _Backend:
    return cast(_Backend, cast(PreTrainedTokenizerFast, tokenizer).backend_tokenizer)
