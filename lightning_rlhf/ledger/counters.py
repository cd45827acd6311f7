"""Totals of a ledger that grow with it, so that no round scans the rows of earlier ones; used by the store.

Sums of costs and passes are compensated (Neumaier 1974): a thousand costs of 0.1 make 100, and a budget of 100 is met.
"""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Iterable
from typing import TypeAlias

from lightning_rlhf.ledger.schema import COUNTER_VERSION, schema_version


Sum: TypeAlias = tuple[float, float]
"""A compensated sum: the naive sum and its correction, to be added to it when it is read."""

STEP = 1024
"""Attempts between two running totals that `recount` writes."""


def summed(values: Iterable[float], start: Sum = (0.0, 0.0)) -> Sum:
    """Go on with a compensated sum (Neumaier 1974, "Rundungsfehleranalyse einiger Verfahren", algorithm IV)."""
    total, correction = start
    for value in values:
        larger, smaller = (total, value) if abs(total) >= abs(value) else (value, total)
        after = total + value
        # the digits of the smaller one that the naive sum has lost
        correction += (larger - after) + smaller
        total = after
    return total, correction


def count(db: sqlite3.Connection, name: str, added: int, values: Iterable[float] = ()) -> None:
    """Let a counter grow by ``added`` rows with these values; in the transaction that adds the rows."""
    counted, total, correction = db.execute(
        "SELECT count, total, correction FROM counters WHERE name = ?", (name,)
    ).fetchone()
    db.execute(
        "UPDATE counters SET count = ?, total = ?, correction = ? WHERE name = ?",
        (counted + added, *summed(values, (total, correction)), name),
    )


def note_attempts(db: sqlite3.Connection) -> None:
    """Write the running totals of the attempts that have been added since the last ones; in the same transaction."""
    labels, total = _running(db, sys.maxsize)
    last = db.execute("SELECT COALESCE(MAX(id), 0) FROM attempts").fetchone()[0]
    db.execute("INSERT OR REPLACE INTO running VALUES (?, ?, ?, ?)", (last, labels, *total))


def recorded(db: sqlite3.Connection, column: str, before: int = sys.maxsize) -> int:
    """Total of a column over the rounds of recorded pairs before round ``before``; see `ledger.recorded`."""
    if schema_version(db) < COUNTER_VERSION:
        return 0
    return int(db.execute(f"SELECT TOTAL({column}) FROM recorded WHERE round < ?", (before,)).fetchone()[0])


def labels_before(db: sqlite3.Connection, before: int, upto: int | None) -> int:
    """Labels with status ``"ok"`` up to attempt ``upto``, or without one in rounds before ``before``."""
    if upto is not None:
        if schema_version(db) >= COUNTER_VERSION:
            return _running(db, upto)[0] + recorded(db, "pairs - ties", before)
        return int(db.execute("SELECT COUNT(*) FROM attempts WHERE status = 'ok' AND id <= ?", (upto,)).fetchone()[0])
    # all labels, minus those of rounds from ``before`` on: the newest rounds are few
    later = (
        "SELECT COUNT(*) FROM comparisons c JOIN attempts l ON l.comparison = c.id AND l.status = 'ok' "
        "WHERE c.round >= ?"
    )
    labels, rest = db.execute(f"SELECT labels, ({later}) FROM totals", (before,)).fetchone()
    return int(labels - rest) + recorded(db, "pairs - ties", before)


def cost_before(db: sqlite3.Connection, before: int, upto: int | None) -> float:
    """Cost of the attempts up to ``upto``, or without one of those in rounds before ``before``."""
    newest = upto
    if upto is None:
        later = "SELECT 1 FROM comparisons c JOIN attempts l ON l.comparison = c.id WHERE c.round >= ? LIMIT 1"
        # a difference of sums would round: the rows themselves, unless all attempts count
        newest = sys.maxsize if db.execute(later, (before,)).fetchone() is None else None
    if newest is not None and schema_version(db) >= COUNTER_VERSION:
        return sum(_running(db, newest)[1])
    if newest is not None:
        return float(db.execute("SELECT TOTAL(cost) FROM attempts WHERE id <= ?", (newest,)).fetchone()[0])
    query = "SELECT l.cost FROM comparisons c JOIN attempts l ON l.comparison = c.id WHERE c.round < ? ORDER BY l.id"
    return sum(summed(cost for (cost,) in db.execute(query, (before,))))


def ties_before(db: sqlite3.Connection, before: int) -> int:
    """Free ties in rounds before ``before``."""
    pairs = "FROM comparisons c JOIN ties t ON t.comparison = c.id WHERE c.round"
    if schema_version(db) < COUNTER_VERSION:
        return int(db.execute(f"SELECT COUNT(*) {pairs} < ?", (before,)).fetchone()[0])
    ties = _counted(db, "ties") + recorded(db, "ties", before)
    return ties - int(db.execute(f"SELECT COUNT(*) {pairs} >= ?", (before,)).fetchone()[0])


def scores_before(db: sqlite3.Connection, before: int) -> int:
    """Scores of rollouts in rounds before ``before``."""
    scored = "FROM rollouts r JOIN scores s ON s.rollout = r.id WHERE r.round"
    if schema_version(db) < COUNTER_VERSION:
        return int(db.execute(f"SELECT COUNT(*) {scored} < ?", (before,)).fetchone()[0])
    return _counted(db, "scores") - int(db.execute(f"SELECT COUNT(*) {scored} >= ?", (before,)).fetchone()[0])


def mean_passes(db: sqlite3.Connection) -> float | None:
    """Mean of the passes of all comparisons; None if there are none."""
    if schema_version(db) < COUNTER_VERSION:
        mean: float | None = db.execute("SELECT AVG(passes) FROM comparisons").fetchone()[0]
        return mean
    counted, total, correction = db.execute(
        "SELECT count, total, correction FROM counters WHERE name = 'passes'"
    ).fetchone()
    # recorded pairs take no pass
    counted += recorded(db, "pairs")
    return (total + correction) / counted if counted else None


def recount(db: sqlite3.Connection) -> None:
    """Make all counters anew from the rows, for a ledger of a version that had none."""
    db.execute("DELETE FROM counters")
    db.execute("DELETE FROM running")
    passes = db.execute("SELECT passes FROM comparisons ORDER BY id")
    counted = db.execute("SELECT COUNT(*) FROM comparisons").fetchone()[0]
    rows = [("passes", counted, *summed(value for (value,) in passes))]
    for name in ("ties", "scores"):
        rows.append((name, db.execute(f"SELECT COUNT(*) FROM {name}").fetchone()[0], 0.0, 0.0))
    db.executemany("INSERT INTO counters VALUES (?, ?, ?, ?)", rows)
    labels, total, last = 0, (0.0, 0.0), 0
    marks = []
    for place, (last, status, cost) in enumerate(db.execute("SELECT id, status, cost FROM attempts ORDER BY id")):
        labels, total = labels + (status == "ok"), summed([cost], total)
        if (place + 1) % STEP == 0:
            marks.append((last, labels, *total))
    # the last one too, from which `note_attempts` goes on
    marks.append((last, labels, *total))
    db.executemany("INSERT OR REPLACE INTO running VALUES (?, ?, ?, ?)", marks)


def _counted(db: sqlite3.Connection, name: str) -> int:
    return int(db.execute("SELECT count FROM counters WHERE name = ?", (name,)).fetchone()[0])


def _running(db: sqlite3.Connection, upto: int) -> tuple[int, Sum]:
    """Labels and cost of the attempts up to ``upto``: the running totals before it, and the few attempts after them."""
    query = "SELECT attempt, labels, cost, correction FROM running WHERE attempt <= ? ORDER BY attempt DESC LIMIT 1"
    last, labels, *total = db.execute(query, (upto,)).fetchone() or (0, 0, 0.0, 0.0)
    rest = db.execute("SELECT status, cost FROM attempts WHERE id > ? AND id <= ? ORDER BY id", (last, upto)).fetchall()
    labels += sum(status == "ok" for status, _ in rest)
    return labels, summed((cost for _, cost in rest), (total[0], total[1]))
