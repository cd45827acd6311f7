"""The queue of pairs without a server: leases, overlap, undo, skips, gold questions, repeats, restarts."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from lightning_rlhf.annotation.assignments import Gold
from lightning_rlhf.annotation.people import Person
from lightning_rlhf.annotation.queues import Item, QueueOptions
from lightning_rlhf.annotation.store import AnnotationStore
from lightning_rlhf.annotation.votes import Ballot, coin, first_shown, item_key, read_ballot, vote_of


UIDS = count()
ONE_VOTE = QueueOptions(overlap=0.0)


class Clock:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[AnnotationStore]:
    store = AnnotationStore(tmp_path / "annotation.sqlite", clock)
    yield store
    store.close()


def pair(key: str) -> Item:
    return Item(key, ({"role": "user", "content": f"question {key}"},), f"first {key}", f"second {key}")


def ballot(pair: str, side: str = "left", **extra: object) -> Ballot:
    reason = {"reason": "cannot_judge"} if side == "skip" else {}
    return read_ballot({"id": pair, "uid": f"uid-{next(UIDS):08d}", "side": side, **reason, **extra})


def judge(store: AnnotationStore, person: Person, side: str = "left", **extra: object) -> str | None:
    """Vote on the next pair; returns its id, None if there is none."""
    shown = store.assignments.next_pair(person)
    if shown is None:
        return None
    store.assignments.vote(person, ballot(shown.id, side, **extra))
    return shown.id


def test_a_pair_comes_back_with_the_verdict_in_sides_of_the_comparison(store: AnnotationStore, clock: Clock) -> None:
    ann, _ = store.add_person("ann")
    keys = [f"k{number}" for number in range(12)]
    assert store.queues.push("run", [pair(key) for key in keys], ONE_VOTE) == 12
    seen = {}
    while (shown := store.assignments.next_pair(ann)) is not None:
        # the person prefers the text "first ..." wherever it stands
        side = "left" if shown.left.startswith("first") else "right"
        seen[shown.prompt[0]["content"]] = side
        store.assignments.vote(ann, ballot(shown.id, side, flags=["unsafe_left"], strength=3))
    clock.now += 100
    cursor, results = store.queues.results("run")
    assert {result.key for result in results} == set(keys)
    assert {vote.verdict for result in results for vote in result.votes} == {"a"}
    assert set(seen.values()) == {"left", "right"}, "both orders occur"
    for result in results:
        (vote,) = result.votes
        assert vote.flags == (f"unsafe_{vote.first}",)
        assert (vote.signed, vote.value) == (3, 1.0)
    assert store.queues.results("run", cursor) == (cursor, [])


def test_pushing_again_adds_nothing_and_other_texts_are_refused(store: AnnotationStore) -> None:
    assert store.queues.push("run", [pair("k")]) == 1
    assert store.queues.push("run", [pair("k")]) == 0
    with pytest.raises(ValueError, match="another text"):
        store.queues.push("run", [replace(pair("k"), a="changed")])
    assert store.queues.push("other", [pair("k")]) == 1, "a key belongs to its queue"


def test_a_ballot_that_arrives_twice_counts_once(store: AnnotationStore) -> None:
    ann, _ = store.add_person("ann")
    store.queues.push("run", [pair("k")], ONE_VOTE)
    shown = store.assignments.next_pair(ann)
    assert shown is not None
    first = ballot(shown.id)
    assert store.assignments.vote(ann, first).kept == "kept"
    assert store.assignments.vote(ann, first).kept == "again"
    assert len(store.votes(standing=False)) == 1


def test_leases_keep_people_apart_and_expire(store: AnnotationStore, clock: Clock) -> None:
    ann, bob = store.add_person("ann")[0], store.add_person("bob")[0]
    store.queues.push("run", [pair("k1"), pair("k2")], ONE_VOTE)
    held = store.assignments.next_pair(ann)
    assert held == store.assignments.next_pair(ann), "asking again gives the same pair"
    judge(store, bob)
    assert judge(store, bob) is None, "the other pair is held by ann"
    clock.now += 599
    assert held is not None and store.assignments.beat(ann, held.id)
    clock.now += 599
    assert judge(store, bob) is None, "the lease was renewed"
    clock.now += 2
    assert judge(store, bob) == held.id
    assert not store.assignments.beat(ann, held.id)
    clock.now += 60
    store.queues.finalize()
    assert store.assignments.vote(ann, ballot(held.id)).kept == "late"
    assert len(store.votes()) == 2 and len(store.votes(standing=False)) == 3


def test_undo_corrects_until_final_and_is_late_afterwards(store: AnnotationStore, clock: Clock) -> None:
    ann, _ = store.add_person("ann")
    store.queues.push("run", [pair("k")], ONE_VOTE)
    public = judge(store, ann, "left", rationale="clear", strength=2)
    assert public is not None
    last = store.assignments.last(ann)
    assert last is not None
    assert (last.id, last.side, last.strength, last.rationale) == (public, "left", 2, "clear")
    assert store.queues.results("run")[1] == [], "not final while it can be undone"
    assert store.assignments.vote(ann, ballot(public, "right")).kept == "kept"
    clock.now += 21
    (result,) = store.queues.results("run")[1]
    (vote,) = result.votes
    assert vote.verdict == ("b" if vote.first == "a" else "a") and vote.supersedes
    assert store.assignments.vote(ann, ballot(public, "tie")).kept == "late"
    assert store.queues.results("run")[1] == [result]


def test_a_vote_is_final_after_three_later_ones(store: AnnotationStore) -> None:
    ann, _ = store.add_person("ann")
    store.queues.push("run", [pair(f"k{number}") for number in range(5)], ONE_VOTE)
    for expected in (0, 0, 0, 1, 2):
        judge(store, ann)
        assert len(store.queues.results("run")[1]) == expected


def test_overlap_conflicts_and_lone_people(store: AnnotationStore, clock: Clock) -> None:
    people = [store.add_person(name)[0] for name in ("ann", "bob", "eve", "joe")]
    store.queues.push("run", [pair("k")], QueueOptions(votes=2, max_votes=3, overlap=0.0))
    left = {"ann": "first", "bob": "second", "eve": "first"}
    for person in people[:2]:
        shown = store.assignments.next_pair(person)
        assert shown is not None
        side = "left" if shown.left.startswith(left[person.name]) else "right"
        store.assignments.vote(person, ballot(shown.id, side))
    clock.now += 60
    assert store.queues.results("run")[1] == [], "two people contradict each other: a third is asked"
    assert judge(store, people[2]) is not None
    assert judge(store, people[3]) is None
    clock.now += 60
    assert len(store.queues.results("run")[1][0].votes) == 3


def test_a_lone_person_finishes_a_queue_that_wants_three_votes(store: AnnotationStore, clock: Clock) -> None:
    ann, bob = store.add_person("ann")[0], store.add_person("bob")[0]
    store.queues.push("run", [pair(f"k{number}") for number in range(4)], QueueOptions(votes=3, overlap=1.0))
    store.set_person(bob.id, "removed")
    while judge(store, ann):
        pass
    clock.now += 60
    assert len(store.queues.results("run")[1]) == 4


def test_overlap_share_is_chosen_by_hash(store: AnnotationStore) -> None:
    for name in ("ann", "bob", "eve"):
        store.add_person(name)
    store.queues.push("run", [pair(f"k{number}") for number in range(400)], QueueOptions(overlap=0.25))
    with store.file.reading() as db:
        wanted = [row[0] for row in db.execute("SELECT wanted FROM items")]
    assert set(wanted) == {1, 3}
    assert 0.18 < wanted.count(3) / 400 < 0.32


def test_skips(store: AnnotationStore, clock: Clock) -> None:
    ann, bob = store.add_person("ann")[0], store.add_person("bob")[0]
    store.queues.push("run", [pair("k")], ONE_VOTE)
    judge(store, ann, "skip")
    assert judge(store, ann) is None, "who skipped a pair does not get it again"
    clock.now += 60
    assert store.queues.results("run")[1] == []
    judge(store, bob, "skip")
    clock.now += 60
    (result,) = store.queues.results("run")[1]
    assert result.state == "skipped" and [vote.verdict for vote in result.votes] == ["skip", "skip"]


def test_withdrawn_pairs_are_shown_to_nobody(store: AnnotationStore) -> None:
    ann, _ = store.add_person("ann")
    store.queues.push("run", [pair("k1"), pair("k2")], ONE_VOTE)
    assert store.queues.withdraw("run", ["k1", "unknown"]) == 1
    assert judge(store, ann) is not None
    assert judge(store, ann) is None
    assert store.queues.progress("run").total == 1


def test_gold_questions_teach_first_and_pause_later(store: AnnotationStore) -> None:
    ann, _ = store.add_person("ann")
    gold = [Gold(({"role": "user", "content": f"g{n}"},), "right", f"wrong {n}", "because") for n in range(40)]
    assert store.add_gold(gold) == 40 and store.add_gold(gold) == 0
    store.queues.push("run", [pair(f"k{number}") for number in range(300)], ONE_VOTE)
    answers, served = [], []
    while (shown := store.assignments.next_pair(ann)) is not None and len(served) < 300:
        is_gold = shown.prompt[0]["content"].startswith("g")
        served.append(is_gold)
        side = "left" if is_gold and shown.left.startswith("wrong") else "right"
        receipt = store.assignments.vote(ann, ballot(shown.id, side))
        if is_gold:
            answers.append(receipt)
    assert served[:3] == [True] * 3
    assert [receipt.right for receipt in answers[:4]] == [False, False, False, None]
    assert answers[0].explanation == "because"
    assert len(answers) == 10, "ten wrong answers pause a person"
    assert store.people.all()[0].state == "paused"
    assert sum(served[3:]) / len(served[3:]) == pytest.approx(1 / 20, abs=0.02)
    keys = {result.key for result in store.queues.results("run")[1]}
    assert all(key.startswith("k") for key in keys), "gold never becomes a label"
    with pytest.raises(ValueError, match="pair of a queue"):
        store.add_gold([Gold((), "first k1", "second k1")])


def test_repeats_swap_the_sides_of_an_own_earlier_pair(store: AnnotationStore) -> None:
    ann, _ = store.add_person("ann")
    store.queues.push("run", [pair(f"k{number}") for number in range(60)], ONE_VOTE)
    lefts: dict[str, list[str]] = {}
    order = []
    while (shown := store.assignments.next_pair(ann)) is not None:
        question = shown.prompt[0]["content"]
        lefts.setdefault(question, []).append(shown.left)
        order.append(question)
        store.assignments.vote(ann, ballot(shown.id))
    twice = {question: texts for question, texts in lefts.items() if len(texts) > 1}
    assert len(twice) == 2
    for question, texts in twice.items():
        assert len(set(texts)) == 2, "the sides are swapped"
        first = order.index(question)
        assert order.index(question, first + 1) - first >= 20
    assert len(store.queues.results("run")[1]) <= 60


def test_order_of_sides_is_a_fair_coin_and_the_same_after_a_restart() -> None:
    names, items = [f"p{n}" for n in range(40)], [f"i{n}" for n in range(50)]
    table = [[first_shown(name, item) == "a" for item in items] for name in names]
    share = sum(map(sum, table)) / 2000
    assert 0.47 < share < 0.53
    assert first_shown("ann", "x") == first_shown("ann", "x")
    # the value itself: Python's hash would differ from process to process
    assert coin("ann", "x") == pytest.approx(0.6907213776723762, abs=1e-15)
    assert coin("ab", "c") != coin("a", "bc")
    assert len({item_key("run", 1), item_key("run", 2), item_key("run", 1, 1), item_key("other", 1)}) == 4


def test_tokens_codes_and_sessions(store: AnnotationStore, clock: Clock) -> None:
    ann, token = store.add_person("ann")
    trainer, secret = store.add_person("fit", "trainer")
    signed = store.people.sign_in(token)
    assert signed is not None and signed[0] == ann
    assert store.people.of_session(signed[1]) == ann
    assert store.people.sign_in("wrong") is None
    assert store.people.sign_in(secret) is None, "a trainer has no page"
    assert store.people.of_token(secret) == trainer
    code = store.people.new_code(ann.id)
    assert store.people.sign_in(code) is not None
    assert store.people.sign_in(code) is None, "a code works once"
    old = store.people.new_code(ann.id)
    clock.now += 15 * 60 + 1
    assert store.people.sign_in(old) is None
    store.set_person(ann.id, "removed")
    assert store.people.of_session(signed[1]) is None
    content = store.file.path.read_bytes() + Path(f"{store.file.path}-wal").read_bytes()
    for text in (token, secret, code, signed[1]):
        assert text.encode() not in content
    assert store.file.path.stat().st_mode & 0o077 == 0


def test_votes_are_append_only_and_a_second_server_is_refused(store: AnnotationStore) -> None:
    ann, _ = store.add_person("ann")
    store.queues.push("run", [pair("k")], ONE_VOTE)
    judge(store, ann)
    for statement in ("UPDATE votes SET verdict = 'b'", "DELETE FROM votes"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"), store.file.writing() as db:
            db.execute(statement)
    with pytest.raises(RuntimeError, match="another annotation server"):
        AnnotationStore(store.file.path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"side": "middle"}, "side must be"),
        ({"uid": "short"}, "uid must be"),
        ({"strength": 4}, "strength must be"),
        ({"strength": True}, "strength must be"),
        ({"side": "tie", "strength": 1}, "strength needs"),
        ({"side": "skip"}, "needs a reason"),
        ({"flags": ["evil"]}, "flags must be"),
        ({"rationale": "x" * 2001}, "rationale must be"),
        ({"id": 3}, "id must be"),
    ],
)
def test_bad_ballots_name_the_field(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_ballot({"id": "x", "uid": "abcdefgh", "side": "left", **change})


def test_a_vote_survives_json(store: AnnotationStore) -> None:
    ann, _ = store.add_person("ann")
    store.queues.push("run", [pair("k")], ONE_VOTE)
    judge(store, ann, "right", flags=["broken_right", "nonsense_prompt"], rationale="ünïcode")
    (kept,) = store.votes()
    assert vote_of(kept.vote.to_json()) == kept.vote


class Machine(RuleBasedStateMachine):
    """Everything that may happen to a queue, in any order, with restarts."""

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "annotation.sqlite"
        self.clock = Clock()
        self.options = QueueOptions(votes=1, overlap=0.5, overlap_votes=3, max_votes=3)
        self.store = AnnotationStore(self.path, self.clock, repeat_every=4)
        self.number = 0
        self.people = [self.store.add_person("p0")[0]]

    @rule(count=st.integers(1, 3))
    def push(self, count: int) -> None:
        items = [pair(f"k{self.number + offset}") for offset in range(count)]
        self.number += count
        self.store.queues.push("run", items, self.options)

    @rule(who=st.integers(0, 5), side=st.sampled_from(["left", "right", "tie", "both_bad", "skip"]))
    def vote(self, who: int, side: str) -> None:
        judge(self.store, self.people[who % len(self.people)], side)

    @rule(who=st.integers(0, 5))
    def look(self, who: int) -> None:
        self.store.assignments.next_pair(self.people[who % len(self.people)])

    @rule(who=st.integers(0, 5), side=st.sampled_from(["left", "right", "skip"]))
    def undo(self, who: int, side: str) -> None:
        person = self.people[who % len(self.people)]
        shown = self.store.assignments.last(person)
        if shown is not None:
            self.store.assignments.vote(person, ballot(shown.id, side))

    @rule(seconds=st.sampled_from([1, 30, 601]))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds
        self.store.queues.finalize()

    @precondition(lambda self: len(self.people) < 4)
    @rule()
    def join(self) -> None:
        self.people.append(self.store.add_person(f"p{len(self.people)}")[0])

    @rule(who=st.integers(1, 5), state=st.sampled_from(["active", "paused"]))
    def change(self, who: int, state: str) -> None:
        if who < len(self.people):
            self.store.set_person(self.people[who].id, state)  # type: ignore[arg-type]

    @rule()
    def restart(self) -> None:
        before = self.store.votes(standing=False)
        self.store.close()
        self.store = AnnotationStore(self.path, self.clock, repeat_every=4)
        assert self.store.votes(standing=False) == before

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        # nobody has two standing votes on a pair
        places = [(kept.key, kept.vote.annotator) for kept in self.store.votes()]
        assert len(places) == len(set(places))
        # what is final stays: the cursor sees each pair once
        cursor, results = self.store.queues.results("run")
        assert self.store.queues.results("run", cursor)[1] == []
        # one person alone finishes the queue
        for person in self.people[1:]:
            self.store.set_person(person.id, "removed")
        for _ in range(10 * self.number + 10):
            if judge(self.store, self.people[0]) is None:
                break
        self.clock.now += 700
        assert self.store.queues.progress("run").open == 0
        later = self.store.queues.results("run")[1]
        assert later[: len(results)] == results
        assert len(later) == self.number
        for result in later:
            votes = [vote for vote in result.votes if vote.verdict != "skip"]
            assert (result.state == "final") == bool(votes)
        self.store.close()
        self.folder.cleanup()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=12, stateful_step_count=20, deadline=None)


def test_a_file_of_the_first_version_opens_and_goes_on(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "annotation.sqlite"
    store = AnnotationStore(path, clock)
    store.queues.push("run", [pair("k0")], ONE_VOTE)
    store.close()
    with sqlite3.connect(path) as old:
        old.execute("ALTER TABLE items DROP COLUMN suggestion")
        old.execute("PRAGMA user_version = 1")
    old.close()
    store = AnnotationStore(path, clock)
    store.queues.push("run", [pair("k0"), replace(pair("k1"), suggestion=0.9)], QueueOptions(show_ai="after"))
    person, _ = store.add_person("ann")
    for _ in range(2):
        assert judge(store, person) is not None
    assert store.queues.progress("run").votes == 2
    store.close()
