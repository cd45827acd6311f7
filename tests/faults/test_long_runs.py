"""A run of many rounds needs no more memory than one of few, and its folder says what made it."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from lightning_rlhf.experiments.run import LONGEST_LOG, set_aside
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.runtime.run_record import KEPT_STARTS, write_record
from lightning_rlhf.types import Comparison, Label, Prompt, Response


MEMORY = """
import os
from lightning.pytorch import Callback

class Memory(Callback):
    def on_train_epoch_end(self, trainer, module):
        pages = int(open("/proc/self/statm").read().split()[1])
        with open("memory.txt", "a") as file:
            print(pages * os.sysconf("SC_PAGE_SIZE"), file=file)
"""


@pytest.mark.slow
def test_memory_stays_flat_over_rounds_and_the_folder_describes_the_run(runs: Any) -> None:
    (runs.folder / "memory.py").write_text(MEMORY)
    status, said = runs.run(
        *("--trainer.max_epochs=60", "--trainer.callbacks=memory.Memory", "--checkpoint_every=20"),
        *("--data.rounds.prompts_per_round=4", "--data.rounds.replay=last"),
    )
    assert status == 0, said
    used = [int(line) for line in (runs.folder / "memory.txt").read_text().split()]
    assert len(used) == 60
    # a round's rows and tensors are a few hundred kB: kept, they would be more than this
    assert max(used[40:]) - max(used[10:20]) < 8 * 2**20
    (start,) = json.loads((runs.folder / "run" / "run.json").read_text())["starts"]
    assert "--trainer.max_epochs=60" in start["command"]
    assert start["config"]["data"]["init_args"]["rounds"]["prompts_per_round"] == 4
    assert start["git"]["lightning_rlhf"] is None or len(start["git"]["lightning_rlhf"]["commit"]) == 40
    weights = [entry for entry in start["data"] if entry["path"].endswith(".safetensors")]
    assert len(weights) == 1
    assert len(weights[0]["sha256"]) == 64


def test_the_record_keeps_the_first_start_and_the_newest(tmp_path: Path) -> None:
    for number in range(KEPT_STARTS + 5):
        write_record(tmp_path, {"number": number}, 1, None)
    record = json.loads((tmp_path / "run.json").read_text())
    numbers = [start["config"]["number"] for start in record["starts"]]
    assert numbers == [0, *range(5, KEPT_STARTS + 5)]
    assert record["starts_left_out"] == 4


def test_a_long_text_log_is_set_aside(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    for content in ("old", "new"):
        log.write_text(content.ljust(LONGEST_LOG + 1))
        set_aside(log)
        assert not log.exists()
    assert (tmp_path / "log.1.txt").read_text().startswith("new")
    log.write_text("short")
    set_aside(log)
    assert log.read_text() == "short"


def test_work_on_a_ledger_does_not_grow_with_it(tmp_path: Path) -> None:
    """Counted in steps of SQLite's virtual machine: opening, totals, the newest round, and the next one."""
    steps = []
    connect = sqlite3.connect
    for size in (1_000, 32_000):
        path = tmp_path / f"{size}.sqlite"
        response = Response((1, 2), "yes", "eos")
        pairs = [Comparison(Prompt(i, (i,), f"{i}?"), response, response) for i in range(size)]
        with PreferenceStore(path) as store:
            for round_ in range(size // 1_000):
                part = pairs[1_000 * round_ : 1_000 * (round_ + 1)]
                store.add_labels(store.add_comparisons(round_, part, range(len(part))), [Label(0.5)] * len(part))
        count = 0

        def step() -> int:
            nonlocal count
            count += 1
            return 0

        def watched(*arguments: Any, **options: Any) -> sqlite3.Connection:
            connection = connect(*arguments, **options)
            connection.set_progress_handler(step, 10)
            return connection

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sqlite3, "connect", watched)
            with PreferenceStore(path) as store:
                assert store.num_labels == size
                assert store.total_cost == size
                assert len(store.comparisons(size // 1_000 - 1)) == 1_000
                next_ = store.add_comparisons(size // 1_000, pairs[:1_000], range(1_000))
                store.add_labels(next_, [Label(0.5)] * 1_000)
                assert store.failed(size // 1_000) == {}
        steps.append(count)
    assert steps[0] > 1_000
    assert steps[1] < 1.1 * steps[0]
