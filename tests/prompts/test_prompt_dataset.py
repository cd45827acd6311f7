"""`DatasetPrompts`: the row formats, what is left out, and what the errors say."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_rlhf.prompts import DatasetCompletions, DatasetPrompts
from lightning_rlhf.prompts.dataset import common_words
from lightning_rlhf.types import PromptRow, RecordedPair


USER = {"role": "user", "content": "Hi?"}
SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def said(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(tmp_path: Path, *rows: Any, **options: Any) -> list[PromptRow]:
    return DatasetPrompts(write(tmp_path / "rows.jsonl", list(rows)), **options).load()


def test_plain_prompts_come_as_they_stand_with_their_origin(tmp_path: Path) -> None:
    rows = load(tmp_path, {"prompt": " The film was"}, {"prompt": "Grüße,\nübrigens"})
    assert [row.text for row in rows] == [" The film was", "Grüße,\nübrigens"]
    assert [row.source for row in rows] == [f"{tmp_path}/rows.jsonl row 1", f"{tmp_path}/rows.jsonl row 2"]
    assert all(row.messages is None and row.pair is None for row in rows)


def test_plain_preference_row(tmp_path: Path) -> None:
    (row,) = load(tmp_path, {"prompt": "1+1=", "chosen": "2", "rejected": "3", "probability": 0.75, "weight": 2})
    assert (row.text, row.pair) == ("1+1=", RecordedPair("2", "3", probability=0.75, weight=2.0))


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": [USER], "chosen": [said("yes")], "rejected": [said("no")]},
        {"prompt": [USER], "chosen": "yes", "rejected": "no"},
        {"prompt": "Hi?", "chosen": [said("yes")], "rejected": [said("no")]},
        {"prompt": [USER], "chosen": [USER, said("yes")], "rejected": [USER, said("no")]},
        {"chosen": [USER, said("yes")], "rejected": [USER, said("no")]},  # implicit prompt
        {"prompt": None, "chosen": [USER, said("yes")], "rejected": [USER, said("no")]},
    ],
)
def test_conversational_formats_mean_the_same(tmp_path: Path, columns: dict[str, Any]) -> None:
    (row,) = load(tmp_path, columns)
    assert (row.text, row.messages, row.pair) == (None, (USER,), RecordedPair("yes", "no"))
    (prompt_only,) = load(tmp_path, columns, kind="prompt")
    assert (prompt_only.messages, prompt_only.pair) == ((USER,), None)


def test_implicit_prompt_is_the_longest_common_beginning(tmp_path: Path) -> None:
    beginning = [{"role": "system", "content": "Be brief."}, USER, said("Hi."), {"role": "user", "content": "Why?"}]
    (row,) = load(tmp_path, {"chosen": [*beginning, said("A")], "rejected": [*beginning, said("B")]})
    assert row.messages == tuple(beginning)


def test_pairs_without_information_are_dropped_and_counted(tmp_path: Path) -> None:
    same = [USER, said("same")]
    source = DatasetPrompts(
        write(
            tmp_path / "rows.jsonl",
            [
                {"prompt": [USER], "chosen": "a", "rejected": "a"},
                {"prompt": [USER], "chosen": "a", "rejected": "b"},
                {"prompt": [USER], "chosen": " \n", "rejected": "b"},
                {"prompt": [USER], "chosen": "a", "rejected": ""},
                {"chosen": same, "rejected": same},
            ],
        )
    )
    for _ in range(2):  # loading again does not count twice
        assert [row.source[-5:] for row in source.load()] == ["row 2"]
        assert source.report == {"identical completions": 2, "empty completion": 2}


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none of 1 rows.*identical completions': 1"):
        load(tmp_path, {"prompt": "x", "chosen": "a", "rejected": "a"})


def test_label_is_another_name_for_probability(tmp_path: Path) -> None:
    base = {"prompt": "x", "chosen": "a", "rejected": "b"}
    rows = load(tmp_path, *({**base, "label": label} for label in (0.25, 1, 0, None)))
    assert [row.pair.probability for row in rows if row.pair] == [0.25, 1.0, 0.0, 1.0]
    for label in (True, False, "good", 3, float("nan"), [1]):
        with pytest.raises(ValueError, match=r"rows\.jsonl row 1: field 'label' must be a number in \[0, 1\], got"):
            load(tmp_path, {**base, "label": label})
    for name, value in (("probability", True), ("weight", True), ("weight", "2"), ("weight", float("inf"))):
        with pytest.raises(ValueError, match=rf"rows\.jsonl row 1: field '{name}' must be a number"):
            load(tmp_path, {**base, name: value})
    with pytest.raises(ValueError, match=r"row 1: field 'label' says 0.25, but 'probability' says 0.5"):
        load(tmp_path, {**base, "label": 0.25, "probability": 0.5})
    # without pairs a label means something else
    assert load(tmp_path, {"prompt": "x", "label": "positive"})[0].pair is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": 7}, r"field 'chosen' must be text or a list of messages, got 7 \(int\)"),
        ({"chosen": None}, r"field 'chosen' is missing: add it, or set kind=\"prompt\""),
        ({"chosen": []}, r"field 'chosen' must be text or a list of messages, got \[\]"),
        ({"chosen": [USER]}, "field 'chosen' must have one message by the assistant.*got messages by: user"),
        ({"chosen": [said("a"), said("b")]}, "field 'chosen' must have one message.*assistant, assistant"),
        ({"rejected": [{"from": "gpt", "value": "b"}]}, "field 'rejected' has no role and content in message 1"),
        ({"rejected": [{"role": "bot", "content": "b"}]}, "field 'rejected' has an unknown role.*'bot'.*use one of"),
        ({"rejected": [said(["b"])]}, r"field 'rejected\[0\].content' has a part 1 that is no text, got 'b'"),  # type: ignore[arg-type]
        ({"prompt": 1.5}, "field 'prompt' must be text or a list of messages"),
        ({"prompt": None}, "field 'prompt' is missing, and the completions are no texts with a common.*add a column"),
        ({"prompt": [USER, said("x")]}, "field 'prompt' has a prompt that ends with the assistant's turn"),
        ({"prompt": "half \ud800"}, "field 'prompt' holds half of a surrogate pair at character 5"),
        ({"probability": 1.5}, r"field 'probability' must be a number in \[0, 1\], got 1.5"),
        ({"probability": "1"}, r"field 'probability' must be a number in \[0, 1\], got '1'"),
        ({"label": float("nan")}, r"field 'label' must be a number in \[0, 1\], got nan"),
        ({"weight": -1}, "field 'weight' must be a number finite and at least 0, got -1"),
        ({"weight": float("inf")}, "field 'weight' must be a number finite"),
        ({"weight": 10**400}, "field 'weight' must be a number finite"),
    ],
)
def test_malformed_row_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    good = {"prompt": "x", "chosen": "a", "rejected": "b"}
    with pytest.raises(ValueError, match=r"rows\.jsonl row 2: " + message):
        load(tmp_path, good, {**good, **change}, good)


def test_a_column_that_looks_like_the_prompt_is_named(tmp_path: Path) -> None:
    """Both answers begin with "The", which is no prompt."""
    row = {"question": "Why is it blue?", "chosen": "The air scatters it.", "rejected": "The sea is."}
    with pytest.raises(ValueError, match=r"row 1: field 'prompt' is missing: set prompt_column=question if that is"):
        load(tmp_path, row)
    assert load(tmp_path, row, prompt_column="question")[0].text == "Why is it blue?"
    assert load(tmp_path, row, ignored_fields=["question"])[0].text == "The"


def test_implicit_plain_prompt_ends_between_words(tmp_path: Path) -> None:
    (row,) = load(tmp_path, {"chosen": "Is water wet? Yes, it is.", "rejected": "Is water wet? Yet it is not."})
    assert row.text == "Is water wet?"
    assert row.pair is not None
    assert (row.pair.chosen, row.pair.rejected) == (" Yes, it is.", " Yet it is not.")
    # one is the beginning of the other, and the difference is behind a word of one
    assert common_words("It is", "It is blue") == "It"
    assert common_words("ab c", "abx c") == ""


def test_implicit_plain_prompt_is_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"row 1: field 'prompt' is missing.*write both completions as lists"):
        load(tmp_path, {"chosen": "You", "rejected": "Me"})
    with pytest.raises(ValueError, match=r"row 1: field 'prompt' is missing.*HHPrompts"):
        load(tmp_path, {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"})
    with pytest.raises(ValueError, match="row 1: field 'chosen' begins with another message than 'rejected'"):
        load(tmp_path, {"chosen": [USER, said("a")], "rejected": [{**USER, "content": "Ho?"}, said("a")]})


def test_missing_columns_are_listed_with_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no column 'prompt'; its columns are \['question', 'id'\]"):
        load(tmp_path, {"question": "x", "id": 1})
    assert load(tmp_path, {"question": "x", "id": 1}, prompt_column="question")[0].text == "x"
    with pytest.raises(ValueError, match=r"no column 'chosen' and 'rejected'; its columns are \['prompt'\]"):
        load(tmp_path, {"prompt": "x"}, kind="preference")


def test_bad_lines_are_named_and_blank_lines_count(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n\n{"prompt": "b"}\n')
    assert [row.source[-5:] for row in DatasetPrompts(str(path)).load()] == ["row 1", "row 3"]
    for line in (b'{"prompt": ', b'{"prompt": "\xff"}', b"[" * 100_000, b'{"prompt": ' + b"9" * 5000 + b"}"):
        path.write_bytes(b'{"prompt": "a"}\n' + line + b"\n")
        with pytest.raises(ValueError, match=r"rows\.jsonl row 2: .*JSON"):
            DatasetPrompts(str(path)).load()
    path.write_bytes(b'{"prompt": "a"}\n["b"]\n')
    with pytest.raises(ValueError, match=r"row 2: expected an object with named fields, got \['b'\] \(list\)"):
        DatasetPrompts(str(path)).load()


def test_formats_agree(tmp_path: Path) -> None:
    import datasets

    rows = [{"prompt": [USER], "chosen": [said(f"a{i}")], "rejected": [said(f"b{i}")]} for i in range(5)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "c.json").write_text(text)
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.write(text)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "e.parquet")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text(text)
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "saved")

    expected = [RecordedPair(f"a{i}", f"b{i}") for i in range(5)]
    for name in ("a.jsonl", "b.json", "c.json", "d.jsonl.gz", "e.parquet", "folder", "saved"):
        loaded = DatasetPrompts(str(tmp_path / name)).load()
        assert [row.pair for row in loaded] == expected, name
        assert [row.messages for row in loaded] == [(USER,)] * 5
        assert loaded[-1].source.endswith(" row 5")
        assert [row.pair for row in DatasetPrompts(str(tmp_path / name), limit=2).load()] == expected[:2]
    for name in ("folder", "saved"):
        with pytest.raises(ValueError, match=rf"{name}: cannot read split 'test' of this folder.*train"):
            DatasetPrompts(str(tmp_path / name), split="test").load()


def test_missing_and_unreadable_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"none/rows\.jsonl: no such file or folder.*Hub data set by its id"):
        DatasetPrompts(str(tmp_path / "none" / "rows.jsonl")).load()
    with pytest.raises(ValueError, match=r"^rows\.jsonl: no such file"):
        DatasetPrompts("rows.jsonl").load()
    with pytest.raises(ValueError, match="no such file"):
        DatasetPrompts("").load()
    with pytest.raises(ValueError, match="no-such-owner/no-such-data: cannot read split 'train' of this Hub data set"):
        DatasetPrompts("no-such-owner/no-such-data").load()
    for name, content, message in (
        ("rows.txt", b"prompt\nx\n", "cannot tell the format from the name: use one of .jsonl"),
        ("rows.jsonl", b"\n\n", "has no rows"),
        ("rows.json", b"[]", "has no rows"),
        ("rows.json", b"[1", "not valid JSON"),
        ("rows.jsonl.gz", b"no gzip", "not a whole gzip file"),
        ("cut.jsonl.gz", gzip.compress(b'{"prompt": "x"}\n' * 1000)[:-9], "not a whole gzip file"),
        ("rows.parquet", b"no parquet", "not a readable Parquet file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}: {message}"):
            DatasetPrompts(str(tmp_path / name)).load()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: cannot read split 'train' of this folder"):
        DatasetPrompts(str(tmp_path / "empty")).load()
    with pytest.raises(ValueError, match="limit must be at least 1"):
        DatasetPrompts(str(tmp_path / "rows.json"), limit=0).load()


def test_real_conversations() -> None:
    path = SHARED / "oasst" / "en_100_pairs.jsonl"
    if not path.exists():
        pytest.skip("needs shared/data/oasst")
    source = DatasetPrompts(str(path), prompt_column="messages")
    rows = source.load()
    assert len(rows) + sum(source.report.values()) == sum(1 for _ in path.open(encoding="utf-8"))
    assert all(row.pair and row.messages and row.messages[-1]["role"] == "user" for row in rows)


# values of the right shape as often as any others, so that the checks behind the first are reached too
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8)
ROLES = st.sampled_from(["user", "user", "assistant", "system", "x"])
MESSAGES = st.lists(st.fixed_dictionaries({"role": ROLES, "content": st.sampled_from("ab") | SCALARS}), max_size=3)
TEXTS = st.text(st.characters(), max_size=4) | MESSAGES | SCALARS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner), max_leaves=6
)
COLUMNS = {
    "prompt": TEXTS,
    "chosen": TEXTS,
    "rejected": TEXTS,
    "weight": SCALARS,
    "label": SCALARS,
    "probability": VALUES,
}
ROWS = st.fixed_dictionaries({}, optional=COLUMNS)
PROMPTS = st.fixed_dictionaries({"prompt": st.text(max_size=4) | MESSAGES})
PAIRS = st.fixed_dictionaries(
    {"prompt": st.text(max_size=4), "chosen": st.sampled_from("ab"), "rejected": st.sampled_from("bc")},
    optional={"weight": st.floats(0, 2) | SCALARS, "label": st.floats(0, 1) | SCALARS},
)
LINES = st.lists(
    st.one_of(*(kind.map(lambda value: json.dumps(value).encode()) for kind in (ROWS, PROMPTS, PAIRS, VALUES)))
    | st.binary(max_size=12),
    max_size=3,
)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=LINES, kind=st.sampled_from(["auto", "prompt", "preference"]))
def test_any_lines_give_rows_or_an_error_that_says_where(tmp_path: Path, lines: list[bytes], kind: Any) -> None:
    path = tmp_path / "fuzz.jsonl"
    path.write_bytes(b"\n".join(lines))
    source = DatasetPrompts(str(path), kind=kind)
    rows, message = [], ""
    try:
        rows = source.load()
    except ValueError as error:
        message = str(error).removeprefix(str(path))
    # what concerns the file as a whole names the file, everything else the row
    assert rows or message.startswith((" row ", ": has no rows", ": no column ", ": none of ")), message
    for row in rows:
        assert (row.text is None) != (row.messages is None)
        assert row.messages is None or row.messages[-1]["role"] != "assistant"
        assert row.pair is None or (0 <= row.pair.probability <= 1 and row.pair.weight >= 0)
        assert kind != "preference" or row.pair is not None
        assert kind != "prompt" or row.pair is None


CALL = {"function": {"name": "gauge", "arguments": {"river": "Elbe"}}}


def test_fields_of_messages_and_columns_for_the_template_are_kept(tmp_path: Path) -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [CALL], "name": None}
    parts = {
        "role": "tool",
        "content": [{"type": "text", "text": "2 "}, {"type": "text", "text": "m"}],
        "name": "gauge",
    }
    row = {
        "prompt": [USER, called, parts],
        "chosen": [{"role": "assistant", "content": "two", "reasoning_content": "is it?"}],
        "rejected": [called],
        "tools": json.dumps([CALL]),
        "chat_template_kwargs": {"enable_thinking": False},
        "finish_reason_rejected": "length",
    }
    (parsed,) = load(tmp_path, row)
    kept = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert parsed.messages == (USER, kept, {"role": "tool", "content": "2 m", "name": "gauge"})
    assert parsed.answers == (row["chosen"][0], kept)
    assert parsed.pair is not None
    assert parsed.pair.chosen == "two\n[reasoning_content] is it?"
    assert '"gauge"' in parsed.pair.rejected
    assert parsed.template_options == {"tools": [CALL], "enable_thinking": False}
    assert parsed.finish_reasons == ("eos", "length")
    # the same from Parquet, which fills up what only other messages have
    file = tmp_path / "rows.parquet"
    whole = {**parts, "content": "2 m"}  # Arrow has one type per field
    Dataset.from_list([{**row, "prompt": [USER, called, whole]}]).to_parquet(str(file))
    (again,) = DatasetPrompts(str(file)).load()
    assert (again.messages, again.answers, again.pair) == (parsed.messages, parsed.answers, parsed.pair)
    (tmp_path / "less.jsonl").write_text(json.dumps({**row, "prompt": [USER], "rejected": "b"}))
    (less,) = DatasetPrompts(str(tmp_path / "less.jsonl"), ignored_fields=["reasoning_content", "tools"]).load()
    assert (less.answers, less.template_options) == ((), {"enable_thinking": False})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": [{"role": "user", "content": None}]}, "field 'prompt' has no role and content in message 1"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, r"'prompt\[0\].content' has a part 1"),
        ({"prompt": [{**USER, "weight": float("nan")}]}, r"'prompt\[0\].weight' cannot be written as JSON"),
        ({"images": ["x.png"]}, "field 'images' cannot be read: models here read text"),
        ({"tools": "{"}, "field 'tools' is no JSON"),
        ({"tools": {"a": 1}}, "field 'tools' must be a list of tools"),
        ({"chat_template_kwargs": {"tokenize": True}}, "field 'chat_template_kwargs' may not hold 'tokenize'"),
        ({"prompt": "x", "tools": [CALL]}, "field 'tools' is for the chat template, and the prompt is plain text"),
    ],
)
def test_malformed_fields_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    row = {"prompt": [USER], "chosen": "a", "rejected": "b", **change}
    with pytest.raises(ValueError, match=rf"rows\.jsonl row 1: .*{message}"):
        load(tmp_path, row)


def test_labels_of_single_completions_are_errors(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "x", "completion": "y", "label": false}')
    with pytest.raises(ValueError, match=r"row 1: field 'label' says whether the completion is a good one"):
        DatasetCompletions(str(file)).load()


def test_the_finish_reason_of_a_conversation_is_that_of_its_last_turn(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": [USER, said("a"), USER, said("b")], "finish_reason": "length"}))
    rows = DatasetCompletions(str(file), turns="all").load()
    assert [(row.completion, row.finish_reasons) for row in rows] == [("a", ()), ("b", ("length",))]
    assert [row.finish_reasons for row in DatasetCompletions(str(file)).load()] == [("length",)]


def test_turns_that_cannot_be_learned_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    turns = [said("hi"), USER, said("a"), said("b")]
    file.write_text(json.dumps({"messages": turns}))
    source = DatasetCompletions(str(file), turns="all")
    assert [row.completion for row in source.load()] == ["a"]
    assert source.report == {"assistant turns that begin a conversation": 1, "assistant turns behind another": 1}
