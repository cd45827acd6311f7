"""Opening the file of a ledger: locks, checks of the file, and errors with remedies; used by the store.

A ledger is a SQLite file in WAL mode; the right to write it is a lock on an empty file beside
it.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sqlite3
import struct
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_rlhf.ledger.counters import recount
from lightning_rlhf.ledger.people import PEOPLE_SCHEMA
from lightning_rlhf.ledger.schema import (
    COUNTER_SCHEMA,
    COUNTER_VERSION,
    RECORDED_SCHEMA,
    ROLLOUT_SCHEMA,
    SCHEMA,
    SILVER_SCHEMA,
    TIE_SCHEMA,
    schema_version,
)


APPLICATION_ID = 0x524C4846  # "RLHF", in the header of the file
SCHEMA_VERSION = 6
UPGRADES = {
    2: ROLLOUT_SCHEMA,
    3: TIE_SCHEMA,
    4: SILVER_SCHEMA,
    5: PEOPLE_SCHEMA,
    COUNTER_VERSION: [*COUNTER_SCHEMA, *RECORDED_SCHEMA],
}
"""Statements that make a ledger of the version before one of this version; they only add."""
REMEDIES = {
    sqlite3.SQLITE_FULL: (errno.ENOSPC, "free some space and start again; every label written so far is kept"),
    sqlite3.SQLITE_IOERR: (
        errno.EIO,
        "check the disk and its quota, then start again; rows that were written are kept",
    ),
    sqlite3.SQLITE_READONLY: (errno.EACCES, "make it, its .lock and its folder writable, or pass read_only=True"),
    sqlite3.SQLITE_CANTOPEN: (errno.EACCES, "check the permissions of the ledger, of its .lock and of its folder"),
    sqlite3.SQLITE_BUSY: (errno.EBUSY, "close the program that holds a lock on it, such as a sqlite3 shell"),
}


def get_value(db: sqlite3.Connection, key: str) -> Any:
    """The JSON value that is stored under ``key``; None if there is none."""
    row = db.execute("SELECT value FROM run WHERE key = ?", (key,)).fetchone()
    try:
        return None if row is None else json.loads(row[0])
    except (ValueError, TypeError) as error:
        # without an error code of SQLite, so that `explained` reports a damaged ledger
        raise sqlite3.DatabaseError(f"the value of {key!r} is no JSON") from error


def set_value(db: sqlite3.Connection, key: str, value: object) -> None:
    """Store a JSON value under ``key``, in place of an earlier one."""
    db.execute("INSERT OR REPLACE INTO run VALUES (?, ?)", (key, json.dumps(value)))


def connect(path: Path, read_only: bool) -> sqlite3.Connection:
    """Open the file, creating it and its folder if we may write."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a ledger is a file, and this is a folder; add a file name", str(path))
    if read_only:
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, "no ledger here; check the folder or start the run", str(path))
        uri = path.absolute().as_uri() + "?mode=ro"
        if not os.access(path.parent, os.W_OK) and not Path(f"{path}-wal").exists():
            uri += "&immutable=1"  # SQLite would want to create the WAL; a cleanly closed ledger needs none
        return sqlite3.connect(uri, uri=True, timeout=60, isolation_level=None, check_same_thread=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"cannot create the folder of the ledger ({error.strerror}); choose a run folder where you may write"
        raise type(error)(error.errno, message, str(path)) from error
    # isolation_level None: the module would begin transactions by itself, and the store begins its own;
    # check_same_thread False: threads share the connection, one at a time behind the mutex of the store
    return sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)


def check_is_ledger(db: sqlite3.Connection, path: Path) -> bool:
    """Say whether this is a ledger that we can read; False for an empty file, an error for anything else."""
    application, version = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
    if application != APPLICATION_ID:
        # 0 is also the id of an empty file, and of other programs' files
        if application or db.execute("SELECT 1 FROM sqlite_master").fetchone():
            raise ValueError(f"{path} is a SQLite file of another program, not a ledger; give the ledger another name")
        return False
    if not 1 <= version <= SCHEMA_VERSION:
        raise ValueError(
            f"ledger {path} has schema version {version}, this lightning_rlhf reads version {SCHEMA_VERSION}; "
            f"install the lightning_rlhf that wrote it, or a newer one"
        )
    return True


def take_lease(db: sqlite3.Connection, path: Path) -> sqlite3.Connection:
    """Become the only writer, until the connection returned is closed or this process dies.

    The lock is SQLite's own, on an empty file. Unlike ``flock`` it is not inherited by forked data-loader workers,
    which may outlive a killed trainer, and it also excludes a second store in the same process.
    """
    # timeout 0: another writer is an error, not a wait
    lease = sqlite3.connect(f"{path}.lock", timeout=0, isolation_level=None, check_same_thread=False)
    try:
        lease.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        lease.close()
        if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
            raise
        # a file without tables has nowhere to look up its writer
        holder = get_value(db, "writer") if check_is_ledger(db, path) else None
        who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
        raise RuntimeError(
            f"ledger {path} is being written by {who}; wait for it or end it, use another run folder, "
            f"or open the ledger with read_only=True"
        ) from error
    return lease


def prepare_for_writing(db: sqlite3.Connection, path: Path) -> None:
    """Make every commit durable, create the tables of a new ledger, and sign as its writer."""
    # A comparison with log-probabilities takes kilobytes: pages of the default 4096 would stay half empty. synchronous:
    # EXTRA is FULL where the file system can do WAL, and as durable where SQLite has to stay with a rollback journal.
    # before BEGIN and WAL: the page size is fixed by then, and foreign_keys is ignored in a transaction
    for pragma in ("page_size = 16384", "synchronous = EXTRA", "fullfsync = ON", "foreign_keys = ON"):
        db.execute(f"PRAGMA {pragma}")
    is_new = not check_is_ledger(db, path)  # asked again, because only now nobody else can create it
    db.execute("BEGIN IMMEDIATE")  # rolled back by close() if anything below fails
    if is_new:
        for statement in SCHEMA:
            db.execute(statement)
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        set_value(db, "run_id", str(uuid.uuid4()))
        set_value(db, "created", time.time())
    # one version after the other; each only adds tables
    for version in range(schema_version(db) + 1, SCHEMA_VERSION + 1):
        for statement in UPGRADES[version]:
            db.execute(statement)
        if version == COUNTER_VERSION:
            # once: a scan of all rows, seconds for a million labels
            recount(db)
        db.execute(f"PRAGMA user_version = {version}")
    set_value(db, "writer", {"pid": os.getpid(), "host": socket.gethostname()})
    db.execute("COMMIT")
    # after COMMIT: SQLite does not change the journal mode within a transaction
    db.execute("PRAGMA journal_mode = WAL")
    if is_new and os.name == "posix":  # the name of the new file must survive a power loss, too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def readable(path: Path, where: str) -> Iterator[None]:
    """Turn errors in the cells of a row into an error that names the ledger and the place."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error) as error:
        raise ValueError(
            f"ledger {path} is damaged: {where} holds values that no run has written "
            f"({type(error).__name__}: {error}); restore a copy"
        ) from error


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn SQLite's short messages into errors that name the file and the remedy."""
    try:
        yield
    except UnicodeDecodeError as error:  # SQLite's message quotes the file
        raise ValueError(f"ledger {path} is damaged: its schema is no text; restore a copy") from error
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the low byte of an extended code is the primary one
        # a missing table or column is SQLITE_ERROR; a ProgrammingError is a wrong call, not a damaged file
        if code in (0, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_FORMAT) and not isinstance(error, sqlite3.ProgrammingError):
            raise ValueError(f"ledger {path} is damaged ({error}); restore a copy") from error
        if code == sqlite3.SQLITE_NOTADB:
            raise ValueError(f"{path} is not a ledger (not a SQLite file); give the ledger another name") from error
        if code == sqlite3.SQLITE_CORRUPT:
            raise ValueError(f"ledger {path} is damaged; restore a copy, or try `sqlite3 {path} .recover`") from error
        if code in REMEDIES:
            number, remedy = REMEDIES[code]
            raise OSError(number, f"cannot use the ledger ({error}): {remedy}", str(path)) from error
        raise
