"""Rollouts in the ledger: read as written, scored once, and old ledgers get their tables."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_rlhf.commands.export import export_ledger
from lightning_rlhf.ledger.rollouts import RolloutTable
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.prompts import DatasetCompletions
from lightning_rlhf.types import Comparison, Prompt, Response, Rollout


def rollout(index: int = 0, token: int = 1) -> Rollout:
    response = Response((token, 0), f"text {token}", "eos", (-0.1, -1 / 3), (-0.2, -2 / 3))
    return Rollout(Prompt(index, (5, 6), f"prompt {index}"), response, 0.7, (0.1, 1 / 7))


def test_what_is_read_equals_what_was_written_and_scores_are_bought_once(tmp_path: Path) -> None:
    groups = [[rollout(0, 1), rollout(0, 2)], [rollout(1, 3), replace(rollout(1, 4), values=None)]]
    with PreferenceStore(tmp_path / "ledger.sqlite") as store:
        table = RolloutTable(store)
        table.add(0, groups, [1, 0])
        table.add(0, [[rollout(1, 9)]], [0])  # a place is filled once
        assert table.positions(0) == [0, 1] and table.positions(1) == []
        rows = table.rollouts(0)
        assert [(position, found) for _, position, found in rows] == [
            *((0, r) for r in groups[1]),
            *((1, r) for r in groups[0]),
        ]
        ids = [row[0] for row in rows]
        table.add_scores(ids[:2], [1 / 3, 2.0], [None, 0.1])
        with pytest.raises(ValueError, match="already has a score: this one would be paid twice"):
            table.add_scores(ids[1:], [0.0] * 3, [None] * 3)
        with pytest.raises(ValueError, match="reward of rollout"):
            table.add_scores(ids[2:3], [float("nan")], [None])
        with pytest.raises(ValueError, match="holds another prompt than prompt 7"):
            table.add(0, [[rollout(7)]], [0])
    with PreferenceStore(tmp_path / "ledger.sqlite") as store:
        table = RolloutTable(store)
        found = [r for _, _, r in table.rollouts(0)]
        assert [(r.reward, r.std) for r in found] == [(1 / 3, None), (2.0, 0.1), (None, None), (None, None)]
        assert (table.count_scores(0), table.count_scores(1)) == (0, 2)
        store.close_round(0, {})
        with pytest.raises(ValueError, match="is closed"):
            table.add(0, [[rollout(2)]], [5])
    with sqlite3.connect(tmp_path / "ledger.sqlite") as shell, pytest.raises(sqlite3.IntegrityError):
        shell.execute("UPDATE scores SET reward = 1")


def test_a_ledger_of_the_first_version_is_read_and_gets_the_tables_when_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    pair = Comparison(Prompt(0, (1,), "x"), Response((1,), "a", "eos"), Response((2,), "b", "eos"))
    with PreferenceStore(path) as store:
        store.add_comparisons(0, [pair], [0])
    shell = sqlite3.connect(path)
    shell.executescript("DROP TABLE scores; DROP TABLE rollouts; PRAGMA user_version = 1")
    shell.close()
    with PreferenceStore(path, read_only=True) as store:
        assert RolloutTable(store).rollouts(0) == []
        assert [row[1] for row in store.comparisons(0)] == [pair]
    with PreferenceStore(path) as store:
        RolloutTable(store).add(0, [[rollout()]], [0])
        assert len(RolloutTable(store).rollouts(0)) == 1
        assert [row[1] for row in store.comparisons(0)] == [pair]


def test_rollouts_become_rows_to_imitate(tmp_path: Path) -> None:
    """Completions of a teacher, or the best of n, are what supervised fine-tuning reads."""
    ledger, out = str(tmp_path / "ledger.sqlite"), str(tmp_path / "rows.jsonl")
    with PreferenceStore(ledger) as store:
        table = RolloutTable(store)
        table.add(0, [[rollout(0, 1), rollout(0, 2)], [rollout(1, 3), rollout(1, 4)]], [0, 1])
        assert export_ledger(ledger, out) == 4
        with pytest.raises(ValueError, match="no rollout has a reward yet"):
            export_ledger(ledger, out, best=True)
        ids = [identity for identity, _, _ in table.rollouts(0)]
        table.add_scores(ids[:3], [0.5, -1.0, 2.0], [None] * 3)
        assert export_ledger(ledger, out, best=True) == 2
    loaded = DatasetCompletions(out).load()
    assert [(row.text, row.completion) for row in loaded] == [("prompt 0", "text 1"), ("prompt 1", "text 3")]
    assert export_ledger(ledger, str(tmp_path / "rows.parquet")) == 4
