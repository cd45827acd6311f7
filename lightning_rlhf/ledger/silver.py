"""Silver pairs in the ledger: policy pairs that a preference model labeled.

They are neither comparisons nor labels of the run: no count of labels, budget, round or agreement includes them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TypeAlias

from lightning_rlhf.ledger.database import readable
from lightning_rlhf.ledger.schema import (
    INSERT_SILVER,
    SELECT_SILVER,
    decode_silver,
    find_or_add_prompt,
    schema_version,
    silver_row,
)
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.types import Comparison, Label, Prompt


SilverPair: TypeAlias = tuple[Comparison, Label | None]
"""A pair and the label of the model; None for unlabeled samples."""

UNLABELED = -1
"""The epoch under which unlabeled samples of the reference are stored."""


class SilverTable:
    """The silver pairs of a ledger.

    Args:
        store: the open ledger.
    """

    def __init__(self, store: PreferenceStore) -> None:
        self.store = store

    def add(self, epoch: int, pairs: Sequence[SilverPair]) -> None:
        """Append the pairs of an epoch in one transaction; an epoch is written once."""
        now = time.time()
        # before the transaction: a malformed pair leaves no trace
        rows = [silver_row(c, label, f"silver pair {i} of epoch {epoch}") for i, (c, label) in enumerate(pairs)]
        with self.store.writing() as db:
            prompts = [find_or_add_prompt(db, comparison.prompt) for comparison, _ in pairs]
            columns = zip(range(len(rows)), prompts, rows, strict=True)
            db.executemany(INSERT_SILVER, [(epoch, position, prompt, *row, now) for position, prompt, row in columns])

    def pairs(self, epoch: int) -> list[SilverPair]:
        """The pairs of an epoch, in order; none if it was not written."""
        with self.store.reading() as db:
            # a read-only store does not upgrade the file, and version 3 has no table of silver pairs
            rows = db.execute(SELECT_SILVER, (epoch,)).fetchall() if schema_version(db) >= 4 else []
        prompts: dict[int, Prompt] = {}
        with readable(self.store.path, f"the silver pairs of epoch {epoch}"):
            return [decode_silver(row, prompts) for row in rows]

    def count(self, before: int) -> int:
        """Number of silver pairs with a label in epochs before epoch ``before``."""
        with self.store.reading() as db:
            if schema_version(db) < 4:
                return 0
            query = "SELECT COUNT(*) FROM silver WHERE probability IS NOT NULL AND epoch < ?"
            return int(db.execute(query, (before,)).fetchone()[0])
