"""Exported ledgers: the right rows, readable by ``datasets`` and trainable by TRL."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_dataset

from lightning_rlhf.commands.export import export_comparisons, export_ledger
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.models.load import load_tokenizer
from lightning_rlhf.prompts import DatasetPrompts, LedgerPrompts, tokenize_rows
from lightning_rlhf.types import Comparison, Label, Message, Prompt, PromptRow, RecordedPair, Response


LABELS = [
    Label(0.75, meta={"reward_a": 2.0, "reward_b": -1.0}),  # a chosen
    Label(0.25, meta={"reward_a": -3.0, "reward_b": 4.0}),  # b chosen
    Label(0.5),  # a tie: a is written first
    Label(None, "refused"),  # no row
]


def make_ledger(folder: Path, labels: list[Label] = LABELS, conversational: bool = False) -> str:
    """One round with a comparison per label; response texts name position and side, with a non-ASCII sign."""
    path = folder / "ledger.sqlite"
    with PreferenceStore(path) as store:
        comparisons = []
        for i in range(len(labels)):
            turns: tuple[Message, ...] = (
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": f"Q{i}"},
            )
            prompt = Prompt(10 + i, (1, 2), f"<|user|>Q{i}", messages=turns if conversational else None)
            a, b = (Response((3, 4), f"{i}{side} é", "eos", source="plus") for side in "ab")
            comparisons.append(Comparison(prompt, a, b, branch="tilt", weight=1.5, passes=4.0, meta={"delta": 0.5 * i}))
        store.add_labels(store.add_comparisons(2, comparisons, range(len(labels))), labels)
    return str(path)


def load(path: Path) -> list[dict[str, Any]]:
    """Read a file back with the library that users read it with."""
    kind = "parquet" if path.suffix == ".parquet" else "json"
    rows = load_dataset(kind, data_files=str(path), split="train", cache_dir=str(path.parent / "cache"))
    assert isinstance(rows, Dataset)
    return list(rows.to_list())


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_plain_rows_have_the_more_probable_response_as_chosen(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / "new" / f"rows{suffix}"
    assert export_ledger(make_ledger(tmp_path), str(out)) == 3
    ends = {"finish_reason_chosen": "eos", "finish_reason_rejected": "eos"}
    common = {"weight": 1.5, "round": 2, "branch": "tilt", **ends}
    assert load(out) == [
        {
            "prompt": f"<|user|>Q{i}",
            "chosen": f"{i}{chosen} é",
            "rejected": f"{i}{rejected} é",
            "probability": probability,
            "prompt_index": 10 + i,
            "reward_chosen": reward_chosen,
            "reward_rejected": reward_rejected,
            **common,
        }
        for i, (chosen, rejected, probability, reward_chosen, reward_rejected) in enumerate(
            [("a", "b", 0.75, 2.0, -1.0), ("b", "a", 0.75, 4.0, -3.0), ("a", "b", 0.5, None, None)]
        )
    ]
    assert [file.name for file in out.parent.iterdir() if file.is_file()] == [out.name]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_conversational_rows_are_lists_of_messages(tmp_path: Path, suffix: str) -> None:
    ledger, out = make_ledger(tmp_path, [Label(0.0)], conversational=True), tmp_path / f"rows{suffix}"
    assert export_ledger(ledger, str(out)) == 1
    (row,) = load(out)
    assert row["prompt"] == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Q0"}]
    assert row["chosen"] == [{"role": "assistant", "content": "0b é"}]
    assert row["rejected"] == [{"role": "assistant", "content": "0a é"}]
    assert row["probability"] == 1.0
    assert "reward_chosen" not in row  # the labeler noted none

    export_ledger(ledger, str(out), rows="plain")  # in place of the old file
    assert load(out)[0]["prompt"] == "<|user|>Q0"


def test_what_is_exported_is_read_back_as_it_was(tmp_path: Path, tiny_policy: Path) -> None:
    """Ids, texts to the letter, where a response was cut off, and what the chat template got."""
    tokenizer = load_tokenizer(str(tiny_policy))
    tools = "{% if tools %}{{ tools | tojson }}{% endif %}"
    calls = "{% for m in messages if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% endfor %}"
    tokenizer.chat_template = f"{tools}{calls}{tokenizer.chat_template}"
    turns: tuple[Message, ...] = (
        {"role": "user", "content": " Q "},
        {"role": "assistant", "content": "", "tool_calls": [{"id": 1}]},
        {"role": "tool", "content": "x"},
    )
    pair = RecordedPair(" a\n", "b" * 40, 0.9)
    kinds = {
        "chat": [PromptRow("r", messages=turns, pair=pair, template_options={"tools": [{"name": "f"}]})],
        "plain": [PromptRow("r", text="long prompt " * 9, pair=pair), PromptRow("r", text="Q", pair=pair)],
    }
    for kind, rows in kinds.items():
        prompts, _ = tokenize_rows(
            rows, tokenizer, max_prompt_tokens=90, max_response_tokens=20, on_long_prompt="truncate"
        )
        with PreferenceStore(tmp_path / f"{kind}.sqlite") as store:
            pairs = [Comparison(p, *p.pair) for p in prompts if p.pair is not None]
            store.add_labels(store.add_comparisons(0, pairs, range(len(pairs))), [Label(0.9)] * len(pairs))
        export_ledger(str(tmp_path / f"{kind}.sqlite"), str(tmp_path / f"{kind}.jsonl"))
        for source in (
            DatasetPrompts(str(tmp_path / f"{kind}.jsonl")),
            LedgerPrompts(str(tmp_path / f"{kind}.sqlite")),
        ):
            again, counts = tokenize_rows(source.load(), tokenizer, max_prompt_tokens=999, max_response_tokens=999)
            assert not counts
            assert [(p.ids, p.messages, p.pair) for p in again] == [(p.ids, p.messages, p.pair) for p in prompts]
    assert prompts[0].pair is not None
    assert [(r.text, r.finish_reason) for r in prompts[0].pair] == [(" a\n", "eos"), ("b" * 20, "length")]
    with pytest.raises(ValueError, match=r"messages in 'prompt' of prompt 0 hold \['tool_calls'\].*write .jsonl"):
        export_ledger(str(tmp_path / "chat.sqlite"), str(tmp_path / "chat.parquet"))


def test_one_prompt_without_messages_makes_all_rows_plain_or_an_error(tmp_path: Path) -> None:
    ledger, out = make_ledger(tmp_path, [Label(1.0)], conversational=True), tmp_path / "rows.jsonl"
    with PreferenceStore(ledger) as store:
        plain = Comparison(Prompt(7, (1,), "text"), Response((2,), "x", "eos"), Response((3,), "y", "eos"))
        store.add_labels(store.add_comparisons(3, [plain], [0]), [Label(1.0)])
    assert export_ledger(ledger, str(out)) == 2
    before = out.read_text()
    assert [json.loads(line)["prompt"] for line in before.splitlines()] == ["<|user|>Q0", "text"]
    with pytest.raises(ValueError, match=r"prompt 7 is a text, not a conversation.*pass rows=plain"):
        export_ledger(ledger, str(out), rows="conversational")
    assert out.read_text() == before  # a failed export leaves the old file, and nothing beside it
    assert not list(tmp_path.glob(".*partial"))


def test_parquet_of_many_rows_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_rlhf.commands.export._ROW_GROUP", 4)
    out = tmp_path / "rows.parquet"
    assert export_ledger(make_ledger(tmp_path, [Label(1.0)] * 10), str(out)) == 10
    assert [row["chosen"] for row in load(out)] == [f"{i}a é" for i in range(10)]


def test_a_running_ledger_can_be_exported(tmp_path: Path) -> None:
    with PreferenceStore(make_ledger(tmp_path)) as store:
        assert export_ledger(str(store.path), str(tmp_path / "rows.jsonl")) == 3


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_comparisons_are_exported_with_and_without_labels(tmp_path: Path, suffix: str) -> None:
    ledger, out = make_ledger(tmp_path), tmp_path / f"pairs{suffix}"
    assert export_comparisons(ledger, str(out)) == 4
    assert load(out)[3] == {
        "prompt": "<|user|>Q3",
        "a": "3a é",
        "b": "3b é",
        "source_a": "plus",
        "source_b": "plus",
        "finish_reason_a": "eos",
        "finish_reason_b": "eos",
        "branch": "tilt",
        "weight": 1.5,
        "passes": 4.0,
        "delta": 1.5,
        "round": 2,
        "position": 3,
        "prompt_index": 13,
    }


def test_exports_that_cannot_work_say_why(tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path, [Label(None, "timeout")])
    with pytest.raises(ValueError, match="holds no labeled comparison yet"):
        export_ledger(ledger, str(tmp_path / "rows.jsonl"))
    with pytest.raises(ValueError, match=r"format of .*rows.csv by its suffix; name it .jsonl or .parquet"):
        export_ledger(ledger, str(tmp_path / "rows.csv"))
    with pytest.raises(ValueError, match="is the ledger itself"):
        export_ledger(ledger, ledger, format="jsonl")
    with pytest.raises(FileNotFoundError, match="no ledger here"):
        export_ledger(str(tmp_path / "absent.sqlite"), str(tmp_path / "rows.jsonl"))
    with PreferenceStore(tmp_path / "empty.sqlite"), pytest.raises(ValueError, match="holds no comparison yet"):
        export_comparisons(str(tmp_path / "empty.sqlite"), str(tmp_path / "rows.jsonl"))
    assert not list(tmp_path.glob("*.jsonl"))


def test_every_option_is_documented_for_the_command_line() -> None:
    for function in (export_ledger, export_comparisons):
        for name in inspect.signature(function).parameters:
            assert f"        {name}: " in (function.__doc__ or "")


@pytest.mark.slow
@pytest.mark.parametrize("conversational", [False, True])
def test_trl_trains_on_the_rows(tmp_path: Path, tiny_policy: Path, conversational: bool) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer
    from trl.data_utils import is_conversational

    out = tmp_path / "rows.jsonl"
    export_ledger(make_ledger(tmp_path, LABELS[:2], conversational), str(out))
    rows = Dataset.from_list(load(out))
    assert is_conversational(rows[0]) is conversational
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_policy),
        args=DPOConfig(
            output_dir=str(tmp_path / "trl"), max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True,
            bf16=False, save_strategy="no",
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )  # fmt: skip
    first = trainer.train_dataset[0]
    assert tokenizer.decode(first["prompt_ids"]).endswith("Q0<|end|><|assistant|>" if conversational else "<|user|>Q0")
    assert "".join(tokenizer.decode(first["chosen_ids"]).split("<|end|>")).strip() == "0a é"
    assert trainer.train().training_loss > 0
