"""`HHPrompts`: transcripts to turns, and a count for every one that breaks the format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_rlhf.prompts import DatasetPrompts, HHPrompts


HH = Path(__file__).parents[2].parent / "shared" / "data" / "hh-rlhf" / "harmless-base.test.jsonl.gz"
START = "\n\nHuman: hi \n\nAssistant: hello\n\nthere\n\nHuman: why?\n\nAssistant:"


def write(tmp_path: Path, *pairs: tuple[object, object]) -> str:
    path = tmp_path / "hh.jsonl"
    path.write_text("".join(json.dumps({"chosen": a, "rejected": b}) + "\n" for a, b in pairs))
    return str(path)


def test_transcripts_become_turns_and_completions(tmp_path: Path) -> None:
    (row,) = HHPrompts(write(tmp_path, (START + " because\n\nso it is", START + " no idea "))).load()
    assert row.messages == (
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello\n\nthere"},
        {"role": "user", "content": "why?"},
    )
    assert row.pair is not None
    assert (row.pair.chosen, row.pair.rejected) == ("because\n\nso it is", "no idea")


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (START + " a", START.replace("why", "how") + " b", "prompts differ"),
        (START + " a", "\n\nHuman: hi\n\nAssistant: b", "prompts differ"),
        (START + " a", START + " a  ", "identical completions"),
        (START + " a", START, "empty completion"),
        (START + " a", START + " b\n\nHuman: and?", "does not end with Assistant"),
        ("\n\nHuman: q\n\nHuman: q2\n\nAssistant: a", START + " b", "turns do not alternate"),
        ("\n\nHuman: q\n\nAssistant: a\n\nAssistant: a2", START + " b", "turns do not alternate"),
        ("\n\nAssistant: a", START + " b", "does not begin with Human"),
        ("Once upon a time" + START + " a", "Once upon a time" + START + " b", "does not begin with Human"),
        ("no transcript", START + " b", "does not begin with Human"),
        ("", START + " b", "does not begin with Human"),
        ("\n\nHuman:\n\nAssistant: a", "\n\nHuman:\n\nAssistant: b", "empty turn in the prompt"),
    ],
)
def test_broken_transcripts_are_counted_by_reason(tmp_path: Path, chosen: str, rejected: str, reason: str) -> None:
    good = (START + " good", START + " bad")
    for pair in ((chosen, rejected), (rejected, chosen)):
        source = HHPrompts(write(tmp_path, good, pair))
        assert [row.source[-5:] for row in source.load()] == ["row 1"]
        assert source.report == {reason: 1}


def test_rows_of_another_kind_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"hh\.jsonl row 2: field 'rejected' must be text, got 3 \(int\)"):
        HHPrompts(write(tmp_path, (START + " a", START + " b"), (START + " a", 3))).load()
    (tmp_path / "other.jsonl").write_text('{"prompt": "x", "chosen": "y"}\n')
    with pytest.raises(ValueError, match=r"row 1: field 'rejected' is missing among \['chosen', 'prompt'\]"):
        HHPrompts(str(tmp_path / "other.jsonl")).load()
    with pytest.raises(ValueError, match=r"none of 1 rows can be used.*does not begin with Human': 1.*DatasetPrompts"):
        HHPrompts(write(tmp_path, ("a", "b"))).load()


@pytest.mark.skipif(not HH.exists(), reason="needs shared/data/hh-rlhf")
def test_every_row_of_the_real_file_is_kept_or_counted() -> None:
    source = HHPrompts(str(HH))
    rows = source.load()
    # counted independently with regular expressions: nine transcripts with two turns in a row by one side (five of
    # these differ in their prompts as well), and four pairs with an empty completion
    assert source.report == {"turns do not alternate": 9, "empty completion": 4}
    assert len(rows) == 2312 - 9 - 4
    assert len({row.source for row in rows}) == len(rows)
    for row in rows:
        assert row.messages is not None
        assert [message["role"] for message in row.messages] == ["user", "assistant"] * (len(row.messages) // 2) + [
            "user"
        ]
        assert row.pair is not None
        assert "\n\nHuman:" not in row.pair.chosen + row.pair.rejected
    assert len(HHPrompts(str(HH), limit=10).load()) == 10
    with pytest.raises(ValueError, match=r"row 1: .*HHPrompts"):
        DatasetPrompts(str(HH), limit=10).load()


def test_labels_beside_transcripts_are_read_and_checked(tmp_path: Path) -> None:
    row = {"chosen": START + " a", "rejected": START + " b"}
    path = tmp_path / "hh.jsonl"
    path.write_text(json.dumps({**row, "label": 0.25, "weight": 2}))
    (parsed,) = HHPrompts(str(path)).load()
    assert parsed.pair is not None
    assert (parsed.pair.probability, parsed.pair.weight) == (0.25, 2.0)
    path.write_text(json.dumps({**row, "label": False}))
    with pytest.raises(ValueError, match=r"hh\.jsonl row 1: field 'label' must be a number"):
        HHPrompts(str(path)).load()
