"""Offline runs on many rows: rows on disk, a ledger that names them, and a reference that scores them when needed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_rlhf import DPOModule, PreferenceDataModule
from lightning_rlhf.batching.steps import EpochPlan, plan
from lightning_rlhf.collectors import reference_ahead
from lightning_rlhf.collectors.recorded import RecordedPairs
from lightning_rlhf.commands.export import export_ledger
from lightning_rlhf.datamodules import preferences
from lightning_rlhf.datamodules.options import PreferenceRoundOptions, PromptOptions
from lightning_rlhf.generation.base import Decoding
from lightning_rlhf.labelers import RecordedLabeler
from lightning_rlhf.ledger.recorded import RecordedTable
from lightning_rlhf.ledger.row_digest import digest_of_columns, digest_of_rows
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.models.load import load_tokenizer
from lightning_rlhf.prompts import DatasetPrompts, DatasetUnpaired, HHPrompts, LedgerPrompts, portions, table
from lightning_rlhf.prompts.base import AbstractPromptSource
from lightning_rlhf.prompts.portions import Tokenization
from lightning_rlhf.prompts.table import PromptTable, load_prompts
from lightning_rlhf.prompts.tokenize import TokenLimits
from lightning_rlhf.samplers import OfflineSampler


ROWS = 24
Options = dict[str, Any]
DISK: Options = {"ledger_pairs": "rows", "rows": "disk"}


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of pairs with soft labels and weights, and a cache of its own."""
    monkeypatch.setenv("LIGHTNING_RLHF_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.jsonl"
    lines = [
        {"prompt": f"{n}?", "chosen": "yes" * (n % 3 + 1), "rejected": "no" * (n % 4 + 1), "probability": 0.9}
        for n in range(ROWS)
    ]
    path.write_text("\n".join(json.dumps(line | {"weight": 1.0 + n % 2}) for n, line in enumerate(lines)))
    return path


def data(path: Path, **options: Any) -> PreferenceDataModule:
    return PreferenceDataModule(
        DatasetPrompts(str(path)),
        OfflineSampler(),
        RecordedLabeler(),
        # chunks of 2 pairs
        decoding=Decoding(max_new_tokens=8, rows=4),
        pairs_per_batch=2,
        prompt_options=PromptOptions(rows=options.pop("rows", "memory")),
        rounds=PreferenceRoundOptions(epochs_per_round=None, **options),
    )


def fit(
    folder: Path, policy: Path, loaded: PreferenceDataModule, ckpt_path: str | None = None, **limits: Any
) -> dict[str, Tensor]:
    """Train; returns the weights."""
    module = DPOModule(str(policy), optimizer=partial(torch.optim.AdamW, lr=1e-2))
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    saved = ModelCheckpoint(folder, "last", every_n_train_steps=1, enable_version_counter=False)
    options = {**quiet, "max_epochs": 2, "callbacks": [saved], **limits}
    trainer = L.Trainer(default_root_dir=folder, accelerator="cpu", **options)
    trainer.fit(module, datamodule=loaded, ckpt_path=ckpt_path)
    return {name: tensor.clone() for name, tensor in module.policy.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def scored(folder: Path) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Reference log-probabilities that a ledger keeps, NaN where there are none."""
    with PreferenceStore(folder / "ledger.sqlite", read_only=True) as store:
        return RecordedTable(store).reference_logps(0, ROWS)


def test_rows_on_disk_train_the_same_bits_as_copies_in_the_ledger(
    tmp_path: Path, tiny_policy: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = fit(tmp_path / "copied", tiny_policy, data(rows))
    loaded = data(rows, **DISK)
    named = fit(tmp_path / "named", tiny_policy, loaded)
    assert same(copied, named)
    assert loaded.round is not None and isinstance(loaded.round.preferences, RecordedPairs)
    found = []
    for name in ("copied", "named"):
        with PreferenceStore(tmp_path / name / "ledger.sqlite", read_only=True) as store:
            counts = (store.num_labels, store.count_labels(1), store.count_ties(), store.mean_passes(), store.rounds())
            found.append((*counts, store.has_samples(), store.total_cost))
            pairs = list(store.preferences())
            if name == "copied":
                # the same pairs, labels and weights, one by one; the ledger holds log-probabilities beside them
                ours = loaded.round.preferences
                assert [(p.comparison.a.ids, p.comparison.b.ids, p.probability, p.weight) for p in pairs] == [
                    (p.comparison.a.ids, p.comparison.b.ids, p.probability, p.weight) for p in ours
                ]
            else:
                recorded = RecordedTable(store).read(0)
                assert pairs == [] and recorded is not None
                assert sorted(recorded.rows) == list(range(ROWS))
    assert found[0] == found[1] and found[0][0] == ROWS
    assert not np.isnan(scored(tmp_path / "named")).any()
    ledger = str(tmp_path / "named" / "ledger.sqlite")
    for read in (partial(export_ledger, ledger, str(tmp_path / "out.jsonl")), LedgerPrompts(ledger).load):
        with pytest.raises(ValueError, match="holds no copies of them: read the rows from the data of the run"):
            read()
    # a size above the limit does the same without a setting
    monkeypatch.setattr(preferences, "MOST_COPIES", 10)
    loaded = data(rows)
    assert same(copied, fit(tmp_path / "large", tiny_policy, loaded))
    assert loaded.round is not None and isinstance(loaded.round.preferences, RecordedPairs)
    # and a ledger that was begun with copies goes on with them
    loaded = data(rows)
    fit(tmp_path / "copied", tiny_policy, loaded, max_steps=1)
    assert loaded.round is not None and not isinstance(loaded.round.preferences, RecordedPairs)


@pytest.mark.parametrize("options", [{}, DISK], ids=["copies", "rows"])
def test_a_short_run_scores_the_rows_of_its_steps(
    tmp_path: Path, tiny_policy: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, options: Options
) -> None:
    whole = fit(tmp_path / "all", tiny_policy, data(rows, reference_logps="all", **options))
    monkeypatch.setattr(reference_ahead, "WINDOW", 4)
    fit(tmp_path / "short", tiny_policy, data(rows, **options), max_steps=3)
    assert (~np.isnan(scored(tmp_path / "short"))).all(axis=1).sum() == 6
    fit(tmp_path / "few", tiny_policy, data(rows, **options), max_epochs=1, limit_train_batches=5)
    assert (~np.isnan(scored(tmp_path / "few"))).all(axis=1).sum() == 10
    ahead = fit(tmp_path / "ahead", tiny_policy, data(rows, **options))
    live = fit(tmp_path / "live", tiny_policy, data(rows, reference_logps="live", **options))
    assert np.isnan(scored(tmp_path / "live")).all()
    for name, weight in whole.items():
        torch.testing.assert_close(ahead[name], weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(live[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, DISK], ids=["copies", "rows"])
def test_a_run_that_scores_ahead_goes_on_bit_by_bit(
    tmp_path: Path, tiny_policy: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, options: Options
) -> None:
    monkeypatch.setattr(reference_ahead, "WINDOW", 4)
    straight = fit(tmp_path / "straight", tiny_policy, data(rows, **options))
    # stopped in a window of the first epoch, and in the second epoch
    fit(tmp_path / "stopped", tiny_policy, data(rows, **options), max_steps=6)
    last = str(tmp_path / "stopped" / "last.ckpt")
    fit(tmp_path / "stopped", tiny_policy, data(rows, **options), ckpt_path=last, max_steps=17)
    assert same(straight, fit(tmp_path / "stopped", tiny_policy, data(rows, **options), ckpt_path=last))
    assert np.array_equal(scored(tmp_path / "straight"), scored(tmp_path / "stopped"))


def test_settings_that_do_not_fit_are_refused(tmp_path: Path, tiny_policy: Path, rows: Path) -> None:
    with pytest.raises(ValueError, match="reference_logps must be 'ahead', 'all' or 'live'"):
        PreferenceRoundOptions(reference_logps="never")  # type: ignore[arg-type]
    loaded = data(rows, ledger_pairs="rows")
    loaded.label_budget = 8
    with pytest.raises(ValueError, match=r"ledger_pairs=rows is for recorded pairs .* no label budget"):
        fit(tmp_path / "budget", tiny_policy, loaded)
    fit(tmp_path / "named", tiny_policy, data(rows, **DISK), max_steps=1)
    loaded = data(rows)
    loaded.label_budget = 8
    with pytest.raises(ValueError, match="a label budget counts pairs"):
        fit(tmp_path / "named", tiny_policy, loaded)
    rows.write_text(rows.read_text().replace("3?", "4?"))
    with pytest.raises(ValueError, match="other rows; 24 in the ledger, 24 now, 3 changed in place"):
        fit(tmp_path / "named", tiny_policy, data(rows, **DISK))


LINES: dict[str, tuple[type[AbstractPromptSource], list[dict[str, Any]]]] = {
    "plain": (
        DatasetPrompts,
        [
            {"prompt": "a?", "chosen": "long" * 9, "rejected": "no", "answer": 3, "tags": ["x", None]},
            {"prompt": "bé?", "chosen": "é", "rejected": "\ufffd", "label": 0.5, "source": "part"},
            {"prompt": "c?", "chosen": "   ", "rejected": "no"},
            {"prompt": "d?" * 200, "chosen": "yes", "rejected": "no"},
        ],
    ),
    "conversations": (
        DatasetPrompts,
        [
            {
                "prompt": [{"role": "user", "content": f"{n}?"}],
                "chosen": [{"role": "assistant", "content": "yes "}],
                "rejected": [{"role": "assistant", "content": "no"}],
                "finish_reason_rejected": "length",
            }
            for n in range(3)
        ],
    ),
    "transcripts": (
        HHPrompts,
        [{side: f"\n\nHuman: {n}?\n\nAssistant: {side}" for side in ("chosen", "rejected")} for n in range(3)],
    ),
    "singles": (DatasetUnpaired, [{"prompt": f"{n}?", "completion": "yes", "label": n % 2 == 0} for n in range(3)]),
}


@pytest.mark.parametrize("kind", LINES)
def test_a_table_gives_back_the_prompts_that_were_written(
    tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("LIGHTNING_RLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(table, "BATCH", 2)
    make, lines = LINES[kind]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    how = Tokenization(load_tokenizer(str(tiny_policy)), TokenLimits(64, 16, "drop"), None, (), False)

    def load(storage: Literal["memory", "disk"]) -> tuple[AbstractPromptSource, Sequence[Any], dict[str, int]]:
        source = make(str(path))  # type: ignore[call-arg]
        return source, *load_prompts(source, how, storage)

    first, kept, counts = load("memory")
    _, written, _ = load("disk")
    if kind != "singles":
        # rows that cannot be read in portions are tokenized in every run
        monkeypatch.setattr(portions, "tokenized", None)
    second, opened, again = load("disk")
    assert isinstance(written, PromptTable) and isinstance(opened, PromptTable)
    assert list(opened) == list(written) == kept and opened[-1] == kept[-1] and opened[:2] == kept[:2]
    # columns play no part in the equality of prompts
    assert [prompt.columns for prompt in opened] == [prompt.columns for prompt in kept]
    assert {k: v for k, v in counts.items() if v} == {k: v for k, v in again.items() if v}
    assert opened.row_digest == digest_of_rows(kept) and opened.columns_digest == digest_of_columns(kept)
    assert getattr(first, "unread_columns", None) == getattr(second, "unread_columns", None)
    assert opened.facts["singles"] == sum(prompt.is_single for prompt in kept)
    assert opened.lengths[:, 0].tolist() == [len(prompt.ids) for prompt in kept]
    with pytest.raises(IndexError):
        opened[len(kept)]


def test_other_files_settings_and_tokenizers_have_tables_of_their_own(tmp_path: Path, tiny_policy: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a?", "chosen": "yes", "rejected": "no"}))
    tokenizer = load_tokenizer(str(tiny_policy))
    limits = TokenLimits(64, 16)
    source = DatasetPrompts(str(path))
    first = table._key(source, [path], Tokenization(tokenizer, limits, None, (), False))
    moved = tmp_path / "moved.jsonl"
    moved.write_text(path.read_text())
    assert table._key(DatasetPrompts(str(moved)), [moved], Tokenization(tokenizer, limits, None, (), False)) == first
    others = [
        table._key(source, [path], Tokenization(tokenizer, TokenLimits(64, 15), None, (), False)),
        table._key(source, [path], Tokenization(tokenizer, limits, "Be brief.", (), False)),
        table._key(DatasetPrompts(str(path), limit=1), [path], Tokenization(tokenizer, limits, None, (), False)),
    ]
    moved.write_text(path.read_text().replace("yes", "yea"))
    others.append(table._key(source, [moved], Tokenization(tokenizer, limits, None, (), False)))
    tokenizer.chat_template = "{{ messages }}"
    others.append(table._key(source, [path], Tokenization(tokenizer, limits, None, (), False)))
    assert len({first, *others}) == 6
    tokenizer.chat_template = "{{ strftime_now('%d') }}"
    assert table._key(source, [path], Tokenization(tokenizer, limits, None, (), False)) is None

    class Own(DatasetPrompts):
        def load(self) -> list[Any]:
            return super().load()[:1]

    # its rows may be other ones than those of the file
    assert not table._streams(Own(str(path))) and table._streams(source)


def test_steps_are_those_of_the_whole_plan() -> None:
    order, lengths = [4, 1, 3, 0, 2, 6, 5], [5, 9, 2, 7, 1, 3, 8]
    for rank in (0, 1):
        how = partial(plan, lengths=lengths, pairs_per_step=3, max_tokens=10, rank=rank, world=2, min_micro_batches=2)
        steps, expected = EpochPlan(order, 3, how), how(order)
        assert list(steps) == expected and len(steps) == 3 and steps[-1] == expected[-1]
        assert [step.everyone for step in steps] == [step.everyone for step in expected]
    assert steps.pairs(1, 2) == [0, 2, 6, 5]


def tokenization(tokenizer: PreTrainedTokenizerBase) -> Tokenization:
    return Tokenization(tokenizer, TokenLimits(64, 16, "drop"), None, (), False)


def test_a_table_is_the_same_however_many_processes_make_it(
    tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_RLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(portions, "TEXTS_AT_ONCE", 8)
    monkeypatch.setattr(table, "BATCH", 16)
    path = tmp_path / "rows.jsonl"
    # every fifth prompt is too long, so that portions are uneven
    lines = [
        {"prompt": f"{n}? " * (40 if n % 5 == 0 else 1), "chosen": f"yes {n}", "rejected": "no", "answer": n}
        for n in range(70)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    made = tokenization(load_tokenizer(str(tiny_policy)))
    kept, counts = load_prompts(DatasetPrompts(str(path)), made, "memory")
    assert len(kept) == 56 and counts["long prompts dropped"] == 14
    files = {}
    for workers in (1, 2):
        monkeypatch.setenv("LIGHTNING_RLHF_CACHE", str(tmp_path / f"cache-{workers}"))
        opened, again = load_prompts(DatasetPrompts(str(path)), made, "disk", workers)
        assert isinstance(opened, PromptTable)
        assert list(opened) == kept and [p.columns for p in opened] == [p.columns for p in kept]
        assert again["long prompts dropped"] == 14
        assert opened.row_digest == digest_of_rows(kept) and opened.columns_digest == digest_of_columns(kept)
        files[workers] = [(opened.folder / name).read_bytes() for name in (table.TABLE, table.LENGTHS, table.FACTS)]
    assert files[1] == files[2]


def test_a_process_that_fails_or_is_killed_names_the_row(
    tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_RLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(portions, "TEXTS_AT_ONCE", 4)
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"{n}?", "chosen": "yes", "rejected": "no"} for n in range(30)]
    lines[21]["prompt"] = "?" * 99
    path.write_text("\n".join(map(json.dumps, lines)))
    made = replace(tokenization(load_tokenizer(str(tiny_policy))), limits=TokenLimits(64, 16))
    with pytest.raises(ValueError, match=r"rows.jsonl row 22: prompt has 99 tokens"):
        load_prompts(DatasetPrompts(str(path)), made, "disk", 2)
    parent, tokenize_portion = os.getpid(), portions.portion_of

    def killed(rows: Sequence[Any], how: Tokenization, first: int) -> Any:
        if os.getpid() != parent and first == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        return tokenize_portion(rows, how, first)

    monkeypatch.setattr(portions, "portion_of", killed)
    with pytest.raises(RuntimeError, match=r"killed, .* from \S+ row \d+ to \S+ row \d+: set .*prompt_options.workers"):
        load_prompts(DatasetPrompts(str(path)), made, "disk", 2)
    # nothing is left of the table
    assert not list((tmp_path / "cache").glob("rows-*/rows.arrow"))
    # a few rows need no process
    monkeypatch.setattr(portions, "ProcessPoolExecutor", None)
    monkeypatch.setattr(portions, "portion_of", tokenize_portion)
    opened, _ = load_prompts(DatasetPrompts(str(path)), tokenization(made.tokenizer), "disk")
    assert len(opened) == 29
