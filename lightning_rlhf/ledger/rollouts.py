"""Rollouts in the ledger: responses of the policy and their rewards.

A score may have cost a call of a judge, so it is on the disk when `add_scores` returns, and is never overwritten.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_rlhf.ledger.counters import count, scores_before
from lightning_rlhf.ledger.database import readable, set_value
from lightning_rlhf.ledger.schema import (
    INSERT_ROLLOUT,
    INSERT_SCORE,
    SELECT_ROLLOUTS,
    decode_rollout,
    find_or_add_prompt,
    rollout_row,
    schema_version,
    score_row,
)
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.types import Prompt, Rollout


@dataclass(frozen=True)
class ScoredParts:
    """Values of the parts of the rewards of some rollouts.

    Args:
        round: their round.
        place: number of the first of these rollouts in the round.
        values: values by the name of the part; NaN where a part does not apply.
    """

    round: int
    place: int
    values: Mapping[str, Sequence[float]]


class RolloutTable:
    """The rollouts of a ledger; rounds are closed by the store itself.

    Args:
        store: the open ledger.
    """

    def __init__(self, store: PreferenceStore) -> None:
        self.store = store

    def add(self, round: int, groups: Sequence[Sequence[Rollout]], positions: Sequence[int]) -> None:
        """Append the responses to some prompts in one transaction.

        A place of a round is written once; after a restart the stored responses stay.

        Args:
            round: round in which they were sampled, from 0.
            groups: responses to the prompt of each place, without scores.
            positions: place of each prompt in the round, from 0.

        Raises:
            ValueError: if a place holds another prompt, the round is closed, or a rollout has a score already.
        """
        if len(groups) != len(positions) or len(set(positions)) != len(positions):
            raise ValueError(f"{len(groups)} groups need as many different positions; got {list(positions)}")
        path = self.store.path
        with self.store.writing() as db:
            if db.execute("SELECT 1 FROM rounds WHERE round = ?", (round,)).fetchone():
                raise ValueError(f"round {round} of {path} is closed; add new rollouts to a later round")
            for rollouts, position in zip(groups, positions, strict=True):
                where = f"round {round}, position {position}"
                if not rollouts or any(rollout.reward is not None for rollout in rollouts):
                    raise ValueError(f"{where}: expected rollouts that are not scored yet; got {len(rollouts)}")
                prompt = find_or_add_prompt(db, rollouts[0].prompt)
                stored = db.execute(
                    "SELECT prompt FROM rollouts WHERE round = ? AND position = ?", (round, position)
                ).fetchone()
                if stored is not None and stored[0] != prompt:
                    raise ValueError(
                        f"{where} of {path} holds another prompt than prompt {rollouts[0].prompt.index}: the data, its "
                        f"order or the tokenizer changed since the run started; restore them or use another run folder"
                    )
                # after a restart a place may have been written before
                if stored is None:
                    db.executemany(
                        INSERT_ROLLOUT,
                        [
                            (round, position, sample, prompt, *rollout_row(rollout, where))
                            for sample, rollout in enumerate(rollouts)
                        ],
                    )

    def add_scores(
        self,
        ids: Sequence[int],
        rewards: Sequence[float],
        stds: Sequence[float | None],
        parts: ScoredParts | None = None,
    ) -> None:
        """Append scores, all or none; they are on the disk when this returns.

        Args:
            ids: rollouts, as numbered by `rollouts`.
            rewards: reward of each, finite.
            stds: standard deviation of each, or None.
            parts: values of the parts of these rewards, kept until the round is closed; default: there are none.

        Raises:
            ValueError: if a rollout has a score already: it would have been bought twice.
        """
        now = time.time()
        # before the transaction: a reward that is not finite leaves no trace
        rows = [score_row(*values, now) for values in zip(ids, rewards, stds, strict=True)]
        with self.store.writing() as db:
            # inside the transaction, so that all scores are added or none
            for identity in ids:
                if db.execute("SELECT 1 FROM scores WHERE rollout = ?", (identity,)).fetchone():
                    raise ValueError(
                        f"rollout {identity} in {self.store.path} already has a score: this one would be paid twice; "
                        f"ask only for rollouts whose reward is None"
                    )
            db.executemany(INSERT_SCORE, rows)
            count(db, "scores", len(rows))
            if parts is not None:
                # by place, so that a restart reads the values in the order of the round
                set_value(db, f"{_part_key(parts.round)}{parts.place:012}", parts.values)

    def parts(self, round: int) -> dict[str, list[float]]:
        """Values of the parts of the rewards of an open round, by name, in the order of the round; NaN for none."""
        key = _part_key(round)
        found: dict[str, list[float]] = {}
        with self.store.reading() as db:
            # "/" is followed by "0" in the order of characters
            query = "SELECT value FROM run WHERE key >= ? AND key < ? ORDER BY key"
            for (text,) in db.execute(query, (key, key[:-1] + "0")):
                for name, values in json.loads(text).items():
                    found.setdefault(name, []).extend(values)
        return found

    def forget_parts(self) -> None:
        """Remove the values of `parts`, of all rounds: of a closed round only their statistics are kept."""
        with self.store.writing() as db:
            db.execute("DELETE FROM run WHERE key >= 'parts/' AND key < 'parts0'")

    def rollouts(self, round: int) -> list[tuple[int, int, Rollout]]:
        """The rollouts of a round with their ids and positions, by position and sample."""
        with self.store.reading() as db:
            # a read-only store does not upgrade the file, and version 1 has no table of rollouts
            rows = db.execute(SELECT_ROLLOUTS, (round,)).fetchall() if schema_version(db) >= 2 else []
        # by row number: the responses to a prompt share one decoded prompt
        prompts: dict[int, Prompt] = {}
        with readable(self.store.path, f"round {round}"):
            return [decode_rollout(row, prompts) for row in rows]

    def positions(self, round: int) -> list[int]:
        """The places of a round that hold rollouts, ascending."""
        with self.store.reading() as db:
            query = "SELECT DISTINCT position FROM rollouts WHERE round = ? ORDER BY position"
            return [position for (position,) in db.execute(query, (round,))]

    def rounds(self) -> list[int]:
        """The rounds that hold rollouts, closed or not, ascending."""
        with self.store.reading() as db:
            if schema_version(db) < 2:  # a ledger without a table of rollouts
                return []
            return [round for (round,) in db.execute("SELECT DISTINCT round FROM rollouts ORDER BY round")]

    def count_scores(self, before: int = sys.maxsize) -> int:
        """Number of scores in rounds before round ``before``. Default: in all rounds."""
        with self.store.reading() as db:
            if schema_version(db) < 2:
                return 0
            return scores_before(db, before)


def _part_key(round: int) -> str:
    return f"parts/{round}/"
