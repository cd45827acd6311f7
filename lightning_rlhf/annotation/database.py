"""The file of the annotation server: tables, transactions, and the lock that keeps a second server out."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


APPLICATION_ID = 0x524C4850
"""In the header of the file: "RLHP"."""
VERSION = 2
SCHEMA = [
    "CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE annotators (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, token TEXT NOT NULL UNIQUE, "
    "role TEXT NOT NULL CHECK (role IN ('annotator', 'trainer', 'admin')), "
    "state TEXT NOT NULL CHECK (state IN ('active', 'paused', 'removed')), confirmed TEXT NOT NULL DEFAULT '', "
    "created REAL NOT NULL)",
    # tokens, codes and sessions are stored as hashes: a copy of the file signs nobody in
    "CREATE TABLE codes (hash TEXT PRIMARY KEY, annotator INTEGER NOT NULL REFERENCES annotators, until REAL NOT NULL)",
    "CREATE TABLE sessions (hash TEXT PRIMARY KEY, annotator INTEGER NOT NULL REFERENCES annotators, "
    "until REAL NOT NULL)",
    "CREATE TABLE queues (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, settings TEXT NOT NULL, "
    "created REAL NOT NULL)",
    "CREATE TABLE items (id INTEGER PRIMARY KEY, queue INTEGER NOT NULL REFERENCES queues, key TEXT NOT NULL, "
    "public TEXT NOT NULL UNIQUE, prompt TEXT NOT NULL, a TEXT NOT NULL, b TEXT NOT NULL, cut_a INTEGER NOT NULL, "
    "cut_b INTEGER NOT NULL, kind TEXT NOT NULL CHECK (kind IN ('pair', 'gold', 'repeat')), "
    # votes asked for; votes there are; votes to wait for, which depends on conflicts and on who is there
    "wanted INTEGER NOT NULL, count INTEGER NOT NULL DEFAULT 0, need INTEGER NOT NULL, priority REAL NOT NULL, "
    "place REAL NOT NULL, gold TEXT, explanation TEXT NOT NULL DEFAULT '', source INTEGER REFERENCES items, "
    "reserved INTEGER REFERENCES annotators, state TEXT NOT NULL DEFAULT 'open' "
    "CHECK (state IN ('open', 'settled', 'final', 'skipped', 'withdrawn')), ended INTEGER UNIQUE, "
    "created REAL NOT NULL, suggestion REAL, UNIQUE (queue, key))",
    "CREATE INDEX items_to_do ON items (kind, state, count DESC, priority DESC, place)",
    "CREATE TABLE leases (item INTEGER NOT NULL REFERENCES items, annotator INTEGER NOT NULL REFERENCES annotators, "
    "first TEXT NOT NULL, shown REAL NOT NULL, until REAL NOT NULL, PRIMARY KEY (item, annotator))",
    "CREATE TABLE guidelines (hash TEXT PRIMARY KEY, text TEXT NOT NULL, created REAL NOT NULL)",
    "CREATE TABLE votes (id INTEGER PRIMARY KEY, uid TEXT NOT NULL UNIQUE, item INTEGER NOT NULL REFERENCES items, "
    "annotator INTEGER NOT NULL REFERENCES annotators, first TEXT NOT NULL CHECK (first IN ('a', 'b')), "
    "verdict TEXT NOT NULL CHECK (verdict IN ('a', 'b', 'tie', 'both_bad', 'skip')), "
    "strength INTEGER CHECK (strength BETWEEN 1 AND 3), reason TEXT NOT NULL, flags TEXT NOT NULL, "
    "rationale TEXT NOT NULL, seconds REAL NOT NULL, shown REAL NOT NULL, time REAL NOT NULL, "
    "rendered TEXT NOT NULL, guidelines TEXT NOT NULL, supersedes INTEGER UNIQUE REFERENCES votes, "
    "late INTEGER NOT NULL DEFAULT 0, CHECK (strength IS NULL OR verdict IN ('a', 'b')))",
    "CREATE INDEX votes_of_item ON votes (item, annotator)",
    "CREATE INDEX votes_of_annotator ON votes (annotator)",
    "CREATE TRIGGER votes_are_never_changed BEFORE UPDATE ON votes BEGIN SELECT RAISE(ABORT, 'append-only'); END",
    "CREATE TRIGGER votes_are_never_deleted BEFORE DELETE ON votes BEGIN SELECT RAISE(ABORT, 'append-only'); END",
    "CREATE VIEW standing AS SELECT * FROM votes v WHERE late = 0 "
    "AND NOT EXISTS (SELECT 1 FROM votes w WHERE w.supersedes = v.id)",
    "CREATE TABLE events (id INTEGER PRIMARY KEY, time REAL NOT NULL, kind TEXT NOT NULL, who TEXT NOT NULL, "
    "detail TEXT NOT NULL)",
]
UPGRADES = {2: ["ALTER TABLE items ADD COLUMN suggestion REAL"]}
"""Statements that make a file of each version of one of the version before."""


class AnnotationFile:
    """The open file; one process writes it, and its threads take turns.

    Args:
        path: the SQLite file; created with its folder if absent.
        clock: seconds since the epoch.

    Attributes:
        version: grows with every change, so that a waiting request sees cheaply whether there is news.

    Raises:
        RuntimeError: if another server has it open.
        ValueError: if it is the file of another program, or of a newer version.
    """

    def __init__(self, path: str | Path, clock: Callable[[], float] = time.time) -> None:
        self.path, self.clock = Path(path), clock
        self.version = self._depth = 0
        self._mutex = threading.RLock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # SQLite's own lock on an empty file: the system frees it when the process ends, also on kill -9
        self._lock = sqlite3.connect(f"{self.path}.lock", timeout=0, isolation_level=None, check_same_thread=False)
        try:
            self._lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            self._lock.close()
            raise RuntimeError(
                f"{self.path} is open in another annotation server; end that server, or use another run_dir"
            ) from error
        # before the tables: texts and tokens are for the owner alone
        self.path.touch(mode=0o600)
        self._db = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        self._db.row_factory = sqlite3.Row
        application, version = (
            self._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
        )
        is_new = not self._db.execute("SELECT 1 FROM sqlite_master").fetchone()
        if not is_new and application != APPLICATION_ID:
            raise ValueError(f"{self.path} is a file of another program; use another run_dir")
        if version > VERSION:
            raise ValueError(f"{self.path} has version {version}, this lightning_rlhf reads {VERSION}; install a newer")
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            self._db.execute(f"PRAGMA {pragma}")
        if version < VERSION:
            self._db.execute("BEGIN IMMEDIATE")
            later = [statement for number in range(version + 1, VERSION + 1) for statement in UPGRADES.get(number, ())]
            for statement in SCHEMA if is_new else later:
                self._db.execute(statement)
            self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            self._db.execute(f"PRAGMA user_version = {VERSION}")
            self._db.execute("COMMIT")

    def close(self) -> None:
        """Close the file and free it for another server."""
        with self._mutex:
            self._db.close()
            self._lock.close()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The connection, one thread at a time."""
        with self._mutex:
            yield self._db

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction, on the disk when the block ends; nothing of it is kept if the block raises."""
        with self._mutex:
            # a method that writes may call another one: the outer transaction holds both
            self._depth += 1
            try:
                if self._depth == 1:
                    self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                if self._depth == 1:
                    self._db.execute("COMMIT")
                    self.version += 1
            except BaseException:
                # SQLite has already rolled back when the disk is full
                if self._depth == 1 and self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            finally:
                self._depth -= 1

    def note(self, kind: str, who: str, detail: str = "") -> None:
        """Keep an event, without texts or tokens; call it within `writing`."""
        self._db.execute(
            "INSERT INTO events (time, kind, who, detail) VALUES (?, ?, ?, ?)", (self.clock(), kind, who, detail)
        )
