"""Votes of people in a ledger: append-only, each once, and old ledgers get their tables."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from lightning_rlhf.annotation.votes import Vote
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.types import Comparison, Label, Prompt, Response


VOTES = (
    Vote("uid-0001", "ann", "b", "a", 3, flags=("unsafe_b",), rationale="ünïcode", seconds=2.5, shown=1.0, time=4.0),
    Vote("uid-0002", "bob", "a", "skip", reason="other", guidelines="abc"),
)


def fill(store: PreferenceStore) -> int:
    pair = Comparison(Prompt(0, (1,), "q"), Response((2,), "x", "eos"), Response((3,), "y", "eos"))
    (identity,) = store.add_comparisons(0, [pair], [0])
    return identity


def test_votes_are_kept_with_their_label_once_and_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with PreferenceStore(path) as store:
        identity = fill(store)
        store.add_labels([identity], [Label(None, "skipped", 1.0)], [VOTES[1:]], {"abc": "be fair"})
        store.add_labels([identity], [Label(1.0)], [VOTES])
        assert [vote for _, _, vote in store.votes()] == [VOTES[1], VOTES[0]]
        assert store.votes([1]) == []
        with pytest.raises(ValueError, match="already has a label"):
            store.add_labels([identity], [Label(1.0)], [(Vote("uid-0003", "eve", "a", "a"),)])
        assert len(store.votes()) == 2, "no vote without its label"
        with store.reading() as db:
            assert db.execute("SELECT text FROM guidelines").fetchall() == [("be fair",)]
    with closing(sqlite3.connect(path)) as db:
        for statement in ("UPDATE votes SET verdict = 'b'", "DELETE FROM votes"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                db.execute(statement)


def test_a_ledger_of_the_version_before_is_read_and_upgraded(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with PreferenceStore(path) as store:
        identity = fill(store)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for table in ("votes", "guidelines", "annotators"):
            db.execute(f"DROP TABLE {table}")
        db.execute("PRAGMA user_version = 3")
    with PreferenceStore(path, read_only=True) as store:
        assert store.votes() == []
    with PreferenceStore(path) as store:
        store.add_labels([identity], [Label(1.0)], [VOTES])
        assert len(store.votes()) == 2
