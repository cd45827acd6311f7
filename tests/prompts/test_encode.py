"""`TextEncoder`: ids piece by piece are those of whole texts, for every tokenizer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_rlhf.prompts import encode, tokenize, tokenize_rows
from lightning_rlhf.prompts.encode import Encoded, TextEncoder, encode_all, pieces_of
from lightning_rlhf.types import PromptRow, RecordedPair

from .families import FAMILIES, byte_level


# the expressions of GPT-4 and Llama-3, of Qwen2, of GPT-4o, and of Tekken
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
EXPRESSIONS = {
    "gpt4": GPT4,
    "qwen2": GPT4.replace("{1,3}", ""),
    "gpt4o": rf"{WORD}*{LOWER}+{CONTRACTION}|{WORD}+{LOWER}*{CONTRACTION}|\p{{N}}{{1,3}}|{REST}",
    "tekken": rf"{WORD}*{LOWER}+|{WORD}+{LOWER}*|\p{{N}}|{REST}",
}
PARTS = [
    *("a", "the", "river", "don't", "it's", "I'LL", "x'", "'re", "é", "e\u0301", "\u0301", "naïve", "12345", "7", "٣"),
    *(
        " ",
        " ",
        " ",
        "  ",
        "    ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "\u00a0",
        "\u2028",
        "\x1c",
        "\x85",
        "_",
        "__a",
        "-",
        "…",
    ),
    *(".", ", ", "(", "):", "/", "//", "'", '"', "\u2018", "$", "^a", "`", "~", "<", ">", "|", "<|end|>", "<b>"),
    *("<|e", "nd|>", " <|end|>", "  <|end|>", "\n <|end|> ", "a<|end|>b", "漢字", "Ⅷ", "ﬁ", "\u2126", "\U0001f600"),
]


def wrapped(core: Tokenizer) -> PreTrainedTokenizerFast:
    make: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerFast = make(tokenizer_object=core, eos_token="<|end|>")
    return tokenizer


def split_by(expression: str, digits: bool = False, nfc: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that splits texts with an expression; merges inside words come from its training."""
    core = byte_level()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if expression != "gpt2":
        steps.append(pre_tokenizers.Split(Regex(expression), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=expression == "gpt2"))
    core.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if nfc:
        core.normalizer = normalizers.NFC()
    return wrapped(core)


def whole_words(expression: str) -> PreTrainedTokenizerFast:
    """An id for every part that an expression makes, so that no two splits of a text have the same ids."""
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=expression == "gpt2")]
    if expression != "gpt2":
        steps.insert(0, pre_tokenizers.Split(Regex(expression), "isolated"))
    pre_tokenizer = pre_tokenizers.Sequence(steps)
    found: set[str] = {"<unk>"}
    for text in texts():
        # a special token splits a text before
        for segment in text.split("<|end|>"):
            found |= {part for part, _ in pre_tokenizer.pre_tokenize_str(segment)}
    core = Tokenizer(models.WordLevel({part: number for number, part in enumerate(sorted(found))}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizer
    core.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    return wrapped(core)


def texts(count: int = 500) -> Iterator[str]:
    numbers = random.Random(0)
    for _ in range(count):
        yield "".join(numbers.choices(PARTS, k=numbers.randint(0, 14)))


TOKENIZERS = {
    **{name: lambda name=name: FAMILIES[name].tokenizer() for name in FAMILIES},
    **{name: lambda text=text: split_by(text) for name, text in EXPRESSIONS.items()},
    **{f"{name}, words": lambda text=text: whole_words(text) for name, text in {**EXPRESSIONS, "gpt2": "gpt2"}.items()},
    "gpt2, digits, NFC": lambda: split_by("gpt2", digits=True, nfc=True),
}
# these do not split texts at words, or have tokens that take white space
WHOLE = {name for name, family in FAMILIES.items() if family.core != "bytes"}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_are_those_of_whole_texts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TOKENIZERS[name]()
    assert (pieces_of(tokenizer) is None) == (name in WHOLE)
    made = list(texts())
    # an earlier call that cuts and pads must play no part
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["a b c", "a"], truncation=True, max_length=2, padding="max_length")
    # and the dictionary is emptied some times
    monkeypatch.setattr(encode, "MOST_PIECES", 300)
    encoder = TextEncoder(tokenizer)
    expected = encode_all(tokenizer, made)
    assert encoder.encode(made) == expected
    rests = made[1:] + made[:1]
    tails = encoder.encode_open(made)
    assert [one.ids for one in tails] == expected
    wholes = encoder.encode([one.tail + rest for one, rest in zip(tails, rests, strict=True)])
    joined = [one.whole(ids) for one, ids in zip(tails, wholes, strict=True)]
    assert joined == encode_all(tokenizer, [text + rest for text, rest in zip(made, rests, strict=True)])


def test_words_are_encoded_once() -> None:
    tokenizer = split_by("gpt2")
    encoder = TextEncoder(tokenizer)
    encoder.encode(["the river, the city.\n    the river,\n the river"])
    pieces = ["the", " river", ",", " the", " city", ".\n   ", ",\n"]
    assert set(encoder._ids) == set(pieces)
    (one,) = encoder.encode_open(["the river"])
    assert one == Encoded(encode_all(tokenizer, ["the river"])[0], " river", encode_all(tokenizer, [" river"])[0])


@pytest.mark.parametrize(
    "token",
    [
        AddedToken("<x>", rstrip=True),
        AddedToken("<x>", lstrip=True),
        AddedToken("x", single_word=True),
        AddedToken("two words"),
        AddedToken("    "),
    ],
)
def test_tokens_that_depend_on_what_is_around_them_need_whole_texts(token: AddedToken) -> None:
    core = byte_level()
    core.add_tokens([token])
    assert pieces_of(wrapped(byte_level())) is not None and pieces_of(wrapped(core)) is None


def test_unknown_ways_of_splitting_need_whole_texts() -> None:
    parts: list[Any] = [
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        pre_tokenizers.Metaspace(),
        pre_tokenizers.Split(Regex(r"\w+ \w+|\s+(?!\S)|\s+"), "isolated"),
        pre_tokenizers.Split(Regex(GPT4), "merged_with_next"),
    ]
    for part in parts:
        core = byte_level()
        core.pre_tokenizer = part
        assert pieces_of(wrapped(core)) is None
    core = byte_level()
    core.normalizer = normalizers.Replace(" ", "_")
    assert pieces_of(wrapped(core)) is None
    core = byte_level()
    assert pieces_of(wrapped(core)) is not None
    core.model.dropout = 0.1
    assert pieces_of(wrapped(core)) is None


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_have_the_prompts_of_whole_texts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain rows, conversations of several turns, borders inside a token, and limits that cut."""
    tokenizer = FAMILIES[name].tokenizer()
    made = [text for text in texts() if text.strip()]
    numbers = random.Random(1)
    rows = []
    for number in range(60):
        prompt, chosen, rejected = numbers.sample(made, 3)
        pair = RecordedPair(chosen, rejected, 0.9)
        rows.append(PromptRow(f"row {number}", text=prompt, pair=pair))
        if tokenizer.chat_template:
            turns = [{"role": role, "content": numbers.choice(made)} for role in ("user", "assistant", "user")]
            rows.append(PromptRow(f"row {number}", messages=tuple(turns[-numbers.choice((1, 3)) :]), pair=pair))
    # single letters merge with what is behind them
    rows += [PromptRow("r", text=word[:2], pair=RecordedPair(word[2:] + " is", "x")) for word in ("river", "water")]

    def load() -> Any:
        limits = {"max_prompt_tokens": 30, "max_response_tokens": 9, "on_long_prompt": "truncate"}
        return tokenize_rows(rows, tokenizer, **limits)  # type: ignore[arg-type]

    try:
        found = load()
    except ValueError as error:
        # a template that takes no such text: the other way says the same
        found = str(error)
    monkeypatch.setattr(encode, "pieces_of", lambda _: None)
    monkeypatch.setattr(tokenize, "TEXTS_AT_ONCE", 16)
    try:
        expected = load()
    except ValueError as error:
        expected = str(error)
    assert found == expected
