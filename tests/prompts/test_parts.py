"""One file, two parts: whole conversations on one side each, whatever else is in the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_rlhf.prompts import DatasetPrompts, HHPrompts
from lightning_rlhf.prompts.parts import is_heldout
from lightning_rlhf.types import PromptRow


def write(path: Path, firsts: list[str]) -> str:
    """Two pairs per first turn; the second has one more turn."""
    lines = []
    for first in firsts:
        for begin in (
            f"\n\nHuman: {first}\n\nAssistant:",
            f"\n\nHuman: {first}\n\nAssistant: x\n\nHuman: y\n\nAssistant:",
        ):
            lines.append(json.dumps({"chosen": begin + " good", "rejected": begin + " bad"}))
    path.write_text("\n".join(lines))
    return str(path)


def firsts_of(rows: list[PromptRow]) -> list[str]:
    return [row.messages[0]["content"] for row in rows if row.messages is not None]


def test_parts_are_disjoint_and_complete_and_keep_conversations_together(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [f"question {i}" for i in range(400)])
    train, heldout = HHPrompts(path, part="train").load(), HHPrompts(path, part="heldout").load()
    assert not set(firsts_of(train)) & set(firsts_of(heldout))
    assert len(train) + len(heldout) == len(HHPrompts(path).load()) == 800
    # a fifth of 400 conversations; 8 is one standard deviation
    assert abs(len(heldout) / 2 - 80) < 32


def test_other_rows_move_none(tmp_path: Path) -> None:
    few = HHPrompts(write(tmp_path / "few.jsonl", ["a", "b", "c", "d"]), part="train", heldout_share=0.5).load()
    many = HHPrompts(write(tmp_path / "many.jsonl", list("zyxdcba")), part="train", heldout_share=0.5).load()
    assert set(firsts_of(few)) == set(firsts_of(many)) & set("abcd")


def test_the_rule_is_the_first_64_bits_of_the_hash() -> None:
    # sha256("a") = ca978112ca1bbdca..., and 0xca978112 / 2**32 = 0.79137
    row = PromptRow("row 1", text="a")
    assert is_heldout(row, 0.7914)
    assert not is_heldout(row, 0.7913)


def test_bad_use_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}')
    assert len(DatasetPrompts(str(path), part="train").load()) == 1
    with pytest.raises(ValueError, match=r"part=heldout with heldout_share=0\.2 is none of 1 rows"):
        DatasetPrompts(str(path), part="heldout").load()
    with pytest.raises(ValueError, match="part must be one of all, train, heldout; got 'test'"):
        DatasetPrompts(str(path), part="test").load()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"heldout_share must lie in \(0, 1\); got 1"):
        DatasetPrompts(str(path), part="train", heldout_share=1.0).load()
