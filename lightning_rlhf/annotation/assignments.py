"""Who sees which pair next, and what becomes of the verdict: leases, undo, gold questions, repeats."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from lightning_rlhf.annotation.intervals import wilson_interval
from lightning_rlhf.annotation.people import People, Person
from lightning_rlhf.annotation.queues import Item, QueueOptions, Queues, guidelines_hash
from lightning_rlhf.annotation.votes import (
    Ballot,
    Kept,
    Screen,
    Side,
    coin,
    first_shown,
    flags_of,
    other,
    screen_flags,
    screen_of,
    verdict_of,
)


LEASE_SECONDS = 600.0
UNDO_BACK = 20
"""Votes back to which a person can look."""
LEAST_GOLD, LEAST_RIGHT = 10, 0.8
"""Answers to gold questions before a person may be paused, and the share that the upper bound must reach."""


@dataclass(frozen=True)
class Gold:
    """A pair whose better response is known.

    Args:
        prompt: turns of the conversation.
        chosen: the better response.
        rejected: the other one.
        explanation: shown to people in practice, after their verdict.
    """

    prompt: tuple[Mapping[str, str], ...]
    chosen: str
    rejected: str
    explanation: str = ""


@dataclass(frozen=True)
class Shown:
    """A pair as a person sees it.

    Args:
        id: public id; says nothing of the run.
        prompt: turns of the conversation.
        left: text of the response on the left.
        right: text of the response on the right.
        left_cut: whether it was cut by the token limit.
        right_cut: the same for the right one.
        options: options of its queue.
        side: the standing verdict of the person; None if there is none.
        strength: its strength.
        reason: its reason.
        flags: its flags.
        rationale: its rationale.
    """

    id: str
    prompt: tuple[Mapping[str, str], ...]
    left: str
    right: str
    left_cut: bool
    right_cut: bool
    options: QueueOptions
    side: Screen | None = None
    strength: int | None = None
    reason: str = ""
    flags: tuple[str, ...] = ()
    rationale: str = ""


@dataclass(frozen=True)
class Receipt:
    """Answer to a ballot.

    Args:
        kept: ``kept``; ``again`` where the same ballot had arrived before; ``late`` where the pair was final, so that
            the vote counts in statistics only.
        right: in practice, whether the verdict was the known one; None otherwise.
        explanation: in practice, the explanation of the question.
        suggestion: P(the response on the left is preferred) by an AI, where the queue shows it after the vote.
        side: the verdict that it is shown beside.
    """

    kept: Kept
    right: bool | None = None
    explanation: str = ""
    suggestion: float | None = None
    side: Screen | None = None

    @property
    def has_feedback(self) -> bool:
        """Whether the page says something about the verdict."""
        return self.right is not None or self.suggestion is not None

    @property
    def ai_side(self) -> Screen:
        """The side that the AI prefers."""
        assert self.suggestion is not None
        return "tie" if self.suggestion == 0.5 else "left" if self.suggestion > 0.5 else "right"


class Assignments:
    """Hands out pairs and takes votes.

    A person gets, in this order: the pair that she holds; a practice question; a gold question or a repeat when it is
    due; a pair that others have begun, else one with the largest priority, else by hash.

    Args:
        queues: the queues.
        people: the people.
        gold_every: one of so many pairs of a person is a gold question, >= 2.
        practice: gold questions at the beginning, with feedback; the later ones are silent.
        repeat_every: one of so many pairs is an earlier pair of the person with the sides swapped, >= 2.
        repeat_distance: votes that must lie between a pair and its repeat.
    """

    def __init__(
        self,
        queues: Queues,
        people: People,
        *,
        gold_every: int = 20,
        practice: int = 3,
        repeat_every: int = 25,
        repeat_distance: int = 20,
    ) -> None:
        if gold_every < 2 or repeat_every < 2:
            raise ValueError(f"gold_every and repeat_every must be >= 2; got {gold_every} and {repeat_every}")
        self.queues, self.people, self.file = queues, people, queues.file
        self.gold_every, self.practice = gold_every, practice
        self.repeat_every, self.repeat_distance = repeat_every, repeat_distance

    # -- gold questions -----------------------------------------------------------------------------------------------

    def add_gold(self, questions: Sequence[Gold]) -> int:
        """Add gold questions; known ones stay. Returns how many are new.

        Raises:
            ValueError: if a question is one of the pairs in a queue: its verdict would be counted, too.
        """
        with self.file.writing() as db:
            queue, _ = self.queues._queue(db, "gold", None)
            added = 0
            for number, question in enumerate(questions):
                texts = {question.chosen, question.rejected}
                key = f"{int(coin('gold', question.prompt, *sorted(texts)) * 2**64):016x}"
                if db.execute("SELECT 1 FROM items WHERE queue = ? AND key = ?", (queue, key)).fetchone():
                    continue
                sides = (question.chosen, question.rejected)
                clash = db.execute(
                    "SELECT 1 FROM items WHERE kind = 'pair' AND ((a = ? AND b = ?) OR (b = ? AND a = ?))",
                    (*sides, *sides),
                ).fetchone()
                if clash:
                    raise ValueError(f"gold question {number + 1} is a pair of a queue; leave it out")
                gold: Side = "a" if coin("gold side", key) < 0.5 else "b"
                a, b = sides if gold == "a" else sides[::-1]
                item = Item(key, question.prompt, a, b)
                self.queues.insert(db, queue, item, "gold", 1, gold=gold, explanation=question.explanation)
                added += 1
        return added

    # -- the next pair ------------------------------------------------------------------------------------------------

    def next_pair(self, person: Person) -> Shown | None:
        """The next pair of a person, leased to her; None if there is none for her now."""
        now = self.file.clock()
        with self.file.writing() as db:
            row = db.execute(
                "SELECT i.* FROM leases l JOIN items i ON i.id = l.item WHERE l.annotator = ? AND l.until > ? "
                "AND i.state IN ('open', 'settled') ORDER BY l.shown LIMIT 1",
                (person.id, now),
            ).fetchone()
            state = db.execute("SELECT state FROM annotators WHERE id = ?", (person.id,)).fetchone()
            if state is None or state["state"] != "active":
                return None
            row = row or self._choose(db, person, now)
            if row is None:
                return None
            return self._lease(db, person, row, now)

    def _choose(self, db: sqlite3.Connection, person: Person, now: float) -> sqlite3.Row | None:
        counts = {
            row["kind"]: row["n"]
            for row in db.execute(
                "SELECT i.kind, COUNT(*) AS n FROM votes v JOIN items i ON i.id = v.item "
                "WHERE v.annotator = ? AND v.supersedes IS NULL GROUP BY i.kind",
                (person.id,),
            )
        }
        voted, gold = sum(counts.values()), counts.get("gold", 0)
        # practice first; then one of every gold_every
        due = gold < self.practice or voted - self.practice >= self.gold_every * (gold - self.practice + 1)
        row: sqlite3.Row | None = self._gold(db, person) if due else None
        if row is None and counts.get("pair", 0) >= self.repeat_every * (counts.get("repeat", 0) + 1):
            row = self._repeat(db, person)
        return row or self._pair(db, person, now)

    def _pair(self, db: sqlite3.Connection, person: Person, now: float) -> sqlite3.Row | None:
        found: sqlite3.Row | None = db.execute(
            "SELECT i.* FROM items i WHERE i.kind = 'pair' AND i.state = 'open' "
            # leases of others are votes that will come
            "AND i.count + (SELECT COUNT(*) FROM leases l WHERE l.item = i.id AND l.annotator <> ? AND l.until > ?) "
            "< i.need AND NOT EXISTS (SELECT 1 FROM votes v WHERE v.item = i.id AND v.annotator = ?) "
            # what is begun is finished first
            "ORDER BY i.count DESC, i.priority DESC, i.place LIMIT 1",
            (person.id, now, person.id),
        ).fetchone()
        return found

    def _gold(self, db: sqlite3.Connection, person: Person) -> sqlite3.Row | None:
        rows = db.execute(
            "SELECT * FROM items i WHERE kind = 'gold' AND state = 'open' "
            "AND NOT EXISTS (SELECT 1 FROM votes v WHERE v.item = i.id AND v.annotator = ?)",
            (person.id,),
        ).fetchall()
        # another order for everybody, so that people cannot tell each other what comes
        return min(rows, key=lambda row: coin(person.name, row["key"]), default=None)

    def _repeat(self, db: sqlite3.Connection, person: Person) -> sqlite3.Row | None:
        rows = db.execute(
            "SELECT i.*, v.first AS shown_first FROM votes v JOIN items i ON i.id = v.item WHERE v.annotator = ? "
            "AND i.kind = 'pair' AND v.verdict <> 'skip' AND v.supersedes IS NULL AND NOT EXISTS "
            "(SELECT 1 FROM items r WHERE r.source = i.id AND r.reserved = ?) AND "
            "(SELECT COUNT(*) FROM votes w WHERE w.annotator = v.annotator AND w.id > v.id) >= ?",
            (person.id, person.id, self.repeat_distance),
        ).fetchall()
        row = min(rows, key=lambda row: coin("repeat", person.name, row["key"]), default=None)
        if row is None:
            return None
        item = Item(
            key=f"repeat/{person.id}/{row['key']}",
            prompt=tuple(json.loads(row["prompt"])),
            a=row["a"],
            b=row["b"],
            cut_a=bool(row["cut_a"]),
            cut_b=bool(row["cut_b"]),
        )
        added = self.queues.insert(db, row["queue"], item, "repeat", 1, source=row["id"], reserved=person.id)
        found: sqlite3.Row = db.execute("SELECT * FROM items WHERE id = ?", (added,)).fetchone()
        return found

    def _lease(self, db: sqlite3.Connection, person: Person, row: sqlite3.Row, now: float) -> Shown:
        # the first showing decides the order; looking again, also after a restart, shows the same
        first = first_shown(person.name, row["key"])
        if row["kind"] == "repeat":
            source = db.execute(
                "SELECT first FROM votes WHERE item = ? AND annotator = ?", (row["source"], person.id)
            ).fetchone()
            first = other(cast(Side, source["first"]))
        db.execute(
            "INSERT INTO leases VALUES (?, ?, ?, ?, ?) ON CONFLICT (item, annotator) DO UPDATE SET until = ?",
            (row["id"], person.id, first, now, now + LEASE_SECONDS, now + LEASE_SECONDS),
        )
        return self._shown(row, first)

    def _shown(self, row: sqlite3.Row, first: Side, vote: sqlite3.Row | None = None) -> Shown:
        sides = {"a": (row["a"], bool(row["cut_a"])), "b": (row["b"], bool(row["cut_b"]))}
        left, right = sides[first], sides[other(first)]
        shown = Shown(
            id=row["public"],
            prompt=tuple(json.loads(row["prompt"])),
            left=left[0],
            right=right[0],
            left_cut=left[1],
            right_cut=right[1],
            options=self.queues.options(row["queue"]),
        )
        if vote is None:
            return shown
        return Shown(
            **{**vars(shown)}
            | {
                "side": screen_of(vote["verdict"], first),
                "strength": vote["strength"],
                "reason": vote["reason"],
                "flags": screen_flags(tuple(json.loads(vote["flags"])), first),
                "rationale": vote["rationale"],
            }
        )

    def beat(self, person: Person, pair: str) -> bool:
        """Renew the lease of a pair; False if it is lost: somebody else may have got the pair."""
        now = self.file.clock()
        with self.file.writing() as db:
            renewed = db.execute(
                "UPDATE leases SET until = ? WHERE annotator = ? AND until > ? "
                "AND item = (SELECT id FROM items WHERE public = ?)",
                (now + LEASE_SECONDS, person.id, now, pair),
            ).rowcount
        return renewed > 0

    def last(self, person: Person, back: int = 1) -> Shown | None:
        """An own earlier pair with its standing verdict, as it was shown.

        Args:
            person: whose.
            back: 1 for the last one, up to `UNDO_BACK`.
        """
        if not 1 <= back <= UNDO_BACK:
            return None
        with self.file.reading() as db:
            vote = db.execute(
                # the order of the first verdicts, which a correction does not change
                "SELECT s.* FROM votes f JOIN standing s ON s.item = f.item AND s.annotator = f.annotator "
                "WHERE f.annotator = ? AND f.supersedes IS NULL AND f.late = 0 ORDER BY f.id DESC LIMIT 1 OFFSET ?",
                (person.id, back - 1),
            ).fetchone()
            if vote is None:
                return None
            row = db.execute("SELECT * FROM items WHERE id = ?", (vote["item"],)).fetchone()
            return self._shown(row, cast(Side, vote["first"]), vote)

    # -- votes --------------------------------------------------------------------------------------------------------

    def vote(self, person: Person, ballot: Ballot) -> Receipt:
        """Keep a verdict; one on a pair with an own standing vote corrects that one, until the pair is final.

        Raises:
            KeyError: if the person was never shown the pair.
        """
        now = self.file.clock()
        self.queues.finalize()
        with self.file.writing() as db:
            row = db.execute(
                "SELECT i.*, l.first AS first, l.shown AS shown FROM items i JOIN leases l ON l.item = i.id "
                "WHERE i.public = ? AND l.annotator = ?",
                (ballot.pair, person.id),
            ).fetchone()
            if row is None:
                raise KeyError(f"no pair {ballot.pair}")
            if db.execute("SELECT 1 FROM votes WHERE uid = ?", (ballot.uid,)).fetchone():
                return Receipt("again")
            first = cast(Side, row["first"])
            standing = db.execute(
                "SELECT id FROM standing WHERE item = ? AND annotator = ?", (row["id"], person.id)
            ).fetchone()
            # a gold question or a repeat stays as it was answered first
            is_late = row["state"] not in ("open", "settled") or (row["kind"] != "pair" and standing is not None)
            # a late vote supersedes nothing: the label that was given stays
            supersedes = None if is_late or standing is None else standing["id"]
            options = self.queues.options(row["queue"])
            db.execute(
                "INSERT INTO votes (uid, item, annotator, first, verdict, strength, reason, flags, rationale, seconds, "
                "shown, time, rendered, guidelines, supersedes, late) VALUES (" + ", ".join("?" * 16) + ")",
                (
                    *(ballot.uid, row["id"], person.id, first, verdict_of(ballot.side, first), ballot.strength),
                    *(ballot.reason, json.dumps(flags_of(ballot.flags, first)), ballot.rationale, ballot.seconds),
                    *(row["shown"], now, ballot.rendered, guidelines_hash(options.guidelines), supersedes, is_late),
                ),
            )
            db.execute("UPDATE leases SET until = 0 WHERE item = ? AND annotator = ?", (row["id"], person.id))
            if row["kind"] == "pair" and not is_late:
                self.queues.refresh(row["id"])
            receipt = self._receipt(db, person, row, ballot, is_late)
            if row["kind"] == "gold" and not is_late:
                self._pause_if_wrong(db, person)
        return receipt

    def _receipt(
        self, db: sqlite3.Connection, person: Person, row: sqlite3.Row, ballot: Ballot, is_late: bool
    ) -> Receipt:
        kept: Kept = "late" if is_late else "kept"
        if row["suggestion"] is not None and not is_late and self.queues.options(row["queue"]).show_ai == "after":
            left = row["suggestion"] if row["first"] == "a" else 1.0 - row["suggestion"]
            return Receipt(kept, suggestion=left, side=ballot.side)
        if row["kind"] != "gold" or is_late:
            return Receipt(kept)
        answered = db.execute(
            "SELECT COUNT(*) FROM standing v JOIN items i ON i.id = v.item WHERE i.kind = 'gold' AND v.annotator = ?",
            (person.id,),
        ).fetchone()[0]
        if answered > self.practice:
            return Receipt(kept)
        right = verdict_of(ballot.side, cast(Side, row["first"])) == row["gold"]
        return Receipt(kept, right, row["explanation"])

    def _pause_if_wrong(self, db: sqlite3.Connection, person: Person) -> None:
        """Pause a person whose answers to gold questions are surely below 80 %; the votes stay."""
        rows = db.execute(
            "SELECT v.verdict = i.gold AS right FROM standing v JOIN items i ON i.id = v.item "
            "WHERE i.kind = 'gold' AND v.annotator = ? AND v.verdict <> 'skip'",
            (person.id,),
        ).fetchall()
        right = sum(row["right"] for row in rows)
        if len(rows) >= LEAST_GOLD and wilson_interval(right, len(rows))[1] < LEAST_RIGHT:
            self.people.set_state(person.id, "paused")
            self.queues.refresh()
            self.file.note("paused by gold questions", person.name, f"{right} of {len(rows)}")
