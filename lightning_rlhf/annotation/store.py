"""The annotation store: people, queues, assignments and votes in one SQLite file, without a server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lightning_rlhf.annotation.assignments import Assignments, Gold
from lightning_rlhf.annotation.database import AnnotationFile
from lightning_rlhf.annotation.people import People, Person, PersonState, Role
from lightning_rlhf.annotation.queues import SELECT_VOTES, Queues, guidelines_hash, row_vote
from lightning_rlhf.annotation.votes import Side, Vote


@dataclass(frozen=True)
class KeptVote:
    """A vote with its place.

    Args:
        vote: the vote.
        queue: name of the queue.
        key: the pair.
        kind: ``pair``, ``gold`` or ``repeat``; of a repeat, ``key`` ends with the key of the earlier pair.
        gold: the better response of a gold question; None otherwise.
    """

    vote: Vote
    queue: str
    key: str
    kind: str
    gold: Side | None = None


class AnnotationStore:
    """Everything that an annotation server keeps.

    Args:
        path: the SQLite file; created with its folder if absent.
        clock: seconds since the epoch.
        undo_seconds: time for which a person may undo a vote.
        gold_every: see `Assignments`.
        practice: see `Assignments`.
        repeat_every: see `Assignments`.

    Raises:
        RuntimeError: if another server has the file open.
    """

    def __init__(
        self,
        path: str | Path,
        clock: Callable[[], float] = time.time,
        *,
        undo_seconds: float = 20.0,
        gold_every: int = 20,
        practice: int = 3,
        repeat_every: int = 25,
    ) -> None:
        self.file = AnnotationFile(path, clock)
        self.people = People(self.file)
        self.queues = Queues(self.file, undo_seconds)
        self.assignments = Assignments(
            self.queues, self.people, gold_every=gold_every, practice=practice, repeat_every=repeat_every
        )

    def close(self) -> None:
        """Close the file and free it for another server."""
        self.file.close()

    def add_person(self, name: str, role: Role = "annotator", token: str | None = None) -> tuple[Person, str]:
        """As `People.add`; pairs that had to do with fewer votes, for want of people, may get more again."""
        added = self.people.add(name, role, token)
        self.queues.refresh()
        return added

    def set_person(self, person: int, state: PersonState) -> None:
        """As `People.set_state`; pairs stop waiting for people who have left."""
        self.people.set_state(person, state)
        self.queues.refresh()

    def add_gold(self, questions: list[Gold]) -> int:
        """As `Assignments.add_gold`."""
        return self.assignments.add_gold(questions)

    def votes(self, standing: bool = True) -> list[KeptVote]:
        """All votes, oldest first.

        Args:
            standing: leave out votes that were corrected or came late.
        """
        table = "standing" if standing else "votes"
        with self.file.reading() as db:
            rows = db.execute(SELECT_VOTES.format(table=table) + " ORDER BY v.id").fetchall()
        return [KeptVote(row_vote(row), row["queue"], row["key"], row["kind"], row["gold"]) for row in rows]

    def lengths(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Words of both responses of every pair, by queue and key."""
        with self.file.reading() as db:
            rows = db.execute("SELECT q.name, i.key, i.a, i.b FROM items i JOIN queues q ON q.id = i.queue").fetchall()
        return {(name, key): (len(a.split()), len(b.split())) for name, key, a, b in rows}

    def guidelines(self) -> tuple[str, str]:
        """The guidelines in force and their hash: those of the newest queue that has some; empty if there are none."""
        for name in reversed(self.queues.names()):
            with self.file.reading() as db:
                row = db.execute("SELECT id FROM queues WHERE name = ?", (name,)).fetchone()
            text = self.queues.options(row["id"]).guidelines
            if text:
                return text, guidelines_hash(text)
        return "", ""


@contextmanager
def opened(path: str | Path) -> Iterator[AnnotationStore]:
    """A store that is closed when the block ends."""
    store = AnnotationStore(path)
    try:
        yield store
    finally:
        store.close()
