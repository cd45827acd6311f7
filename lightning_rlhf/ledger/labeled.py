"""Labeled pairs of closed rounds, by number: a run that replays many rounds reads the pairs of a batch alone."""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_rlhf.ledger.database import readable
from lightning_rlhf.ledger.schema import IS_TIE, SELECT_PAIRS, SELECT_SIZES, decode, schema_version
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.types import Preference, Prompt


@dataclass(frozen=True)
class StoredRound:
    """The pairs that a closed round is trained on, in its order; 20 bytes each.

    Args:
        ids: numbers of the comparisons.
        tokens: token positions of each pair, its prompt counted once.
        references: version of the reference of its log-probabilities; -1 for a pair without one.
    """

    ids: array[int]
    tokens: array[int]
    references: array[int]

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.ids)

    def is_stale(self, version: int) -> bool:
        """Whether a pair has log-probabilities of another version of the reference."""
        return any(found not in (-1, version) for found in set(self.references))


class LabeledTable:
    """The labeled pairs of a ledger.

    Args:
        store: the open ledger.
    """

    def __init__(self, store: PreferenceStore) -> None:
        self.store = store

    def round(self, index: int) -> StoredRound:
        """The pairs that a closed round is trained on, late labels of earlier rounds last; no text is read."""
        info = self.store.round_info(index) or {}
        upto, places = info.get("upto"), info.get("prompts")
        newest = sys.maxsize if upto is None else upto
        # a label that arrived after the round was closed must not change it; a free tie has no attempt
        rows = [
            (id_, tokens, version)
            for id_, _, place, tokens, version, attempt, is_tie in self._sizes("c.round = ?", index)
            if (places is None or place < places) and (attempt <= newest if attempt is not None else is_tie)
        ]
        after = (self.store.round_info(index - 1) or {}).get("upto") if upto is not None else None
        if after is not None:
            late = self.store.late_ids(index, after, newest)
            found = self._sizes("c.id IN (SELECT value FROM json_each(?))", json.dumps(late)) if late else []
            rows += [(row[0], row[3], row[4]) for row in found]
        columns = list(zip(*rows, strict=True)) or [(), (), ()]
        return StoredRound(array("q", columns[0]), array("q", columns[1]), array("i", columns[2]))

    def read(self, ids: Sequence[int]) -> list[Preference]:
        """The pairs with these numbers, in this order, with their labels.

        Raises:
            ValueError: if one has no label.
        """
        with self.store.reading() as db:
            tie = IS_TIE if schema_version(db) >= 3 else "0"
            rows = db.execute(SELECT_PAIRS.format(tie=tie), (json.dumps(list(ids)),)).fetchall()
        prompts: dict[int, Prompt] = {}
        found: dict[int, Preference] = {}
        with readable(self.store.path, "the table of comparisons"):
            # the first column is the round here
            for round, identity, comparison, label in (decode(row, prompts) for row in rows):
                if label is not None:
                    found[identity] = Preference(comparison, label, round)
        missing = [identity for identity in ids if identity not in found]
        if missing:
            raise ValueError(
                f"comparison {missing[0]} in {self.store.path} has no label; restore the ledger of the run"
            )
        return [found[identity] for identity in ids]

    def _sizes(self, where: str, value: int | str) -> list[tuple[int, int, int, int, int, int | None, int]]:
        """Number, round, position, tokens, version of the reference, attempt and tie of pairs, in order."""
        with self.store.reading() as db:
            tie = IS_TIE if schema_version(db) >= 3 else "0"
            return db.execute(SELECT_SIZES.format(tie=tie, where=where), (value,)).fetchall()
