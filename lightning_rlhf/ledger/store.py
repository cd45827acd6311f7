"""The ledger of a run: its prompts, comparisons, labels, rounds and costs, in one SQLite file.

It stands between the labeler and the collator. Labels cost money, so a label is on the disk when `add_labels` returns,
whatever happens next (``kill -9``, power loss), and none is bought twice. Reading gives exactly the values that were
written. The store depends neither on Lightning nor on a model.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from lightning_rlhf.annotation.votes import Vote
from lightning_rlhf.ledger.counters import (
    cost_before,
    count,
    labels_before,
    mean_passes,
    note_attempts,
    recorded,
    ties_before,
)
from lightning_rlhf.ledger.database import (
    check_is_ledger,
    connect,
    explained,
    get_value,
    prepare_for_writing,
    readable,
    set_value,
    take_lease,
)
from lightning_rlhf.ledger.people import insert_guidelines, insert_votes, select_labeled_votes, select_votes
from lightning_rlhf.ledger.schema import (
    INSERT_ATTEMPT,
    INSERT_COMPARISON,
    IS_TIE,
    PROMPT_COLUMNS,
    SELECT_COMPARISONS,
    Cell,
    attempt_row,
    comparison_row,
    decode,
    find_or_add_prompt,
    schema_version,
    to_prompt,
)
from lightning_rlhf.runtime.fingerprint import Settings, differences
from lightning_rlhf.types import ROUTED, Comparison, Label, Preference, Prompt


PAGE = 1024  # rows that `PreferenceStore.preferences` holds in memory at once


class PreferenceStore:
    """The durable ledger of one training run.

    One process writes; any number may read at the same time, with ``read_only=True``. Threads may share a store; a
    forked process must open its own. The write lock is the file ``<path>.lock``; the system frees it when the writer
    ends, also on ``kill -9``. While a writer runs, recent rows are in ``<path>-wal``: copy the ledger after `close`.

    Args:
        path: the SQLite file; created with its folder if absent.
        read_only: open an existing ledger without the right to write.

    Raises:
        ValueError: if the file is not a ledger, or was written by a newer version.
        RuntimeError: if another process is writing it.
        OSError: if the file or its folder cannot be opened or written.
    """

    def __init__(self, path: str | Path, *, read_only: bool = False) -> None:
        self.path = Path(path)
        self.read_only = read_only
        # re-entrant: `snapshot` holds it while the same thread reads
        self._mutex = threading.RLock()
        self._pid = os.getpid()
        self._lease: sqlite3.Connection | None = None
        self._connection: sqlite3.Connection | None = None
        with explained(self.path):
            self._connection = connect(self.path, read_only)
            try:
                # before the lock, so that a file of another program gets no .lock beside it
                is_ledger = check_is_ledger(self._connection, self.path)
                if not read_only:
                    self._lease = take_lease(self._connection, self.path)
                    prepare_for_writing(self._connection, self.path)
                elif not is_ledger:
                    raise ValueError(f"{self.path} is empty, not a ledger; pass the ledger of a run that has started")
                self.run_id: str = get_value(self._connection, "run_id")
            except BaseException:
                # also on KeyboardInterrupt: the right to write must not stay taken
                self.close()
                raise

    def close(self) -> None:
        """Close the file and give up the right to write; harmless when already closed."""
        if self._pid != os.getpid():
            return  # a forked child must not touch the connections of its parent
        with self._mutex:
            # the lease last: the next writer begins when this one has closed the file
            for connection in (self._connection, self._lease):
                if connection is not None:
                    connection.close()
            self._connection = self._lease = None

    def __enter__(self) -> PreferenceStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The open file, for tables of this package; one thread at a time."""
        if self._pid != os.getpid():  # before the mutex, which another thread may have held when we were forked
            raise RuntimeError(
                f"ledger {self.path} was opened by process {self._pid}, and this is its fork {os.getpid()}; "
                f"open it here with PreferenceStore(path, read_only=True)"
            )
        with self._mutex, explained(self.path):
            if self._connection is None:
                raise ValueError(f"ledger {self.path} is closed; open it again with PreferenceStore(path)")
            yield self._connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction, on the disk when the block ends; nothing of it is kept if the block raises."""
        with self.reading() as db:
            if self.read_only:
                raise RuntimeError(f"ledger {self.path} was opened with read_only=True; open it without to write")
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:  # SQLite has already rolled back when the disk is full
                    db.execute("ROLLBACK")
                raise

    # -- the run ------------------------------------------------------------------------------------------------------

    def value(self, key: str) -> Any:
        """The JSON value that the run stored under a key; None if there is none."""
        with self.reading() as db:
            return get_value(db, key)

    def set_values(self, values: Mapping[str, object]) -> None:
        """Store JSON values by key, in one transaction, in place of earlier ones."""
        with self.writing() as db:
            for key, value in values.items():
                set_value(db, key, value)

    def fingerprint(self) -> Settings | None:
        """The stored settings that determine the samples; None if never set."""
        with self.reading() as db:
            stored: Settings | None = get_value(db, "fingerprint")
        return stored

    def set_fingerprint(self, d: Mapping[str, object]) -> None:
        """Store the settings that determine the samples, plain JSON, in place of earlier ones."""
        with self.writing() as db:
            set_value(db, "fingerprint", dict(d))

    def check_fingerprint(self, d: Mapping[str, object]) -> None:
        """Store the settings of a new run; in a continued run, check that they are still the same.

        Raises:
            ValueError: naming every setting that differs, with both values.
        """
        stored = self.fingerprint()
        if stored is None:
            self.set_fingerprint(d)
            return
        # JSON turns tuples into lists, as in the stored settings
        lines = differences(stored, json.loads(json.dumps(dict(d))), "in the ledger")
        if lines:
            raise ValueError(
                f"the settings differ from those that the run in {self.path} was started with:\n"
                + "\n".join(lines)
                + f"\nGo back to the old settings, use another run folder, or delete {self.path} to start over."
            )

    # -- comparisons and labels ---------------------------------------------------------------------------------------

    def add_comparisons(self, round: int, comparisons: Sequence[Comparison], positions: Sequence[int]) -> list[int]:
        """Append comparisons in one transaction and return their ids, in order.

        A place of a round is written once. If it holds a comparison already, as after a restart, that comparison
        stays and its id is returned: label the pairs that `comparisons` returns, not those that were sampled again.

        Args:
            round: round in which they were sampled, from 0.
            comparisons: the pairs.
            positions: place of each pair in the round, from 0; a prompt may occur at several places.

        Raises:
            ValueError: if a place holds another prompt, or the round is closed.
        """
        if len(comparisons) != len(positions) or len(set(positions)) != len(positions):
            raise ValueError(
                f"{len(comparisons)} comparisons need as many different positions; got {len(positions)} positions, "
                f"{len(set(positions))} of them different"
            )
        if not comparisons:
            return []
        if min(positions) < 0:
            raise ValueError(f"positions count from 0; got {min(positions)}")
        # before the transaction: a malformed comparison leaves no trace
        rows = [comparison_row(c, f"round {round}, position {p}") for c, p in zip(comparisons, positions, strict=True)]
        with self.writing() as db:
            prompts = [find_or_add_prompt(db, c.prompt) for c in comparisons]
            stored = {
                position: (identity, prompt)
                for position, identity, prompt in db.execute(
                    "SELECT position, id, prompt FROM comparisons WHERE round = ? AND position BETWEEN ? AND ?",
                    (round, min(positions), max(positions)),
                )
            }
            # no other process writes, so that ids can be counted on
            fresh = db.execute("SELECT COALESCE(MAX(id), 0) + 1 FROM comparisons").fetchone()[0]
            ids: list[int] = []
            inserts: list[tuple[Cell, ...]] = []
            for comparison, position, prompt, row in zip(comparisons, positions, prompts, rows, strict=True):
                identity, stored_prompt = stored.get(position, (fresh + len(inserts), prompt))
                if stored_prompt != prompt:
                    raise ValueError(
                        f"round {round}, position {position} of {self.path} holds another prompt than prompt "
                        f"{comparison.prompt.index}: the data, its order or the tokenizer changed since the run "
                        f"started; restore them or use another run folder"
                    )
                ids.append(identity)
                if position not in stored:
                    inserts.append((identity, round, position, prompt, *row))
            # a closed round refuses new pairs only: stored ones may come again after a restart
            if inserts and db.execute("SELECT 1 FROM rounds WHERE round = ?", (round,)).fetchone():
                raise ValueError(f"round {round} of {self.path} is closed; add new comparisons to a later round")
            db.executemany(INSERT_COMPARISON, inserts)
            new = [c for c, position in zip(comparisons, positions, strict=True) if position not in stored]
            count(db, "passes", len(new), [float(comparison.passes) for comparison in new])
        return ids

    def add_labels(
        self,
        ids: Sequence[int],
        labels: Sequence[Label],
        votes: Sequence[Sequence[Vote]] | None = None,
        guidelines: Mapping[str, str] | None = None,
    ) -> None:
        """Append label attempts, failed ones too; they are on the disk when this returns.

        The attempt with status ``"ok"`` is the label of its comparison. All are stored, or on an error none.

        Args:
            ids: comparisons, as numbered by `add_comparisons`.
            labels: one per comparison, in order.
            votes: votes of people behind each label, in order; stored once each, by their uid.
            guidelines: texts of guidelines by the hash that votes name.

        Raises:
            ValueError: if a comparison is unknown or already has a label: it would have been bought twice.
        """
        if len(ids) != len(labels):
            raise ValueError(f"got {len(labels)} labels for {len(ids)} comparisons; pass one per comparison, in order")
        now = time.time()
        # before the transaction: a malformed label leaves no trace
        rows = [attempt_row(identity, label, now) for identity, label in zip(ids, labels, strict=True)]
        with self.writing() as db:
            for identity, label, row in zip(ids, labels, rows, strict=True):
                known = db.execute(
                    f"SELECT EXISTS (SELECT 1 FROM attempts WHERE comparison = c.id AND status = 'ok') OR {IS_TIE} "
                    "FROM comparisons c WHERE c.id = ?",
                    (identity,),
                ).fetchone()
                if known is None:
                    raise ValueError(f"no comparison {identity} in {self.path}; pass ids that add_comparisons returned")
                if label.status == "ok" and known[0]:
                    raise ValueError(
                        f"comparison {identity} in {self.path} already has a label: this one would be paid twice; "
                        f"ask only for comparisons whose label is None"
                    )
                db.execute(INSERT_ATTEMPT, row)
            # in the same transaction: no label without its votes
            for identity, given in zip(ids, votes or [], strict=votes is not None):
                insert_votes(db, identity, given)
            for name, text in (guidelines or {}).items():
                insert_guidelines(db, name, text)
            # in the same transaction, so that totals and attempts always agree
            db.execute(
                "UPDATE totals SET attempts = attempts + ?, labels = labels + ?, cost = cost + ?",
                (len(rows), sum(x.status == "ok" for x in labels), sum(x.cost for x in labels)),
            )
            note_attempts(db)

    def add_late_votes(self, comparison: int, votes: Sequence[Vote]) -> None:
        """Keep votes that came after the label of a comparison, marked as late; those that are there stay."""
        with self.writing() as db:
            insert_votes(db, comparison, [replace(vote, late=True) for vote in votes])

    def add_ties(self, ids: Sequence[int]) -> None:
        """Record that comparisons have equal responses: they read back as ties that cost nothing and were not bought.

        They count neither as labels nor as attempts; one that is recorded already stays.

        Args:
            ids: comparisons without a label, as numbered by `add_comparisons`.

        Raises:
            ValueError: if a comparison is unknown or has a label.
        """
        now = time.time()
        with self.writing() as db:
            for identity in ids:
                known = db.execute(
                    "SELECT EXISTS (SELECT 1 FROM attempts WHERE comparison = c.id AND status = 'ok') "
                    "FROM comparisons c WHERE c.id = ?",
                    (identity,),
                ).fetchone()
                if known is None or known[0]:
                    problem = "no comparison" if known is None else "a label for comparison"
                    raise ValueError(
                        f"{problem} {identity} in {self.path}; pass ids of comparisons whose label is None"
                    )
            # the number of rows that were not there
            new = db.executemany("INSERT OR IGNORE INTO ties VALUES (?, ?)", [(identity, now) for identity in ids])
            count(db, "ties", max(new.rowcount, 0))

    def count_ties(self, before: int | None = None) -> int:
        """Number of pairs of equal responses, in rounds before round ``before`` or in all."""
        with self.reading() as db:
            if schema_version(db) < 3:
                return 0
            return ties_before(db, sys.maxsize if before is None else before)

    def prompts(self) -> Iterator[Prompt]:
        """The prompts of all comparisons and rollouts, each once, in arbitrary order."""
        with self.reading() as db:
            # all rows at once: a suspended generator must not hold the mutex
            rows = db.execute(f"SELECT {', '.join(PROMPT_COLUMNS)} FROM prompts").fetchall()
        with readable(self.path, "the table of prompts"):
            yield from map(to_prompt, rows)

    def has_samples(self) -> bool:
        """Whether the ledger holds a comparison or a rollout."""
        with self.reading() as db:
            version = schema_version(db)
            # with the version of the schema that added the table
            tables = {"comparisons": 1, "rollouts": 2, "recorded": 6}
            there = [table for table, since in tables.items() if since <= version]
            return any(db.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone() for table in there)

    def comparisons(self, round: int) -> list[tuple[int, Comparison, Label | None]]:
        """The comparisons of a round in order of position, each with its id and its label, None if it has none yet."""
        # positions > -1, and LIMIT -1 is no limit
        return [row[1:] for row in self._page(round, -1, -1)]

    def positions(self, round: int) -> list[int]:
        """The places of a round that hold a comparison, ascending."""
        with self.reading() as db:
            rows = db.execute("SELECT position FROM comparisons WHERE round = ? ORDER BY position", (round,)).fetchall()
        return [position for (position,) in rows]

    def attempts(self, round: int) -> dict[int, int]:
        """How often each comparison of a round was shown to the labeler, by id; those never shown are left out.

        A pair that waits for a second labeler counts when that one has answered.
        """
        with self.reading() as db:
            rows = db.execute(
                "SELECT c.id, COUNT(*) FROM comparisons c JOIN attempts t ON t.comparison = c.id "
                "WHERE c.round = ? AND t.status <> ? GROUP BY c.id",
                (round, ROUTED),
            ).fetchall()
        return dict(rows)

    def history(self, comparison: int) -> list[Label]:
        """Every label attempt of a comparison, given by its id, failed ones too, oldest first."""
        with self.reading() as db:
            rows = db.execute(
                "SELECT probability, status, cost, meta FROM attempts WHERE comparison = ? ORDER BY id", (comparison,)
            ).fetchall()
        return [Label(probability, status, cost, json.loads(meta)) for probability, status, cost, meta in rows]

    def faults(self, round: int) -> list[str]:
        """Reasons that the labeler noted for the last attempts of a round that failed, one per comparison."""
        attempts = (self.history(id_) for id_, _, label in self.comparisons(round) if label is None)
        last = (labels[-1] for labels in attempts if labels)
        return [str(label.meta["fault"]) for label in last if "fault" in label.meta]

    def failed(self, round: int) -> dict[str, int]:
        """Count the comparisons of a round that were tried and have no label, by the status of the last attempt.

        Pairs that wait for a second labeler are left out.
        """
        with self.reading() as db:
            rows = db.execute(
                "SELECT last.status, COUNT(*) FROM comparisons c "
                "JOIN attempts last ON last.id = "
                "(SELECT MAX(id) FROM attempts WHERE comparison = c.id AND status <> ?) "
                "WHERE c.round = ? AND NOT EXISTS (SELECT 1 FROM attempts WHERE comparison = c.id AND status = 'ok') "
                f"AND NOT {self._is_tie(db)} GROUP BY last.status ORDER BY last.status",
                (ROUTED, round),
            ).fetchall()
        return dict(rows)

    def preferences(self, rounds: Iterable[int] | None = None) -> Iterator[Preference]:
        """Yield the labeled comparisons, round by round and in order of position; memory stays small.

        Args:
            rounds: the rounds, in this order. Default: all, closed or not.
        """
        for round, _, comparison, label in self.walk(rounds):
            if label is not None:
                yield Preference(comparison, label, round)

    def walk(self, rounds: Iterable[int] | None = None) -> Iterator[tuple[int, int, Comparison, Label | None]]:
        """Yield round, position, comparison and label (None if it has none yet), in the order of `preferences`."""
        if rounds is None:
            with self.reading() as db:
                rounds = [r for (r,) in db.execute("SELECT DISTINCT round FROM comparisons ORDER BY round").fetchall()]
        for round in rounds:
            # pages of rows, so that a large ledger does not fill the memory
            position = -1
            # the inner loop leaves position at the last row of the page, behind which the next page begins
            while page := self._page(round, position, PAGE):
                for position, _, comparison, label in page:
                    yield round, position, comparison, label

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Read one state of the ledger until the block ends, even if its writer adds rows; for read-only stores."""
        if not self.read_only:
            raise RuntimeError(f"ledger {self.path} is open for writing; take snapshots with read_only=True")
        with self.reading() as db:
            # a deferred transaction: the first read fixes the state
            db.execute("BEGIN")
            try:
                yield
            finally:
                db.execute("ROLLBACK")

    def _page(self, round: int, after: int, limit: int) -> list[tuple[int, int, Comparison, Label | None]]:
        with self.reading() as db:
            rows = db.execute(SELECT_COMPARISONS.format(tie=self._is_tie(db)), (round, after, limit)).fetchall()
        prompts: dict[int, Prompt] = {}
        with readable(self.path, f"round {round}"):
            return [decode(row, prompts) for row in rows]

    @staticmethod
    def _is_tie(db: sqlite3.Connection) -> str:
        return IS_TIE if schema_version(db) >= 3 else "0"

    # -- rounds and totals --------------------------------------------------------------------------------------------

    def close_round(self, round: int, info: Mapping[str, object]) -> None:
        """Mark a round as finished; from then on it takes no new comparisons.

        Args:
            round: the round, from 0.
            info: facts about the round to store; plain JSON.

        Raises:
            ValueError: if it was closed before with other ``info``.
        """
        text = json.dumps(dict(info))
        with self.writing() as db:
            stored = db.execute("SELECT info FROM rounds WHERE round = ?", (round,)).fetchone()
            if stored is None:
                db.execute("INSERT INTO rounds VALUES (?, ?, ?)", (round, text, time.time()))
            # as values: the order of the keys does not count
            elif json.loads(stored[0]) != json.loads(text):
                raise ValueError(f"round {round} of {self.path} was closed before with {stored[0]}; got {text}")

    def round_info(self, round: int) -> Settings | None:
        """The ``info`` of `close_round`; None if the round is not closed."""
        with self.reading() as db:
            stored = db.execute("SELECT info FROM rounds WHERE round = ?", (round,)).fetchone()
        return None if stored is None else json.loads(stored[0])

    def rounds(self) -> list[int]:
        """The closed rounds, ascending."""
        with self.reading() as db:
            return [r for (r,) in db.execute("SELECT round FROM rounds ORDER BY round")]

    def count_labels(self, before: int) -> int:
        """Number of labels with status ``"ok"`` that rounds before round ``before`` were trained on.

        Labels that arrived after their round was closed count from the next round on.
        """
        upto = (self.round_info(before - 1) or {}).get("upto")
        with self.reading() as db:
            return labels_before(db, before, upto)

    def cost(self, before: int) -> float:
        """Cost of the attempts that were made before round ``before`` began, failed ones too."""
        upto = (self.round_info(before - 1) or {}).get("upto")
        with self.reading() as db:
            return cost_before(db, before, upto)

    def sources(self) -> dict[str, tuple[int, int, float]]:
        """Labels, attempts and their cost by the ``source`` that labelers note in ``meta``; empty if none does."""
        with self.reading() as db:
            rows = db.execute(
                "SELECT json_extract(meta, '$.source') AS source, SUM(status = 'ok'), COUNT(*), TOTAL(cost) "
                "FROM attempts GROUP BY source HAVING source IS NOT NULL ORDER BY source"
            ).fetchall()
        return {str(source): (labels, attempts, cost) for source, labels, attempts, cost in rows}

    def overlap(self, upto: int | None = None, after: int = 0) -> list[tuple[Label, Label]]:
        """Pairs that two labelers judged: the answer with status ``"routed"`` and the label, by number of the label.

        Args:
            upto: number of the newest attempt that counts, as `last_attempt` gives it; default: all.
            after: labels are attempts behind this one.
        """
        with self.reading() as db:
            rows = db.execute(
                # from the labels behind `after`, which are few; CROSS JOIN keeps this order
                "SELECT r.cost, r.meta, l.probability, l.cost, l.meta FROM attempts l CROSS JOIN attempts r ON r.id = "
                "(SELECT MAX(id) FROM attempts WHERE comparison = l.comparison AND status = 'routed') "
                "WHERE l.id > ? AND l.id <= ? AND l.status = 'ok' ORDER BY l.id",
                (after, sys.maxsize if upto is None else upto),
            ).fetchall()
        return [
            (Label(None, ROUTED, first, json.loads(noted)), Label(probability, "ok", cost, json.loads(meta)))
            for first, noted, probability, cost, meta in rows
        ]

    def last_attempt(self) -> int:
        """Number of the newest label attempt; 0 if there is none. Rounds store it when they are closed."""
        with self.reading() as db:
            return int(db.execute("SELECT COALESCE(MAX(id), 0) FROM attempts").fetchone()[0])

    def label_attempts(self, round: int) -> dict[int, int]:
        """Number of the attempt that gave each labeled comparison of a round its label, by id."""
        with self.reading() as db:
            rows = db.execute(
                "SELECT c.id, l.id FROM comparisons c JOIN attempts l ON l.comparison = c.id AND l.status = 'ok' "
                "WHERE c.round = ?",
                (round,),
            ).fetchall()
        return dict(rows)

    def late_ids(self, before: int, after: int, upto: int) -> list[int]:
        """Comparisons of rounds before round ``before`` whose labels are attempts in (after, upto].

        The labels arrived when their own round was closed, and belong to the round that was open then.
        """
        with self.reading() as db:
            rows = db.execute(
                # by the numbers of the attempts, which are few: CROSS JOIN keeps this order
                "SELECT c.id FROM attempts l CROSS JOIN comparisons c ON c.id = l.comparison "
                "WHERE l.status = 'ok' AND l.id > ? AND l.id <= ? AND c.round < ? ORDER BY c.round, c.position",
                (after, upto, before),
            ).fetchall()
        return [identity for (identity,) in rows]

    def votes(self, rounds: Sequence[int] | None = None) -> list[tuple[int, int, Vote]]:
        """Votes of people with the round and position of their comparison, oldest first.

        Args:
            rounds: the rounds; default: all.
        """
        with self.reading() as db:
            return select_votes(db, rounds) if schema_version(db) >= 5 else []

    def labeled_votes(self, upto: int, after: int = 0) -> dict[int, tuple[tuple[int, int], Vote]]:
        """Votes on pairs whose labels are attempts in (after, upto], with round and position, by their number.

        Votes that came after the label of their pair are not among them.
        """
        with self.reading() as db:
            return select_labeled_votes(db, upto, after) if schema_version(db) >= 5 else {}

    def mean_passes(self) -> float:
        """Mean of `Comparison.passes` over all comparisons; NaN if there are none."""
        with self.reading() as db:
            mean = mean_passes(db)
        return math.nan if mean is None else mean

    @property
    def num_labels(self) -> int:
        """Number of labels with status ``"ok"``."""
        with self.reading() as db:
            return int(self._total("labels")) + recorded(db, "pairs - ties")

    @property
    def num_attempts(self) -> int:
        """Number of label attempts, failed ones included."""
        return int(self._total("attempts"))

    @property
    def total_cost(self) -> float:
        """Cost of all attempts, in the labeler's unit."""
        return self._total("cost")

    def _total(self, column: str) -> float:
        with self.reading() as db:
            return float(db.execute(f"SELECT {column} FROM totals").fetchone()[0])
