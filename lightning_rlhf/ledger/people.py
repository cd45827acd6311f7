"""Votes of people in a ledger: tables, rows, and which round a late label belongs to; used by the store."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Sequence

from lightning_rlhf.annotation.votes import Vote, vote_of


PEOPLE_SCHEMA = [
    # pseudonyms; tokens stay in the file of the annotation server
    "CREATE TABLE IF NOT EXISTS annotators (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE)",
    "CREATE TABLE IF NOT EXISTS guidelines (hash TEXT PRIMARY KEY, text TEXT NOT NULL, time REAL NOT NULL)",
    "CREATE TABLE IF NOT EXISTS votes (id INTEGER PRIMARY KEY, uid TEXT NOT NULL UNIQUE, "
    "comparison INTEGER NOT NULL REFERENCES comparisons, annotator INTEGER NOT NULL REFERENCES annotators, "
    "first TEXT NOT NULL CHECK (first IN ('a', 'b')), "
    "verdict TEXT NOT NULL CHECK (verdict IN ('a', 'b', 'tie', 'both_bad', 'skip')), "
    "strength INTEGER CHECK (strength BETWEEN 1 AND 3), reason TEXT NOT NULL, flags TEXT NOT NULL, "
    "rationale TEXT NOT NULL, seconds REAL NOT NULL, shown REAL NOT NULL, time REAL NOT NULL, "
    "rendered TEXT NOT NULL, guidelines TEXT NOT NULL, supersedes TEXT NOT NULL, late INTEGER NOT NULL, "
    "CHECK (strength IS NULL OR verdict IN ('a', 'b')))",
    "CREATE INDEX IF NOT EXISTS votes_of_comparison ON votes (comparison)",
    "CREATE TRIGGER IF NOT EXISTS votes_are_never_changed BEFORE UPDATE ON votes "
    "BEGIN SELECT RAISE(ABORT, 'append-only'); END",
    "CREATE TRIGGER IF NOT EXISTS votes_are_never_deleted BEFORE DELETE ON votes "
    "BEGIN SELECT RAISE(ABORT, 'append-only'); END",
]
"""Tables that version 5 of the schema added."""
FIELDS = [
    *("uid", "first", "verdict", "strength", "reason", "flags", "rationale", "seconds", "shown", "time"),
    *("rendered", "guidelines", "supersedes", "late"),
]
"""Columns of a vote besides its comparison and annotator."""


def insert_votes(db: sqlite3.Connection, comparison: int, votes: Iterable[Vote]) -> None:
    """Add the votes on a comparison; one that is there already, by its uid, stays."""
    for vote in votes:
        db.execute("INSERT OR IGNORE INTO annotators (name) VALUES (?)", (vote.annotator,))
        row = vote.to_json()
        row["flags"] = json.dumps(row["flags"])
        db.execute(
            f"INSERT OR IGNORE INTO votes (comparison, annotator, {', '.join(FIELDS)}) "
            f"VALUES (?, (SELECT id FROM annotators WHERE name = ?), {', '.join('?' * len(FIELDS))})",
            (comparison, vote.annotator, *(row[name] for name in FIELDS)),
        )


def insert_guidelines(db: sqlite3.Connection, name: str, text: str) -> None:
    """Keep the text of guidelines under the hash that votes name."""
    db.execute("INSERT OR IGNORE INTO guidelines VALUES (?, ?, ?)", (name, text, time.time()))


def select_votes(db: sqlite3.Connection, rounds: Sequence[int] | None) -> list[tuple[int, int, Vote]]:
    """Round, position and vote, oldest first."""
    tables = "FROM votes v JOIN comparisons c ON c.id = v.comparison JOIN annotators n ON n.id = v.annotator"
    wanted = None if rounds is None else set(rounds)
    found = _select(db, f"{tables} ORDER BY v.id")
    return [(round_, place, vote) for _, round_, place, vote in found if wanted is None or round_ in wanted]


def select_labeled_votes(db: sqlite3.Connection, upto: int, after: int) -> dict[int, tuple[tuple[int, int], Vote]]:
    """Round and position, and vote, by the number of the vote; see `PreferenceStore.labeled_votes`."""
    # by the numbers of the labels, which are few: CROSS JOIN keeps this order
    tables = (
        "FROM attempts l CROSS JOIN votes v ON v.comparison = l.comparison JOIN comparisons c ON c.id = v.comparison "
        "JOIN annotators n ON n.id = v.annotator WHERE l.id > ? AND l.id <= ? AND l.status = 'ok' AND NOT v.late"
    )
    return {number: ((round_, place), vote) for number, round_, place, vote in _select(db, tables, after, upto)}


def _select(db: sqlite3.Connection, tables: str, *numbers: int) -> list[tuple[int, int, int, Vote]]:
    """Number, round, position and vote of votes ``v``, with the comparison ``c`` and the annotator ``n``."""
    columns = ", ".join(f"v.{name} AS {name}" for name in FIELDS)
    cursor = db.execute(f"SELECT v.id, c.round, c.position, n.name AS annotator, {columns} {tables}", numbers)
    names = [column[0] for column in cursor.description[3:]]
    return [(*row[:3], vote_of(dict(zip(names, row[3:], strict=True)))) for row in cursor.fetchall()]
