"""Two equal responses are a free tie: no labeler is asked, no label is counted, and the run goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from torch.optim import AdamW

from lightning_rlhf import DPOModule, PreferenceDataModule
from lightning_rlhf.callbacks import LabelBudget
from lightning_rlhf.callbacks.budget import PATIENCE
from lightning_rlhf.collectors.preferences import RoundCollector
from lightning_rlhf.commands.evaluate import EvaluationRun
from lightning_rlhf.generation.base import AbstractEngine, Decoding
from lightning_rlhf.labelers import AbstractLabeler
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.prompts import BuiltinPrompts, DatasetPrompts
from lightning_rlhf.randomness import Key
from lightning_rlhf.samplers import AbstractPairSampler, VanillaSampler
from lightning_rlhf.types import Comparison, Label, Prompt, Response


ANSWERS = [
    (Response((2,), "yes", "eos"), Response((3,), "no", "eos")),
    (Response((2,), "yes", "eos"), Response((2,), "yes", "eos")),  # the same tokens
    (Response((2,), "yes", "eos"), Response((4, 5), "yes", "length")),  # other tokens, the same text
    (Response((0,), "", "eos"), Response((0,), "", "eos")),  # nothing twice
    (Response((6,), "\ufffd", "eos"), Response((7,), "\ufffd", "eos")),  # other bytes, neither of them text
]


class Ready(AbstractPairSampler):
    """Has its answers ready."""

    needs_engine = False

    def sample(self, prompts: Sequence[Prompt], engine: AbstractEngine, key: Key) -> list[Comparison]:
        del engine, key
        return [Comparison(prompt, *ANSWERS[prompt.index]) for prompt in prompts]


class Asked(AbstractLabeler):
    """Notes what it was asked, and prefers the first."""

    def __init__(self, status: str = "ok") -> None:
        self.status = status
        self.asked: list[int] = []

    def label(self, comparisons: Sequence[Comparison], key: Key) -> list[Label]:
        del key
        self.asked += [comparison.prompt.index for comparison in comparisons]
        return [Label(1.0, cost=3.0) if self.status == "ok" else Label(None, "timeout") for _ in comparisons]


PROMPTS = [Prompt(index, (1,), f"prompt {index}") for index in range(len(ANSWERS))]


def test_nobody_is_asked_about_equal_responses(tmp_path: Path) -> None:
    labeler = Asked()
    with PreferenceStore(tmp_path / "ledger.sqlite") as store:
        collector = RoundCollector(store, Ready(), labeler, Key((0,)))
        first = collector.collect(0, PROMPTS, None, chunk=2)
        again = collector.collect(0, PROMPTS, None, chunk=2)
        assert labeler.asked == [0, 4]
        assert (store.num_labels, store.num_attempts, store.total_cost) == (2, 2, 6.0)
        assert (store.count_labels(before=9), store.count_ties(), store.count_ties(before=0)) == (2, 3, 0)
        assert (first.labels_bought, first.ties, again.ties) == (2, 3, 3)
        labels = [label for _, _, label in store.comparisons(0)]
        assert [label is not None and label.is_free_tie for label in labels] == [False, True, True, True, False]
        assert [p.probability for p in again.preferences] == [1.0, 0.5, 0.5, 0.5, 1.0]
        with pytest.raises(ValueError, match="already has a label"):
            store.add_labels([2], [Label(1.0)])
        with pytest.raises(ValueError, match="a label for comparison 1"):
            store.add_ties([1])


def test_a_round_in_which_every_other_label_failed_stays_open(tmp_path: Path) -> None:
    with PreferenceStore(tmp_path / "ledger.sqlite") as store:
        result = RoundCollector(store, Ready(), Asked("timeout"), Key((0,))).collect(0, PROMPTS, None, chunk=2)
        assert (result.failed, store.rounds()) == ({"timeout": 2}, [])
        only_ties = [replace(prompt, index=1) for prompt in PROMPTS[:2]]
        RoundCollector(store, Ready(), Asked("timeout"), Key((0,))).collect(1, only_ties[:1], None, chunk=2)
        assert store.rounds() == [1]


def test_a_pair_that_was_paid_keeps_its_label(tmp_path: Path) -> None:
    """As in ledgers of earlier versions."""
    with PreferenceStore(tmp_path / "ledger.sqlite") as store:
        ids = store.add_comparisons(0, [Comparison(PROMPTS[1], *ANSWERS[1])], [0])
        store.add_labels(ids, [Label(0.0)])
        RoundCollector(store, Ready(), Asked(), Key((0,))).label(0, 4)
        (_, _, label) = store.comparisons(0)[0]
        assert (label, store.count_ties()) == (Label(0.0), 0)


def test_a_collapsed_policy_trains_on_ties_and_ends_where_a_budget_would_never_be_spent(
    tmp_path: Path, tiny_policy: Path
) -> None:
    cold = Decoding(max_new_tokens=3, temperature=1e-4, rows=4)
    labeler = Asked()
    loaded = PreferenceDataModule(
        BuiltinPrompts("train", limit=2), VanillaSampler(), labeler, decoding=cold, pairs_per_batch=2
    )
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
    }
    trainer = L.Trainer(
        default_root_dir=tmp_path, max_epochs=-1, enable_model_summary=False, callbacks=[LabelBudget(5)], **options
    )
    with pytest.warns(UserWarning, match=f"last {PATIENCE} rounds brought 0 labels.*the policy has collapsed"):
        trainer.fit(DPOModule(str(tiny_policy), optimizer=partial(AdamW, lr=1e-3, weight_decay=0.0)), datamodule=loaded)
    assert (labeler.asked, trainer.global_step) == ([], PATIENCE)
    with PreferenceStore(tmp_path / "ledger.sqlite", read_only=True) as store:
        assert (store.num_labels, store.count_ties()) == (0, 2 * PATIENCE)


def test_equal_answers_of_two_policies_are_ties_that_nobody_judged(tmp_path: Path) -> None:
    rows = {name: tmp_path / f"{name}.jsonl" for name in ("prompts", "a", "b")}
    rows["prompts"].write_text("".join(json.dumps({"prompt": f"{i}?"}) + "\n" for i in range(4)))
    for name in ("a", "b"):
        answers = [{"prompt": f"{i}?", "response": "same" if i < 3 else name} for i in range(4)]
        rows[name].write_text("".join(json.dumps(row) + "\n" for row in answers))
    labeler = Asked()
    source = DatasetPrompts(str(rows["prompts"]))
    run = EvaluationRun(source, str(rows["a"]), str(rows["b"]), labeler=labeler, run_dir=str(tmp_path / "run"))
    report = run.run()
    assert labeler.asked == [3]
    assert (report["cost"], report["attempts"], report["free_ties"]) == (3.0, 1, 3)
    assert (report["wins"]["pairs"], report["wins"]["ties"], report["judge"]["pairs"]) == (4, 0.75, 1)
