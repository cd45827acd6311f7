"""Totals of a ledger: equal to a count of its rows, also after an upgrade, and flat in the number of labels."""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from lightning_rlhf.collectors.preferences import RoundCollector
from lightning_rlhf.labelers import RecordedLabeler
from lightning_rlhf.ledger.counters import recount, summed
from lightning_rlhf.ledger.labeled import LabeledTable
from lightning_rlhf.ledger.rollouts import RolloutTable
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.randomness import Key
from lightning_rlhf.samplers import OfflineSampler
from lightning_rlhf.types import Comparison, Label, Prompt, RecordedPair, Response, Rollout


YES, NO = Response((1, 2), "yes", "eos"), Response((3,), "no", "eos")


def prompts(count: int) -> list[Prompt]:
    recorded = RecordedPair("yes", "no")
    return [Prompt(i, (1, i), f"question {i}", pair=(YES, NO), recorded=recorded) for i in range(count)]


def fill(store: PreferenceStore, seed: int = 0) -> list[int]:
    """Rounds with failures, ties, labels that come late, routed pairs and scores; returns ``upto`` of each round."""
    dice, table, marks = random.Random(seed), RolloutTable(store), []
    late: list[int] = []
    for index in range(6):
        pairs = [Comparison(p, YES, NO, passes=dice.choice([0.1, 1.0, 3.0])) for p in prompts(7)]
        ids = store.add_comparisons(index, pairs, range(7))
        # a second time, as after a restart: nothing is counted twice
        store.add_comparisons(index, pairs, range(7))
        store.add_ties(ids[:1])
        store.add_ties(ids[:1])
        store.add_labels(ids[1:3], [Label(0.7, cost=0.1), Label(None, "timeout", cost=0.3)])
        store.add_labels(ids[3:4], [Label(None, "routed", cost=0.1, meta={"p": 0.5})])
        store.add_labels([ids[3], *late], [Label(1.0, cost=0.7)] * (1 + len(late)))
        late = [ids[5]]
        table.add(index, [[Rollout(prompts(1)[0], YES, 1.0)] * 2], [0])
        table.add_scores([row[0] for row in table.rollouts(index)], [1.0, 2.0], [None, None])
        if index != 3:
            marks.append(store.last_attempt())
            store.close_round(index, {"prompts": 7, "upto": marks[-1]} if index < 5 else {})
    return marks


def answers(store: PreferenceStore) -> list[object]:
    """All totals, at every round."""
    rounds, table = range(8), RolloutTable(store)
    found: list[object] = [
        pytest.approx(store.mean_passes(), rel=1e-12),
        store.num_labels,
        store.count_ties(),
        table.count_scores(),
    ]
    found += [[store.count_labels(before) for before in rounds], [store.count_ties(before) for before in rounds]]
    found += [[table.count_scores(before) for before in rounds], store.overlap(), store.overlap(upto=9)]
    return [*found, [pytest.approx(store.cost(before), rel=1e-12) for before in rounds]]


def brute_force(store: PreferenceStore, before: int) -> tuple[int, float, int, int]:
    """Labels, cost, ties and scores before a round, by scans."""
    upto = (store.round_info(before - 1) or {}).get("upto")
    limit, value = ("l.id <= ?", upto) if upto is not None else ("c.round < ?", before)
    joined = f"FROM comparisons c JOIN attempts l ON l.comparison = c.id WHERE {limit}"
    with store.reading() as db:
        labels = db.execute(f"SELECT COUNT(*) {joined} AND l.status = 'ok'", (value,)).fetchone()[0]
        cost = db.execute(f"SELECT TOTAL(l.cost) {joined}", (value,)).fetchone()[0]
        ties = "SELECT COUNT(*) FROM ties t JOIN comparisons c ON c.id = t.comparison WHERE c.round < ?"
        scores = "SELECT COUNT(*) FROM scores s JOIN rollouts r ON r.id = s.rollout WHERE r.round < ?"
        return labels, cost, *(db.execute(query, (before,)).fetchone()[0] for query in (ties, scores))


def test_totals_are_those_of_a_scan(tmp_path: Path) -> None:
    with PreferenceStore(tmp_path / "ledger.sqlite") as store:
        assert store.count_labels(3) == store.count_ties() == store.cost(3) == 0
        fill(store)
        for before in range(8):
            table = RolloutTable(store)
            found = (store.count_labels(before), store.cost(before), store.count_ties(before))
            labels, cost, ties, scores = brute_force(store, before)
            assert (*found, table.count_scores(before)) == (labels, pytest.approx(cost, rel=1e-12), ties, scores)
        with store.reading() as db:
            mean = db.execute("SELECT AVG(passes) FROM comparisons").fetchone()[0]
            assert store.mean_passes() == pytest.approx(mean, rel=1e-12)
            # a total in the middle of a transaction of labels
            (third,) = db.execute("SELECT SUM(status = 'ok') FROM attempts WHERE id <= 3").fetchone()
        store.close_round(9, {"upto": 3})
        assert store.count_labels(10) == third


def test_an_upgraded_ledger_has_the_totals_of_one_that_counted_from_the_start(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with PreferenceStore(path) as store:
        fill(store)
        expected = answers(store)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for statement in ("TABLE counters", "TABLE running", "INDEX routed_attempts"):
            db.execute(f"DROP {statement}")
        db.execute("PRAGMA user_version = 5")
    # a reader of the earlier version scans
    with PreferenceStore(path, read_only=True) as store:
        assert answers(store) == expected
    with PreferenceStore(path) as store:
        assert answers(store) == expected
        (identity,) = store.add_comparisons(7, [Comparison(prompts(1)[0], YES, NO, passes=2.0)], [0])
        store.add_labels([identity], [Label(1.0, cost=2.0)])
        counted = answers(store)
        with store.writing() as db:
            recount(db)
        assert answers(store) == counted
        assert counted[1] == store.num_labels == brute_force(store, 99)[0]


def test_nothing_is_counted_of_a_transaction_that_failed(tmp_path: Path) -> None:
    with PreferenceStore(tmp_path / "ledger.sqlite") as store:
        marks = fill(store)
        expected = answers(store)
        (identity,) = store.label_attempts(0).keys() - set(list(store.label_attempts(0))[1:])
        with pytest.raises(ValueError, match="already has a label"):
            store.add_labels([identity], [Label(1.0, cost=5.0)])
        with pytest.raises(ValueError, match="is closed"):
            store.add_comparisons(0, [Comparison(prompts(9)[8], YES, NO)], [8])
        assert answers(store) == expected
        assert marks == sorted(marks)


def test_costs_add_up_to_the_budget() -> None:
    assert sum([0.1] * 1000) != 100
    # in parts, as transactions add them
    total = (0.0, 0.0)
    for _ in range(100):
        total = summed([0.1] * 10, total)
    assert sum(total) == 100
    assert sum(summed([1e16, 1.0, -1e16])) == 1


def test_the_work_of_a_round_does_not_grow_with_the_labels(tmp_path: Path) -> None:
    """In instructions of SQLite's machine, which do not depend on the load of the computer."""
    work: list[int] = []
    with PreferenceStore(tmp_path / "ledger.sqlite") as store:
        for size in (64, 4096):
            index = len(store.rounds())
            pairs = [Comparison(p, YES, NO) for p in prompts(size)]
            store.add_labels(store.add_comparisons(index, pairs, range(size)), [Label(0.7, cost=0.1)] * size)
            store.close_round(index, {"prompts": size, "failed": {}, "upto": store.last_attempt()})
            work.append(instructions_of_a_round(store, index + 1))
    assert work[0] > 50
    # the depth of a B-tree may grow by one
    assert work[1] < 1.25 * work[0]


def instructions_of_a_round(store: PreferenceStore, index: int) -> int:
    """Instructions, in tens, of a round of 16 pairs, of its totals, and of reading it again."""
    count = 0

    def tick() -> int:
        nonlocal count
        count += 1
        return 0

    with store.reading() as db:
        db.set_progress_handler(tick, 10)
    collector = RoundCollector(store, OfflineSampler(), RecordedLabeler(), Key((0,)))
    before = store.last_attempt()
    for _ in range(2):
        collected = collector.collect(index, prompts(16), None, 8)
        assert len(collected.preferences) == 16
        assert store.count_labels(index + 1) == store.num_labels
        assert store.cost(index + 1) >= 0
        assert store.mean_passes() >= 0
        assert store.count_ties(index + 1) == RolloutTable(store).count_scores() == 0
        # as `LedgerMemory` asks: labels that are new in the round
        store.overlap(store.last_attempt(), before)
    with store.reading() as db:
        db.set_progress_handler(None, 0)
    return count


def test_a_round_by_numbers_is_the_round_that_is_trained_on(tmp_path: Path) -> None:
    """With late labels, free ties, failures, and pairs that a budget has cut off."""
    with PreferenceStore(tmp_path / "ledger.sqlite") as store:
        fill(store)
        cut = store.add_comparisons(6, [Comparison(p, YES, Response((), "", "eos")) for p in prompts(5)], range(5))
        store.add_labels(cut, [Label(1.0)] * 5)
        store.close_round(6, {"prompts": 3, "upto": store.last_attempt()})
        collector = RoundCollector(store, OfflineSampler(), RecordedLabeler(), Key((0,)))
        table, late = LabeledTable(store), 0
        for index in store.rounds():
            expected = collector.collect(index, [], None, 8).preferences
            known = table.round(index)
            assert table.read(known.ids) == expected
            lengths = [len(c.prompt.ids) + len(c.a.ids) + len(c.b.ids) for c in (p.comparison for p in expected)]
            assert list(known.tokens) == lengths
            assert set(known.references) == {-1} and not known.is_stale(3)
            late += sum(preference.round != index for preference in expected)
        assert late == 2
        assert table.read(list(known.ids)[::-1]) == expected[::-1]
        with pytest.raises(ValueError, match=r"comparison 3 in .* has no label"):
            table.read([3])
