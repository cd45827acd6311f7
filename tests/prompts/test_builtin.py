"""`BuiltinPrompts`: counts, no leakage between the splits, and varied wording."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest

from lightning_rlhf.prompts import BuiltinPrompts


def contents(split: Any) -> list[str]:
    rows = BuiltinPrompts(split).load()
    assert all(row.messages is not None and len(row.messages) == 1 for row in rows)
    assert {message["role"] for row in rows for message in row.messages or ()} == {"user"}
    return [message["content"] for row in rows for message in row.messages or ()]


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def test_splits_have_their_sizes_and_share_nothing() -> None:
    train, heldout = contents("train"), contents("heldout")
    assert (len(train), len(heldout)) == (256, 64)
    everything = train + heldout
    assert len({" ".join(sorted(words(text))) for text in everything}) == 320
    # near copies: no two prompts share half of their words
    bags = [words(text) for text in everything]
    overlap = max(len(a & b) / len(a | b) for i, a in enumerate(bags) for b in bags[:i])
    assert overlap < 0.5


def test_wording_is_varied_and_short() -> None:
    texts = contents("train") + contents("heldout")
    assert all(8 <= len(text.split()) <= 18 and text == text.strip() for text in texts)
    (_, most_common), *_ = Counter(" ".join(text.split()[:2]) for text in texts).most_common(1)
    assert most_common < 320 / 20


def test_the_first_prompts_cover_all_topics() -> None:
    # topics take turns: a run with few prompts is varied too
    assert [row.source for row in BuiltinPrompts(limit=3).load()] == [f"instructions.jsonl row {k}" for k in (1, 2, 3)]
    rows = BuiltinPrompts("heldout", limit=16).load()
    assert len(rows) == 16
    assert rows[0].source == "instructions.jsonl row 257"


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="split must be 'train' or 'heldout'; got 'test'"):
        BuiltinPrompts("test").load()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="limit must be at least 1"):
        BuiltinPrompts(limit=0).load()
