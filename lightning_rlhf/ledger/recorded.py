"""Recorded pairs in the ledger by the numbers of their rows, and their reference log-probabilities.

An offline run on many rows copies no pair into its ledger: a round is the digest of the rows with their numbers, and
the pairs are read from the rows again. Labels and ties of such a round are counted like bought ones.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_rlhf.ledger.database import readable
from lightning_rlhf.ledger.schema import schema_version
from lightning_rlhf.ledger.store import PreferenceStore


@dataclass(frozen=True)
class RecordedRound:
    """A round of recorded pairs.

    Args:
        digest: digest of all rows of the data, as `digest_of_rows` makes it.
        rows: number of the row of each pair, from 0, in the order of the round; int32, [pairs].
        ties: pairs of equal responses among them.
    """

    digest: str
    rows: NDArray[np.int32]
    ties: int


class RecordedTable:
    """The rounds of recorded pairs of a ledger.

    Args:
        store: the open ledger.
    """

    def __init__(self, store: PreferenceStore) -> None:
        self.store = store

    def close_round(self, round: int, recorded: RecordedRound) -> None:
        """Store a round and mark it as finished; a round that is stored already stays."""
        pairs = len(recorded.rows)
        with self.store.writing() as db:
            db.execute(
                "INSERT OR IGNORE INTO recorded VALUES (?, ?, ?, ?, ?, ?)",
                (round, recorded.digest, recorded.rows.astype("<i4").tobytes(), pairs, recorded.ties, time.time()),
            )
        # the number of the last attempt, as rounds of bought labels store it: none was made here
        info = {"prompts": pairs, "failed": {}, "upto": self.store.last_attempt(), "recorded": recorded.digest}
        self.store.close_round(round, info)

    def read(self, round: int) -> RecordedRound | None:
        """A round of recorded pairs; None where the ledger has none of this number."""
        with self.store.reading() as db:
            query = "SELECT digest, rows, ties FROM recorded WHERE round = ?"
            row = db.execute(query, (round,)).fetchone() if schema_version(db) >= 6 else None
        if row is None:
            return None
        with readable(self.store.path, f"the rows of round {round}"):
            return RecordedRound(row[0], np.frombuffer(row[1], "<i4"), row[2])

    def add_reference_logps(self, round: int, positions: NDArray[np.int32], logps: NDArray[np.float64]) -> None:
        """Append reference log-probabilities of pairs of a round, in one transaction.

        Args:
            round: the round.
            positions: places of the pairs in the round, [pairs].
            logps: log pi_ref of responses a and b, summed over tokens, nats, [pairs, 2].
        """
        row = (round, positions.astype("<i4").tobytes(), logps.astype("<f8").tobytes(), time.time())
        with self.store.writing() as db:
            db.execute("INSERT INTO reference_logps (round, positions, logps, time) VALUES (?, ?, ?, ?)", row)

    def reference_logps(self, round: int, pairs: int) -> NDArray[np.float64]:
        """Reference log-probabilities of a round of so many pairs, NaN where there are none; float64, [pairs, 2]."""
        with self.store.reading() as db:
            query = "SELECT positions, logps FROM reference_logps WHERE round = ? ORDER BY id"
            rows = db.execute(query, (round,)).fetchall() if schema_version(db) >= 6 else []
        found = np.full((pairs, 2), np.nan)
        with readable(self.store.path, f"the reference log-probabilities of round {round}"):
            for positions, logps in rows:
                found[np.frombuffer(positions, "<i4")] = np.frombuffer(logps, "<f8").reshape(-1, 2)
        return found


def check_holds_pairs(store: PreferenceStore) -> None:
    """Check that the pairs of a ledger are in it.

    Raises:
        ValueError: if it names recorded rows instead.
    """
    with store.reading() as db:
        named = schema_version(db) >= 6 and db.execute("SELECT 1 FROM recorded LIMIT 1").fetchone()
    if named:
        raise ValueError(
            f"ledger {store.path} names the recorded rows of its rounds by their numbers and holds no copies of them: "
            f"read the rows from the data of the run, or train with data.rounds.ledger_pairs=copies"
        )
