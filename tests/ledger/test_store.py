"""The ledger: what is written is read back, labels are bought once, and nothing that was acknowledged is lost."""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.types import Comparison, Label, Prompt, RecordedPair, Response


OK = Label(1.0)


def make_comparison(index: int = 0, text: str = "yes") -> Comparison:
    prompt = Prompt(index, (1, 2), f"prompt {index}")
    return Comparison(prompt, Response((3,), text, "eos"), Response((4, 5), "no", "length"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "ledger.sqlite"


# -- round trip -------------------------------------------------------------------------------------------------------

token_ids = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5).map(tuple)
finite = st.floats(allow_nan=False, allow_infinity=False)
logps = st.none() | st.lists(st.floats(allow_nan=False), max_size=5).map(tuple)
scalars = st.none() | st.booleans() | st.integers() | finite | st.text(max_size=5)
metas = st.dictionaries(st.text(max_size=5), scalars, max_size=3)
responses = st.builds(
    Response, token_ids, st.text(max_size=8), st.sampled_from(["eos", "length"]), logps, logps, st.text(max_size=5)
)
messages = st.lists(st.fixed_dictionaries({"role": st.text(max_size=5), "content": st.text(max_size=5)}), max_size=3)
prompts = st.builds(
    Prompt,
    st.integers(0, 3),
    token_ids,
    st.text(max_size=8),
    st.none() | messages.map(tuple),
    st.none() | st.tuples(responses, responses),
    st.none() | st.builds(RecordedPair, st.text(max_size=5), st.text(max_size=5), finite, finite),
)
comparisons = st.builds(Comparison, prompts, responses, responses, st.text(max_size=5), finite, finite, metas)
ok_labels = st.builds(Label, st.floats(0, 1), st.just("ok"), finite, metas)
failed_labels = st.builds(Label, st.none(), st.sampled_from(["invalid", "refused", "timeout"]), finite, metas)


def bits(values: tuple[float, ...] | None) -> bytes | None:
    return None if values is None else struct.pack(f"{len(values)}d", *values)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(comparisons, ok_labels | failed_labels), min_size=1, max_size=4))
def test_what_is_read_after_reopening_equals_what_was_written(written: list[tuple[Comparison, Label]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with PreferenceStore(Path(folder) / "ledger.sqlite") as store:
            ids = store.add_comparisons(3, [c for c, _ in written], range(len(written)))
            store.add_labels(ids, [label for _, label in written])
        with PreferenceStore(Path(folder) / "ledger.sqlite", read_only=True) as store:
            read = store.comparisons(3)
            assert [(i, c) for i, c, _ in read] == [(i, c) for i, (c, _) in zip(ids, written, strict=True)]
            assert [label for _, _, label in read] == [x if x.status == "ok" else None for _, x in written]
            assert [store.history(i) for i in ids] == [[label] for _, label in written]
            for (_, found, _), (comparison, _) in zip(read, written, strict=True):
                # == calls 0.0 and -0.0 equal; the bits must be, too
                for side in ("a", "b"):
                    one, other = getattr(found, side), getattr(comparison, side)
                    assert bits(one.policy_logps) == bits(other.policy_logps)
                    assert bits(one.reference_logps) == bits(other.reference_logps)


def test_prompts_are_stored_once_per_content_even_under_one_index(path: Path) -> None:
    first, response = make_comparison(7), Response((3,), "x", "eos")
    other = Comparison(Prompt(7, (1, 2), "another text"), response, response)
    with PreferenceStore(path) as store:
        store.add_comparisons(0, [first, first, other], [0, 1, 2])
        store.add_comparisons(1, [first], [0])
        assert [c for _, c, _ in store.comparisons(0)] == [first, first, other]
    assert sqlite3.connect(path).execute("SELECT COUNT(*) FROM prompts").fetchone() == (2,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": float("nan")}, "weight of round 0, position 5 is nan"),
        ({"meta": {"delta": [1.0]}}, "'delta': list; only JSON scalars"),
        ({"a": Response((1,), "\ud800", "eos")}, "text of round 0, position 5 is not valid Unicode"),
    ],
)
def test_values_that_could_not_be_read_back_are_refused(path: Path, change: dict[str, Any], message: str) -> None:
    good = make_comparison()
    bad = Comparison(**{**vars(good), **change})
    with PreferenceStore(path) as store:
        with pytest.raises(ValueError, match=message):
            store.add_comparisons(0, [good, bad], [4, 5])
        assert store.comparisons(0) == []


# -- comparisons and labels -------------------------------------------------------------------------------------------


def test_a_place_is_filled_once_and_read_in_order_of_position(path: Path) -> None:
    with PreferenceStore(path) as store:
        late = store.add_comparisons(0, [make_comparison(9)], [2])
        again = store.add_comparisons(0, [make_comparison(7), make_comparison(8), make_comparison(9, "new")], [0, 1, 2])
        assert again[2] == late[0]
        assert len(set(again)) == 3
        assert store.positions(0) == [0, 1, 2]
        assert [(i, c) for i, c, _ in store.comparisons(0)] == [
            (again[0], make_comparison(7)),
            (again[1], make_comparison(8)),
            (again[2], make_comparison(9)),  # the first one stays
        ]


def test_another_prompt_at_a_filled_place_is_refused_and_nothing_of_the_batch_is_kept(path: Path) -> None:
    with PreferenceStore(path) as store:
        store.add_comparisons(0, [make_comparison(1)], [1])
        with pytest.raises(ValueError, match=r"round 0, position 1 of .* holds another prompt than prompt 2"):
            store.add_comparisons(0, [make_comparison(0), make_comparison(2)], [0, 1])
        assert store.positions(0) == [1]


def test_positions_must_be_different_and_as_many_as_comparisons(path: Path) -> None:
    with PreferenceStore(path) as store:
        with pytest.raises(ValueError, match="2 comparisons need as many different positions; got 2 positions, 1 of"):
            store.add_comparisons(0, [make_comparison(), make_comparison()], [0, 0])
        with pytest.raises(ValueError, match="got 1 positions"):
            store.add_comparisons(0, [make_comparison(), make_comparison()], [0])
        with pytest.raises(ValueError, match="count from 0; got -1"):
            store.add_comparisons(0, [make_comparison()], [-1])
        assert store.add_comparisons(0, [], []) == []


def test_a_second_ok_label_is_refused_with_its_whole_batch(path: Path) -> None:
    with PreferenceStore(path) as store:
        first, second = store.add_comparisons(0, [make_comparison(0), make_comparison(1)], [0, 1])
        store.add_labels([first], [Label(0.25)])
        with pytest.raises(ValueError, match=rf"comparison {first} .* already has a label"):
            store.add_labels([second, first], [OK, OK])
        with pytest.raises(ValueError, match=rf"comparison {second} .* already has a label"):
            store.add_labels([second, second], [OK, OK])
        assert [label for _, _, label in store.comparisons(0)] == [Label(0.25), None]
        assert (store.num_labels, store.num_attempts) == (1, 1)


def test_labels_for_unknown_comparisons_and_in_wrong_number_are_refused(path: Path) -> None:
    with PreferenceStore(path) as store:
        with pytest.raises(ValueError, match="no comparison 5"):
            store.add_labels([5], [OK])
        with pytest.raises(ValueError, match="got 1 labels for 2 comparisons"):
            store.add_labels([5, 6], [OK])
        assert store.num_attempts == 0


def test_failed_attempts_are_kept_and_counted_but_are_no_labels(path: Path) -> None:
    timeout, refused, invalid = (Label(None, s, cost=0.5) for s in ("timeout", "refused", "invalid"))
    with PreferenceStore(path) as store:
        ids = store.add_comparisons(0, [make_comparison(i) for i in range(4)], range(4))
        other = store.add_comparisons(1, [make_comparison(0)], [0])
        store.add_labels(ids[:3], [timeout, timeout, invalid])
        store.add_labels(ids[:2], [OK, refused])
        store.add_labels(other, [OK])
        # 0: timeout then ok; 1: timeout then refused; 2: invalid; 3: never tried
        assert [label for _, _, label in store.comparisons(0)] == [OK, None, None, None]
        assert store.failed(0) == {"invalid": 1, "refused": 1}
        assert store.attempts(0) == {ids[0]: 2, ids[1]: 2, ids[2]: 1}
        assert store.history(ids[1]) == [timeout, refused]
        assert (store.num_labels, store.num_attempts, store.total_cost) == (2, 6, 4 * 0.5 + 2.0)
        assert [store.count_labels(before=r) for r in range(3)] == [0, 1, 2]
        assert [(p.round, p.comparison.prompt.index) for p in store.preferences()] == [(0, 0), (1, 0)]
        assert [p.round for p in store.preferences([1])] == [1]


def test_attempts_cannot_be_changed_by_hand(path: Path) -> None:
    with PreferenceStore(path) as store:
        store.add_labels(store.add_comparisons(0, [make_comparison()], [0]), [OK])
    shell = sqlite3.connect(path)
    for statement in ("UPDATE attempts SET probability = 0", "DELETE FROM attempts"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            shell.execute(statement)


def test_preferences_beyond_one_page_come_complete_and_in_order(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_rlhf.ledger.store.PAGE", 4)
    with PreferenceStore(path) as store:
        for round in (0, 1):
            ids = store.add_comparisons(round, [make_comparison(i) for i in range(10)], range(10))
            store.add_labels(ids[::2], [OK] * 5)
        expected = [(round, i) for round in (0, 1) for i in range(0, 10, 2)]
        assert [(p.round, p.comparison.prompt.index) for p in store.preferences()] == expected


# -- rounds and settings ----------------------------------------------------------------------------------------------


def test_a_closed_round_keeps_its_info_and_takes_nothing_new(path: Path) -> None:
    with PreferenceStore(path) as store:
        ids = store.add_comparisons(0, [make_comparison(0)], [0])
        assert store.rounds() == []
        store.close_round(0, {"seconds": 1.5, "pairs": [1, 2]})
        store.close_round(0, {"seconds": 1.5, "pairs": [1, 2]})
        with pytest.raises(ValueError, match=r"round 0 .* was closed before"):
            store.close_round(0, {"seconds": 2.0})
        with pytest.raises(ValueError, match=r"round 0 .* is closed"):
            store.add_comparisons(0, [make_comparison(1)], [1])
        assert store.add_comparisons(0, [make_comparison(0)], [0]) == ids
        assert store.rounds() == [0]
        assert store.round_info(0) == {"seconds": 1.5, "pairs": [1, 2]}
        assert store.round_info(1) is None


def test_run_id_survives_and_differs_between_ledgers(path: Path) -> None:
    with PreferenceStore(path) as store:
        run_id = store.run_id
    with PreferenceStore(path) as again, PreferenceStore(path.with_name("other")) as other:
        assert again.run_id == run_id
        assert other.run_id != run_id


def test_fingerprint_differences_are_named_with_both_values(path: Path) -> None:
    then = {"seed": 1, "data": {"sampler": {"n": 4, "beta": 0.1}, "limit": None}, "layers": (1, 2)}
    with PreferenceStore(path) as store:
        assert store.fingerprint() is None
        store.check_fingerprint(then)
    with PreferenceStore(path) as store:
        store.check_fingerprint(then)  # a tuple becomes a list in JSON: no difference
        now = {"seed": 1, "data": {"sampler": {"n": 8}, "limit": 3}, "layers": (1, 2)}
        with pytest.raises(ValueError, match="settings differ") as caught:
            store.check_fingerprint(now)
        lines = str(caught.value).splitlines()
        assert lines[1:-1] == [
            "  data.limit: None in the ledger, 3 now",
            "  data.sampler.beta: 0.1 in the ledger, (absent) now",
            "  data.sampler.n: 4 in the ledger, 8 now",
        ]
        assert f"another run folder, or delete {path.parent}" in lines[-1]
        store.set_fingerprint(now)
        store.check_fingerprint(now)


# -- processes and threads --------------------------------------------------------------------------------------------


def test_a_killed_run_has_every_acknowledged_label_and_continues_without_duplicates(path: Path) -> None:
    """The driver starts a trainer 14 times and kills it with SIGKILL at random moments, its start included."""
    driver = textwrap.dedent("""
        import os, random, signal, sqlite3, sys, time
        from lightning_rlhf.ledger.store import PreferenceStore
        from lightning_rlhf.types import Comparison, Label, Prompt, Response

        def train(path):
            store = PreferenceStore(path)
            os.write(1, b"opened\\n")
            for round in range(len(store.rounds()), 10**6):
                for start in range(0, 12, 4):
                    places = range(start, start + 4)
                    pair = [Response((round,), "r" * 300, "eos")] * 2
                    drawn = [Comparison(Prompt(i, (i,), str(i)), *pair) for i in places]
                    store.add_comparisons(round, drawn, places)
                    missing = [row[0] for row in store.comparisons(round) if row[2] is None]
                    store.add_labels(missing, [Label(id_ % 8 / 8) for id_ in missing])
                    os.write(1, "".join(f"{id_}\\n" for id_ in missing).encode())
                store.close_round(round, {})

        moments = random.Random(0)
        for repetition in range(14):
            pid = os.fork()
            if pid == 0:
                train(sys.argv[1])
            # the first six are killed while they create or open the ledger
            time.sleep(moments.uniform(0.0, 0.01) if repetition < 6 else moments.uniform(0.0, 0.3))
            os.kill(pid, signal.SIGKILL)
            assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
            if not os.path.exists(sys.argv[1]):
                continue
            check = sqlite3.connect(sys.argv[1]).execute("PRAGMA integrity_check").fetchone()
            assert check == ("ok",), check
    """)
    done = subprocess.run([sys.executable, "-c", driver, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    acknowledged = [int(line) for line in done.stdout.split() if line != "opened"]
    assert done.stdout.count("opened") >= 3  # so the lock of a killed writer was free
    assert len(acknowledged) > 20
    assert max(Counter(acknowledged).values()) == 1

    with PreferenceStore(path) as store:
        last = len(store.rounds())
        rows = {id_: label for round in range(last + 1) for id_, _, label in store.comparisons(round)}
        assert all(rows[id_] == Label(id_ % 8 / 8) for id_ in acknowledged)
        assert [len(store.comparisons(round)) for round in range(last)] == [12] * last
        # a label that was written, but not yet acknowledged when the process died, is the only surplus
        num_killed_in_between = store.num_labels - len(acknowledged)
        assert 0 <= num_killed_in_between <= 14 * 4
        assert store.total_cost == store.num_attempts == store.num_labels == sum(x is not None for x in rows.values())


def test_commits_wait_for_the_disk(path: Path) -> None:
    # no test can cut the power; SQLite promises durability in WAL mode from synchronous = FULL (2) on
    with PreferenceStore(path) as store:
        assert store._connection is not None
        pragmas = [
            store._connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")
        ]
        assert pragmas[0] == "wal"
        assert pragmas[1] >= 2


def hold(path: Path) -> subprocess.Popen[str]:
    code = "import sys, time; from lightning_rlhf.ledger.store import PreferenceStore as S; "
    code += "s = S(sys.argv[1]); print('ready', flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_second_writer_is_refused_until_the_first_is_killed(path: Path) -> None:
    process = hold(path)
    try:
        with pytest.raises(RuntimeError, match=f"is being written by process {process.pid} on "):
            PreferenceStore(path)
        with PreferenceStore(path, read_only=True) as reader:
            assert reader.num_labels == 0
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with PreferenceStore(path) as store:
        assert store.add_comparisons(0, [make_comparison()], [0]) == [1]


def test_a_second_writer_in_the_same_process_is_refused_until_the_first_is_closed(path: Path) -> None:
    with PreferenceStore(path), pytest.raises(RuntimeError, match=f"written by process {os.getpid()}"):
        PreferenceStore(path)
    PreferenceStore(path).close()


def test_a_forked_child_can_neither_use_nor_close_what_its_parent_opened(path: Path) -> None:
    code = textwrap.dedent("""
        import os, sys
        from lightning_rlhf.ledger.store import PreferenceStore
        store = PreferenceStore(sys.argv[1])
        pid = os.fork()
        if pid == 0:
            try:
                store.rounds()
            except RuntimeError as error:
                print(error, flush=True)
            store.close()
            os._exit(0)
        os.waitpid(pid, 0)
        store.close_round(0, {})
        try:
            PreferenceStore(sys.argv[1])
        except RuntimeError as error:
            print(error)
    """)
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    fork_error, lock_error = done.stdout.splitlines()
    assert "open it here with PreferenceStore(path, read_only=True)" in fork_error
    assert "is being written by process" in lock_error


def test_readers_see_whole_batches_while_a_writer_writes(path: Path) -> None:
    batch, rounds, seen = 5, 30, []
    with PreferenceStore(path) as store:

        def write() -> None:
            for round in range(rounds):
                store.add_labels(
                    store.add_comparisons(round, [make_comparison(i) for i in range(batch)], range(batch)), [OK] * batch
                )

        with PreferenceStore(path, read_only=True) as reader:
            thread = threading.Thread(target=write)
            thread.start()
            while thread.is_alive():
                with reader.snapshot():
                    num_labels = reader.num_labels
                    assert sum(1 for _ in reader.preferences()) == num_labels
                seen.append(num_labels)
            thread.join()
            assert reader.num_labels == batch * rounds
    assert seen == sorted(seen)
    assert all(n % batch == 0 for n in seen)


def test_threads_may_share_a_store(path: Path) -> None:
    with PreferenceStore(path) as store:

        def write(round: int) -> None:
            for position in range(20):
                ids = store.add_comparisons(round, [make_comparison(position)], [position])
                store.add_labels(ids, [Label(round / 4)])

        threads = [threading.Thread(target=write, args=(round,)) for round in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expected = [(round, i, round / 4) for round in range(4) for i in range(20)]
        assert [(p.round, p.comparison.prompt.index, p.probability) for p in store.preferences()] == expected
        assert store.num_labels == 80


# -- files that cannot be used ----------------------------------------------------------------------------------------


def test_read_only_stores_refuse_to_write_and_to_create(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no ledger here"):
        PreferenceStore(path, read_only=True)
    assert not path.parent.exists()
    PreferenceStore(path).close()
    with PreferenceStore(path, read_only=True) as store:
        assert store.rounds() == []
        with pytest.raises(RuntimeError, match="opened with read_only=True"):
            store.close_round(0, {})
    with pytest.raises(ValueError, match="is closed"):
        store.rounds()
    store.close()


def test_files_that_are_no_ledger_are_refused_and_left_alone(tmp_path: Path) -> None:
    text, database, empty = tmp_path / "notes.txt", tmp_path / "other.sqlite", tmp_path / "empty"
    text.write_text("not a database at all\n" * 100)
    shell = sqlite3.connect(database)
    shell.execute("CREATE TABLE cats (name)")
    shell.close()
    empty.touch()
    before = text.read_bytes(), database.read_bytes()
    for read_only in (False, True):
        with pytest.raises(ValueError, match=r"notes.txt is not a ledger \(not a SQLite file\)"):
            PreferenceStore(text, read_only=read_only)
        with pytest.raises(ValueError, match=r"other.sqlite is a SQLite file of another program"):
            PreferenceStore(database, read_only=read_only)
        with pytest.raises(IsADirectoryError, match="add a file name"):
            PreferenceStore(tmp_path, read_only=read_only)
    with pytest.raises(ValueError, match="is empty, not a ledger"):
        PreferenceStore(empty, read_only=True)
    assert (text.read_bytes(), database.read_bytes()) == before
    assert {file.name for file in tmp_path.iterdir()} == {"notes.txt", "other.sqlite", "empty"}


def test_a_ledger_of_a_newer_schema_is_refused(path: Path) -> None:
    PreferenceStore(path).close()
    shell = sqlite3.connect(path)
    shell.execute("PRAGMA user_version = 99")
    shell.close()
    for read_only in (False, True):
        with pytest.raises(ValueError, match=r"has schema version 99, this lightning_rlhf reads version \d+; install"):
            PreferenceStore(path, read_only=read_only)


def test_a_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot create the folder of the ledger"):
        PreferenceStore(tmp_path / "file" / "run" / "ledger.sqlite")


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="needs POSIX users")
def test_a_read_only_folder_refuses_writers_with_a_remedy_and_serves_readers() -> None:
    code = textwrap.dedent("""
        import os, sys
        from lightning_rlhf.ledger.store import PreferenceStore
        if os.getuid() == 0:
            os.setuid(65534)  # root may write everywhere
        try:
            PreferenceStore(sys.argv[1])
        except OSError as error:
            print(error)
        with PreferenceStore(sys.argv[1], read_only=True) as store:
            print(store.num_labels)
    """)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.sqlite"
        with PreferenceStore(path) as store:
            store.add_labels(store.add_comparisons(0, [make_comparison()], [0]), [OK])
        Path(folder).chmod(0o555)
        try:
            done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
        finally:
            Path(folder).chmod(0o755)
    assert done.returncode == 0, done.stderr
    error, num_labels = done.stdout.splitlines()
    assert "cannot use the ledger" in error
    assert str(path) in error
    assert num_labels == "1"


def test_a_full_disk_is_reported_and_costs_no_label(path: Path) -> None:
    with PreferenceStore(path) as store:
        ids = store.add_comparisons(0, [make_comparison(i) for i in range(8)], range(8))
        store.add_labels(ids[:4], [OK] * 4)
        assert store._connection is not None
        used = store._connection.execute("PRAGMA page_count").fetchone()[0]
        store._connection.execute(f"PRAGMA max_page_count = {used}")  # SQLite's own disk-full error
        with pytest.raises(OSError, match=r"disk is full.*free some space.*ledger\.sqlite") as caught:
            store.add_comparisons(1, [make_comparison(i, "long " * 10000) for i in range(8)], range(8))
        assert caught.value.errno == errno.ENOSPC
        store.add_labels(ids[4:5], [OK])  # small enough for the space that is left
    with PreferenceStore(path) as store:
        assert (store.num_labels, store.positions(1)) == (5, [])
        store.add_comparisons(1, [make_comparison(i, "long " * 10000) for i in range(8)], range(8))
