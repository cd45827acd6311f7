"""What labelers learn of closed rounds: the same, read at once or round by round."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from lightning_rlhf.annotation.votes import Vote
from lightning_rlhf.collectors.memory import LedgerMemory
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.types import ROUTED, Comparison, Label, Prompt, Response


ROUNDS, PAIRS = 5, 4


def pair(index: int) -> Comparison:
    return Comparison(Prompt(index, (1,), "q"), Response((2,), "x", "eos"), Response((3,), "y", "eos"))


def add_round(store: PreferenceStore, number: int, earlier: Sequence[int]) -> tuple[int, list[int]]:
    """A round whose first pair is skipped, and labeled in the round behind; returns the newest attempt, and its ids."""
    ids = store.add_comparisons(number, [pair(k) for k in range(PAIRS)], list(range(PAIRS)))
    votes = [Vote(f"uid-{number}-{k}", f"person {k % 3}", "a", "ab"[(number + k) % 2]) for k in range(PAIRS)]  # type: ignore[arg-type]
    store.add_labels(ids[:1], [Label(None, "skipped")], [votes[:1]])
    store.add_labels(ids[1:2], [Label(None, ROUTED, 0.5, {"routed_probability": 0.5 + number / 100})])
    if earlier:
        again = Vote(f"uid-{number}-again", "person 0", "b", "a")
        store.add_labels(earlier[:1], [Label(1.0)], [[again]])
        store.add_late_votes(earlier[0], [Vote(f"uid-{number}-late", "person 9", "b", "b")])
    store.add_labels(ids[1:], [Label(float(k % 2)) for k in range(1, PAIRS)], [[vote] for vote in votes[1:]])
    return store.last_attempt(), ids


def test_memory_is_read_when_it_is_asked_for_and_every_label_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    labeled_votes = PreferenceStore.labeled_votes

    def counting(store: PreferenceStore, upto: int, after: int = 0) -> dict[int, tuple[tuple[int, int], Vote]]:
        found = labeled_votes(store, upto, after)
        read.append(len(found))
        return found

    monkeypatch.setattr(PreferenceStore, "labeled_votes", counting)
    kept, unread, ids, sizes = LedgerMemory(), LedgerMemory(), list[int](), list[int]()
    with PreferenceStore(tmp_path / "ledger.sqlite") as store:
        for number in range(ROUNDS):
            upto, ids = add_round(store, number, ids)
            unread.upto(store, upto)
            memory = kept.upto(store, upto)
            assert not read
            # votes of pairs with a label; the skipped pair has one, and two votes, from the round behind on
            assert len(memory.votes) == 3 + 5 * number and len(memory.overlap) == number + 1
            sizes += read
            whole = LedgerMemory().upto(store, upto)
            assert list(memory.votes) == list(whole.votes) and list(memory.overlap) == list(whole.overlap)
            read.clear()
            noted = [label.meta["routed_probability"] for label, _ in memory.overlap]
            assert noted == [0.5 + k / 100 for k in range(number + 1)]
            assert all(not vote.late for _, vote in memory.votes)
    assert sizes == [3, *[5] * (ROUNDS - 1)]
