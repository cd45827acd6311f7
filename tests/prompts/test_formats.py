"""Rows of well-known data sets, mixtures, and what is said about columns that nothing reads."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest

from lightning_rlhf import Decoding, PreferenceDataModule
from lightning_rlhf.labelers import RecordedLabeler, RewardLabeler
from lightning_rlhf.prompts import DatasetCompletions, DatasetFiles, DatasetPrompts, MixedPrompts
from lightning_rlhf.prompts.formats import resemblance
from lightning_rlhf.prompts.mixture import mixture_sizes
from lightning_rlhf.rewards import FunctionReward
from lightning_rlhf.samplers import OfflineSampler
from lightning_rlhf.types import PromptRow


def pairs(source: DatasetPrompts) -> list[tuple[Any, str, str]]:
    found = []
    for row in source.load():
        assert row.pair is not None
        found.append((row.text if row.messages is None else list(row.messages), row.pair.chosen, row.pair.rejected))
    return found


def scored(*scores: float) -> list[dict[str, Any]]:
    return [{"response": f"scored {score}", "overall_score": score, "model": "m"} for score in scores]


USER = {"role": "user", "content": "Hi"}
FORMATS: dict[str, tuple[list[dict[str, Any]], tuple[Any, str, str]]] = {
    "UltraFeedback": (
        [{"instruction": "Hi", "completions": scored(3.0, 8.5, 1.0, 5.0), "source": "s"}],
        ("Hi", "scored 8.5", "scored 1.0"),
    ),
    "HelpSteer3": (
        [{"context": [USER], "response1": "a", "response2": "b", "overall_preference": -2, "domain": "general"}],
        ([USER], "a", "b"),
    ),
    "ShareGPT pairs": (
        [
            {
                "conversations": [{"from": "human", "value": "Hi"}],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            }
        ],
        ([USER], "a", "b"),
    ),
    "Alpaca pairs": (
        [{"instruction": "Add.", "input": "1 and 2", "chosen": "3", "rejected": "4"}],
        ("Add.\n\n1 and 2", "3", "4"),
    ),
}
WITH_PROMPT: dict[str, tuple[list[dict[str, Any]], tuple[Any, str, str]]] = {
    "Nectar": (
        [
            {
                "prompt": "\n\nHuman: Hi\n\nAssistant: ",
                "answers": [{"answer": f"rank {r}", "rank": r, "model": "m"} for r in (3.0, 1.0, 2.0)],
            }
        ],
        ([USER], "rank 1.0", "rank 3.0"),
    ),
    "HelpSteer2 preferences": (
        [{"prompt": "Hi", "response_1": "a", "response_2": "b", "preference_strength": 3, "split": "train"}],
        ("Hi", "b", "a"),
    ),
    "HelpSteer2 scores": (
        [{"prompt": "Hi", "response": f"scored {s}", "helpfulness": s, "verbosity": 1} for s in (2, 4)],
        ("Hi", "scored 4", "scored 2"),
    ),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", ["auto", "preference"])
def test_pairs_of_known_formats(name: str, kind: Any) -> None:
    rows, expected = FORMATS[name]
    source = DatasetPrompts(rows, kind=kind)
    assert pairs(source) == [expected]
    assert source.format_name == name


@pytest.mark.parametrize("name", WITH_PROMPT)
def test_rows_with_a_prompt_are_pairs_where_pairs_are_asked_for(name: str) -> None:
    rows, expected = WITH_PROMPT[name]
    assert pairs(DatasetPrompts(rows, kind="preference")) == [expected]
    # without, they are prompts, as they always were
    source = DatasetPrompts(rows)
    assert [row.pair for row in source.load()] == [None] * len(rows)
    assert source.format_name is None


def test_equal_verdicts_are_counted() -> None:
    rows = [
        {"context": [USER], "response1": "a", "response2": "b", "overall_preference": strength} for strength in (0, 1)
    ]
    source = DatasetPrompts(rows)
    assert pairs(source) == [([USER], "b", "a")]
    assert source.report == {"answers with the same score": 1}
    alone = {"instruction": "Hi", "completions": scored(1.0)}
    with pytest.raises(ValueError, match=r"none of 1 rows can be used.*fewer than two answers.*read as UltraFeedback"):
        DatasetPrompts([alone]).load()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "Hi", "completions": "none"}, "row 1: field 'completions' must be a list of objects with"),
        (
            {"instruction": "Hi", "completions": scored(float("nan"), 1.0)},
            "'completions.overall_score' must be a number",
        ),
        (
            {"conversations": [{"from": "bot", "value": "x"}], "chosen": {}, "rejected": {}},
            "a turn that is none of ShareGPT's",
        ),
    ],
)
def test_malformed_rows_of_known_formats_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DatasetPrompts([row]).load()


def test_single_answers_are_completions_or_prompts() -> None:
    alpaca = [{"instruction": "Add.", "input": "", "output": "3", "text": "..."}]
    chat = [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}]
    (row,) = DatasetCompletions(alpaca).load()
    assert (row.text, row.completion) == ("Add.", "3")
    (row,) = DatasetCompletions(chat).load()
    assert (row.messages, row.completion) == ((USER,), "Hello")
    assert [row.text for row in DatasetPrompts(alpaca).load()] == ["Add."]
    assert [row.messages for row in DatasetPrompts(chat).load()] == [(USER,)]


def test_a_file_that_cannot_be_used_says_which_format_it_looks_like() -> None:
    with pytest.raises(ValueError, match=r"no column 'chosen' and 'rejected'.*look like single completions"):
        DatasetPrompts([{"prompt": "x", "completion": "y", "label": 1}], kind="preference").load()
    with pytest.raises(ValueError, match=r"no column 'completion' or 'messages'.*look like preference pairs"):
        DatasetCompletions([{"prompt": "x", "chosen": "y", "rejected": "z"}]).load()
    assert resemblance(["context", "response1", "response2"]) == (
        "its columns look most like HelpSteer3, without overall_preference"
    )
    assert resemblance(["x"]) == "its columns look like no known format"


def test_a_margin_is_refused_unless_it_is_ignored() -> None:
    row = {"prompt": "x", "chosen": "a", "rejected": "b", "margin": 0.5}
    with pytest.raises(ValueError, match=r"row 1: field 'margin' asks for.*ignored_fields=\[margin\]"):
        DatasetPrompts([row]).load()
    assert len(DatasetPrompts([row], ignored_fields=["margin"]).load()) == 1
    # 0 asks for nothing, and prompts have none
    assert len(DatasetPrompts([{**row, "margin": 0.0}]).load()) == 1
    assert len(DatasetPrompts([row], kind="prompt").load()) == 1


def prompts(name: str, count: int) -> DatasetPrompts:
    return DatasetPrompts([{"prompt": f"{name} {i}"} for i in range(count)])


def test_mixtures_keep_their_proportions_and_name_their_sources() -> None:
    assert mixture_sizes({"a": 10, "b": 100}, {"a": 1.0, "b": 3.0}) == {"a": 10, "b": 30}
    assert mixture_sizes({"a": 10, "b": 6}, {"a": 1.0, "b": 3.0}) == {"a": 2, "b": 6}

    def names(rows: list[PromptRow]) -> list[object]:
        return [row.columns["dataset"] for row in rows]

    whole = MixedPrompts({"a": prompts("a", 3), "b": prompts("b", 5)}).load()
    assert names(whole) == ["a"] * 3 + ["b"] * 5
    mixed = MixedPrompts({"a": prompts("a", 3), "b": prompts("b", 50)}, {"a": 1.0, "b": 2.0})
    taken = [row.text for row in mixed.load()]
    assert names(mixed.load()) == ["a"] * 3 + ["b"] * 6
    # no row twice, the same at every call, and others for another seed
    assert len(set(taken)) == 9
    assert [row.text for row in mixed.load()] == taken
    other = MixedPrompts({"a": prompts("a", 3), "b": prompts("b", 50)}, {"a": 1.0, "b": 2.0}, seed=1)
    assert [row.text for row in other.load()] != taken


def test_mixtures_count_by_source_and_refuse_other_weights() -> None:
    same = DatasetPrompts([{"prompt": "x", "chosen": "a", "rejected": r} for r in ("a", "b")])
    mixed = MixedPrompts({"same": same})
    assert len(mixed.load()) == 1
    assert mixed.report == {"same: identical completions": 1}
    with pytest.raises(ValueError, match="a weight for each of same; got other"):
        MixedPrompts({"same": same}, {"other": 1.0})
    with pytest.raises(ValueError, match="finite and > 0"):
        MixedPrompts({"same": same}, {"same": 0.0})


def test_files_of_all_kinds_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "1, 2", "level": 3}) + "\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "two\nlines", "level": 4}) + "\n")
    (tmp_path / "both.csv").write_text('prompt,level\n"1, 2",3\n"two\nlines",4\n')
    (tmp_path / "both.tsv").write_text('prompt\tlevel\n1, 2\t3\n"two\nlines"\t4\n')
    read = [
        DatasetPrompts(path).load()
        for path in (
            "*.jsonl",
            ["a.jsonl", "b.jsonl"],
            "both.csv",
            "both.tsv",
            DatasetFiles("csv", data_files="both.csv"),
        )
    ]
    for rows in read:
        assert [(row.text, row.columns["level"]) for row in rows] == [("1, 2", 3), ("two\nlines", 4)]
    assert [row.source for row in read[0]] == ["a.jsonl row 1", "b.jsonl row 1"]
    with pytest.raises(ValueError, match="no such file or folder"):
        DatasetPrompts("*.parquet").load()


def test_arguments_of_load_dataset_are_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def load_dataset(path: str, name: str | None, **options: object) -> datasets.IterableDataset:
        asked.update(options, path=path, name=name)
        return datasets.Dataset.from_list([{"prompt": f"{i}"} for i in range(9)]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    files = DatasetFiles("owner/set", name="subset", data_dir="part", revision="v1", streaming=True)
    rows = DatasetPrompts(files, split="train[:10%]", limit=2).load()
    assert [row.text for row in rows] == ["0", "1"]
    assert rows[0].source == "owner/set subset part @v1[train[:10%]] row 1"
    assert asked == {
        **{"path": "owner/set", "name": "subset", "data_dir": "part", "data_files": None},
        **{"revision": "v1", "split": "train[:10%]", "streaming": True},
    }


def test_streamed_rows_are_shuffled_through_a_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": str(n)}) for n in range(200)))

    def numbers(**options: Any) -> list[int]:
        files = DatasetFiles("json", data_files=str(file), streaming=True, **options)
        rows = DatasetPrompts(files, limit=50).load()
        assert ("of the shuffled stream" in rows[0].source) == ("shuffle_buffer" in options)
        return [int(str(row.text)) for row in rows]

    assert numbers() == list(range(50))
    found = numbers(shuffle_buffer=20, shuffle_seed=3)
    assert found == numbers(shuffle_buffer=20, shuffle_seed=3), "the same after a restart"
    assert found != sorted(found) and found != numbers(shuffle_buffer=20)
    assert len(set(found)) == 50
    # row i is sampled from a buffer that has read the first i + 20 rows
    assert all(number < place + 20 for place, number in enumerate(found))
    with pytest.raises(ValueError, match="shuffle_buffer is for streamed rows: set streaming"):
        DatasetFiles("json", shuffle_buffer=20)
    with pytest.raises(ValueError, match="at least 1 row, or null; got 0"):
        DatasetFiles("json", streaming=True, shuffle_buffer=0)


def graded(completions: list[str], answer: list[str]) -> list[float]:
    return [0.0 for _ in completions]


def test_columns_that_nothing_reads_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    row = {"prompt": "x", "chosen": "a", "rejected": "b", "answer": "1", "level": 2, "meta": {"id": 1}}
    source = DatasetPrompts([row, row])
    for labeler, expected in (
        (RewardLabeler(FunctionReward(graded)), ["meta", "level"]),
        (RecordedLabeler(), ["meta", "answer", "level"]),
    ):
        data = PreferenceDataModule(source, OfflineSampler(), labeler, decoding=Decoding(max_new_tokens=4))
        assert data._unread(source, prompts_of(source)) == expected
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def prompts_of(source: DatasetPrompts) -> list[Any]:
    from lightning_rlhf.prompts import text_prompts

    return text_prompts(source.load())
