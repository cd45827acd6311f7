"""Queues of pairs: what a trainer pushes, when a pair has votes enough, and the verdicts it gets back."""

from __future__ import annotations

import json
import secrets
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal, cast, get_args

from lightning_rlhf.annotation.database import AnnotationFile
from lightning_rlhf.annotation.votes import JSON, Vote, coin, vote_of


ShowAI = Literal["never", "after"]


@dataclass(frozen=True)
class QueueOptions:
    """How many votes the pairs of a queue get, and what people are told.

    Args:
        votes: votes per pair, >= 1.
        overlap: share of the pairs, in [0, 1], that get ``overlap_votes``, to measure how far people agree; chosen by a
            hash.
        overlap_votes: votes of those pairs.
        max_votes: while votes contradict each other, one more is asked for, up to this many.
        max_skips: a pair without a vote that so many people skipped is given up.
        scale: strengths on the page: 7 (much better to much better) or 3 (better, same, better).
        guidelines: Markdown; people confirm it before the first pair. Empty: none.
        question: the question above a pair.
        show_ai: ``never``, or ``after``: once a person has voted on a pair, the verdict of an AI on it, if there is
            one; a vote that the person changes then supersedes the first.

    Raises:
        ValueError: if a number is out of range.
    """

    votes: int = 1
    overlap: float = 0.1
    overlap_votes: int = 3
    max_votes: int = 3
    max_skips: int = 2
    scale: int = 7
    guidelines: str = ""
    question: str = "Which response is better?"
    show_ai: ShowAI = "never"

    def __post_init__(self) -> None:
        for name in ("votes", "overlap_votes", "max_votes", "max_skips"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number >= 1; got {value!r}")
        if not 0.0 <= self.overlap <= 1.0:
            raise ValueError(f"overlap is a share in [0, 1]; got {self.overlap!r}")
        if self.max_votes < self.votes:
            raise ValueError(f"max_votes must be >= votes; got max_votes={self.max_votes}, votes={self.votes}")
        if self.scale not in (3, 7):
            raise ValueError(f"scale must be 3 or 7; got {self.scale!r}")
        if self.show_ai not in get_args(ShowAI):
            # before the vote it would be an anchor, and the vote no sample of what a person prefers
            raise ValueError(f"show_ai must be never or after; got {self.show_ai!r}")


@dataclass(frozen=True)
class Item:
    """A pair to be judged.

    Args:
        key: name of the pair in its queue; pushing it again is harmless.
        prompt: turns of the conversation, each with ``role`` and ``content``.
        a: first response.
        b: second response.
        cut_a: whether the token limit cut the first response.
        cut_b: whether the token limit cut the second response.
        priority: pairs with a larger one come first.
        suggestion: P(a preferred) by an AI, shown to a person who has voted on the pair. Default: there is none.
    """

    key: str
    prompt: tuple[Mapping[str, str], ...]
    a: str
    b: str
    cut_a: bool = False
    cut_b: bool = False
    priority: float = 0.0
    suggestion: float | None = None


@dataclass(frozen=True)
class Result:
    """Outcome of a pair.

    Args:
        key: the pair.
        state: ``final``, or ``skipped`` where nobody could judge it.
        votes: the votes that count, skips included, oldest first.
    """

    key: str
    state: str
    votes: tuple[Vote, ...] = ()


@dataclass(frozen=True)
class Progress:
    """How far a queue is.

    Args:
        total: pairs, without withdrawn ones.
        open: pairs that wait for votes.
        settled: pairs with votes enough, which may still be undone.
        done: pairs with a verdict that stays.
        skipped: pairs that nobody could judge.
        votes: standing votes.
        online: people who hold a pair now.
    """

    total: int = 0
    open: int = 0
    settled: int = 0
    done: int = 0
    skipped: int = 0
    votes: int = 0
    online: int = 0


class Queues:
    """The queues of an annotation server.

    Args:
        file: the file of the server.
        undo_seconds: time for which a person may undo a vote; the vote is final sooner if the same person has voted
            `UNDO_VOTES` times since.
    """

    UNDO_VOTES = 3

    def __init__(self, file: AnnotationFile, undo_seconds: float = 20.0) -> None:
        self.file, self.undo_seconds = file, undo_seconds

    def push(self, queue: str, items: Sequence[Item], options: QueueOptions | None = None) -> int:
        """Add pairs to a queue, which is created if absent; returns how many are new.

        Args:
            queue: name of the queue.
            items: the pairs.
            options: options of the queue from now on; default: as they are.

        Raises:
            ValueError: if a key is known with another text.
        """
        with self.file.writing() as db:
            identity, options = self._queue(db, queue, options)
            added = 0
            for item in items:
                prompt = json.dumps([dict(turn) for turn in item.prompt])
                known = db.execute(
                    "SELECT prompt, a, b FROM items WHERE queue = ? AND key = ?", (identity, item.key)
                ).fetchone()
                if known is not None:
                    if tuple(known) != (prompt, item.a, item.b):
                        raise ValueError(
                            f"pair {item.key} of queue {queue} is known with another text; give the run another queue"
                        )
                    continue
                overlaps = coin("overlap", item.key) < options.overlap
                wanted = max(options.overlap_votes, options.votes) if overlaps else options.votes
                self.insert(db, identity, item, "pair", wanted)
                added += 1
            if added:
                self.file.note("pushed", queue, str(added))
        self.refresh()
        return added

    def insert(self, db: sqlite3.Connection, queue: int, item: Item, kind: str, wanted: int, **extra: object) -> int:
        """Add one row; ``extra`` are further columns."""
        row: JSON = {
            "queue": queue,
            "key": item.key,
            # the page shows this name, which says nothing of the run
            "public": secrets.token_urlsafe(12),
            "prompt": json.dumps([dict(turn) for turn in item.prompt]),
            "a": item.a,
            "b": item.b,
            "cut_a": int(item.cut_a),
            "cut_b": int(item.cut_b),
            "kind": kind,
            "wanted": wanted,
            "need": wanted,
            "priority": item.priority,
            "suggestion": item.suggestion,
            # by hash, so that no round and no arm gets the fresh hours of the people
            "place": coin("place", item.key),
            "created": self.file.clock(),
            **extra,
        }
        marks = ", ".join("?" * len(row))
        added = db.execute(f"INSERT INTO items ({', '.join(row)}) VALUES ({marks})", tuple(row.values())).lastrowid
        assert added is not None
        return added

    def withdraw(self, queue: str, keys: Iterable[str]) -> int:
        """Take back pairs without a final verdict that nobody needs any more; returns how many."""
        with self.file.writing() as db:
            count = 0
            for key in keys:
                row = db.execute(
                    "SELECT i.id FROM items i JOIN queues q ON q.id = i.queue "
                    "WHERE q.name = ? AND i.key = ? AND i.state IN ('open', 'settled')",
                    (queue, key),
                ).fetchone()
                if row is not None:
                    db.execute("UPDATE items SET state = 'withdrawn' WHERE id = ?", (row["id"],))
                    db.execute("UPDATE leases SET until = 0 WHERE item = ?", (row["id"],))
                    count += 1
        return count

    def results(self, queue: str, after: int = 0) -> tuple[int, list[Result]]:
        """Verdicts that stay, in the order in which they became final.

        Args:
            queue: name of the queue.
            after: cursor of an earlier call; asking again with the same one gives the same verdicts and newer ones.

        Returns:
            The new cursor, and the verdicts behind ``after``.
        """
        self.finalize()
        with self.file.reading() as db:
            rows = db.execute(
                "SELECT i.id, i.key, i.state, i.ended FROM items i JOIN queues q ON q.id = i.queue "
                "WHERE q.name = ? AND i.kind = 'pair' AND i.ended > ? ORDER BY i.ended",
                (queue, after),
            ).fetchall()
            found = [Result(row["key"], row["state"], tuple(standing_votes(db, row["id"]))) for row in rows]
        return (rows[-1]["ended"] if rows else after), found

    def progress(self, queue: str | None = None) -> Progress:
        """How far a queue is; default: all queues together."""
        now = self.file.clock()
        where, values = ("", ()) if queue is None else ("AND q.name = ?", (queue,))
        with self.file.reading() as db:
            rows = db.execute(
                "SELECT i.state, COUNT(*), SUM(i.count) FROM items i JOIN queues q ON q.id = i.queue "
                f"WHERE i.kind = 'pair' {where} GROUP BY i.state",
                values,
            ).fetchall()
            online = db.execute("SELECT COUNT(DISTINCT annotator) FROM leases WHERE until > ?", (now,)).fetchone()[0]
        counts = {state: count for state, count, _ in rows}
        votes = sum(votes for state, _, votes in rows if state != "withdrawn")
        states = {name: counts.get(name, 0) for name in ("open", "settled", "final", "skipped")}
        return Progress(
            total=sum(states.values()),
            open=states["open"],
            settled=states["settled"],
            done=states["final"],
            skipped=states["skipped"],
            votes=votes,
            online=online,
        )

    def options(self, queue: int) -> QueueOptions:
        """Options of a queue, given by its number."""
        with self.file.reading() as db:
            row = db.execute("SELECT settings FROM queues WHERE id = ?", (queue,)).fetchone()
        return queue_options(json.loads(row["settings"]))

    def names(self) -> list[str]:
        """Names of the queues, oldest first."""
        with self.file.reading() as db:
            return [row["name"] for row in db.execute("SELECT name FROM queues ORDER BY id").fetchall()]

    def refresh(self, item: int | None = None) -> None:
        """Decide anew which pairs have votes enough: one pair after a vote, all when people come or go."""
        with self.file.writing() as db:
            people = {row["id"] for row in db.execute(ACTIVE).fetchall()}
            query = "SELECT * FROM items WHERE kind = 'pair' AND state IN ('open', 'settled')"
            rows = db.execute(query if item is None else query + " AND id = ?", () if item is None else (item,))
            options: dict[int, QueueOptions] = {}
            for row in rows.fetchall():
                if row["queue"] not in options:
                    options[row["queue"]] = self.options(row["queue"])
                self._refresh(db, row, people, options[row["queue"]])

    def _refresh(self, db: sqlite3.Connection, row: sqlite3.Row, people: set[int], options: QueueOptions) -> None:
        votes = db.execute("SELECT annotator, verdict FROM standing WHERE item = ?", (row["id"],)).fetchall()
        verdicts = [vote["verdict"] for vote in votes if vote["verdict"] != "skip"]
        skips, count = len(votes) - len(verdicts), len(verdicts)
        need = row["wanted"]
        # one more vote while the sides contradict each other
        if {"a", "b"} <= set(verdicts) and need <= count < options.max_votes:
            need = count + 1
        # more votes than there are people who may still vote would be waited for without end
        able = len(people - {vote["annotator"] for vote in votes})
        need = max(min(need, count + able), 1)
        given_up = skips >= options.max_skips or (skips > 0 and able == 0)
        # a pair with votes is never given up: they were paid for
        settled = count >= need if count else given_up
        state = "settled" if settled and votes else "open"
        if (count, need, state) != (row["count"], row["need"], row["state"]):
            db.execute("UPDATE items SET count = ?, need = ?, state = ? WHERE id = ?", (count, need, state, row["id"]))

    def finalize(self) -> int:
        """Make verdicts final that can no longer be undone; returns how many."""
        old = self.file.clock() - self.undo_seconds
        # a vote can be undone while it is young, and its author has voted fewer than UNDO_VOTES times since
        query = (
            "SELECT i.id, i.count FROM items i WHERE i.kind = 'pair' AND i.state = 'settled' AND NOT EXISTS "
            "(SELECT 1 FROM standing v WHERE v.item = i.id AND v.time > ? AND "
            "(SELECT COUNT(*) FROM votes w WHERE w.annotator = v.annotator AND w.id > v.id) < ?) ORDER BY i.id"
        )
        with self.file.reading() as db:
            if not db.execute(query, (old, self.UNDO_VOTES)).fetchone():
                return 0
        with self.file.writing() as db:
            rows = db.execute(query, (old, self.UNDO_VOTES)).fetchall()
            for row in rows:
                db.execute(
                    "UPDATE items SET state = ?, ended = (SELECT COALESCE(MAX(ended), 0) + 1 FROM items) WHERE id = ?",
                    ("final" if row["count"] else "skipped", row["id"]),
                )
        return len(rows)

    def _queue(self, db: sqlite3.Connection, name: str, options: QueueOptions | None) -> tuple[int, QueueOptions]:
        row = db.execute("SELECT id, settings FROM queues WHERE name = ?", (name,)).fetchone()
        if row is None:
            options = options or QueueOptions()
            text = json.dumps(asdict(options))
            now = self.file.clock()
            added = db.execute("INSERT INTO queues (name, settings, created) VALUES (?, ?, ?)", (name, text, now))
            assert added.lastrowid is not None
            identity = added.lastrowid
        else:
            identity, options = row["id"], options or queue_options(json.loads(row["settings"]))
            db.execute("UPDATE queues SET settings = ? WHERE id = ?", (json.dumps(asdict(options)), identity))
        if options.guidelines:
            db.execute(
                "INSERT OR IGNORE INTO guidelines VALUES (?, ?, ?)",
                (guidelines_hash(options.guidelines), options.guidelines, self.file.clock()),
            )
        return identity, options


ACTIVE = (
    "SELECT id FROM annotators n WHERE state = 'active' AND (role = 'annotator' OR "
    "(role = 'admin' AND EXISTS (SELECT 1 FROM votes v WHERE v.annotator = n.id)))"
)
"""People whose votes are waited for. An admin may vote, and counts from the first vote on."""
SELECT_VOTES = (
    "SELECT v.*, n.name AS name, s.uid AS old, i.key AS key, i.kind AS kind, i.gold AS gold, q.name AS queue "
    "FROM {table} v JOIN annotators n ON n.id = v.annotator JOIN items i ON i.id = v.item "
    "JOIN queues q ON q.id = i.queue LEFT JOIN votes s ON s.id = v.supersedes"
)


def standing_votes(db: sqlite3.Connection, item: int) -> list[Vote]:
    """The votes on an item that count, skips included, oldest first."""
    rows = db.execute(SELECT_VOTES.format(table="standing") + " WHERE v.item = ? ORDER BY v.id", (item,)).fetchall()
    return [row_vote(row) for row in rows]


def row_vote(row: sqlite3.Row) -> Vote:
    """Read a row of `SELECT_VOTES`."""
    known = dict(row) | {"annotator": row["name"], "supersedes": row["old"] or ""}
    return vote_of(known)


def queue_options(values: Mapping[str, object]) -> QueueOptions:
    """Read options as JSON.

    Raises:
        ValueError: if a name is unknown or a value out of range.
    """
    names = {field.name for field in fields(QueueOptions)}
    if set(values) - names:
        raise ValueError(f"unknown options {sorted(set(values) - names)}; known are {', '.join(sorted(names))}")
    return QueueOptions(**cast(dict[str, int], dict(values)))  # type: ignore[arg-type]


def guidelines_hash(text: str) -> str:
    """Short name of guidelines; empty for none."""
    return f"{int(coin('guidelines', text) * 2**64):016x}" if text else ""
