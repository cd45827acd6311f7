"""SIGTERM ends a run in good order, and the same command ends with the weights of a run that nobody disturbed."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch


ROOT = Path(__file__).parents[2]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.slow
def test_sigterm_writes_a_checkpoint_and_nothing_is_done_or_bought_twice(make_runs: Callable[[str], Any]) -> None:
    straight, stopped = make_runs("straight"), make_runs("stopped")
    status, said = straight.run()
    assert status == 0, said

    rare = "--checkpoint_every=100"  # what is there was written on the signal
    status, said = stopped.run(rare, fault="step3=term")
    assert status == 143, said
    assert "stopped by SIGTERM after step 3: checkpoint" in said
    assert "Traceback" not in said
    assert (stopped.folder / "run" / "checkpoints" / "last.ckpt").resolve().name == "epoch=1-step=3.ckpt"

    # two steps a round; the first chunk of labels of round 2, after step 4, which no regular checkpoint keeps
    status, said = stopped.run(rare, fault="label1=term")
    assert status == 143, said
    assert "stopped by SIGTERM after step 4: checkpoint" in said

    status, said = stopped.run()
    assert status == 0, said
    # the links are moved, also by a run that goes on from its first checkpoint
    names = sorted(path.name for path in (stopped.folder / "run" / "checkpoints").iterdir())
    assert len(names) == 3
    assert names[-1] == "last.ckpt"
    assert (stopped.folder / "run" / "checkpoints" / "last.ckpt").resolve().name == "epoch=2-step=6.ckpt"
    expected, got = weights(straight.folder), weights(stopped.folder)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    bought = Counter((stopped.folder / "bought.txt").read_text().split())
    assert bought == Counter((straight.folder / "bought.txt").read_text().split())
    assert sum(bought.values()) == 24


@pytest.mark.slow
def test_sigterm_at_the_last_step_leaves_nothing_to_do_but_the_end(make_runs: Callable[[str], Any]) -> None:
    # the budget is spent in round 1, after step 4; a third epoch would train on that round once more
    names = ("FinalValidation", "KLMonitor", "RewardMonitor", "Summary", "LabelBudget")
    options = [
        *(f"--trainer.callbacks+=lightning_rlhf.callbacks.{name}" for name in names),
        *("--trainer.callbacks.labels=16", "--trainer.limit_val_batches=1.0"),
        *("--data.heldout=BuiltinPrompts", "--data.heldout.split=heldout", "--data.heldout.limit=4"),
    ]
    summaries, rewards = [], []
    for name, faults in (("straight", [""]), ("stopped", ["step4=term", ""])):
        runs = make_runs(name)
        for fault in faults:
            status, said = runs.run(*options, fault=fault)
            assert status == (143 if fault else 0), said
        assert (runs.folder / "run" / "checkpoints" / "last.ckpt").resolve().name == "epoch=1-step=4.ckpt"
        summaries.append(json.loads((runs.folder / "run" / "summary.json").read_text()))
        files = sorted((runs.folder / "run" / "metrics").glob("version_*/metrics.csv"))
        rows = chain.from_iterable(csv.DictReader(file.open(newline="")) for file in files)
        rewards.append([(row["step"], row["train/reward"]) for row in rows if row.get("train/reward")])
    assert summaries[0]["step_after"] == 4
    # the curve of rounds has the one that the signal ended
    assert rewards[0] == rewards[1] and [step for step, _ in rewards[0]] == ["1", "3"]
    for key in ("steps", "labels", "step_before", "step_after", "reward_before", "reward_after", "kl_after"):
        assert summaries[0][key] == summaries[1][key], key


@pytest.mark.slow
def test_sigterm_in_the_first_round_leaves_the_ledger(runs: Any) -> None:
    status, said = runs.run(fault="label1=term")
    assert status == 143, said
    assert "stopped by SIGTERM; the same command goes on from there" in said
    assert not (runs.folder / "run" / "checkpoints").exists()
    status, said = runs.run("--trainer.max_epochs=1")
    assert status == 0, said
    assert len((runs.folder / "bought.txt").read_text().split()) == 8


def test_a_signal_is_passed_on_to_a_child_once_and_its_status_comes_back(tmp_path: Path) -> None:
    child = (
        "import signal, sys, time, pathlib\n"
        "count = 0\n"
        "def note(number, frame):\n"
        "    global count\n"
        "    count += 1\n"
        "signal.signal(signal.SIGINT, note)\n"
        f"pathlib.Path({str(tmp_path / 'ready')!r}).touch()\n"
        "while not count:\n"
        "    time.sleep(0.01)\n"
        "time.sleep(0.3)\n"
        "sys.exit(100 + count)\n"
    )
    parent = (
        "import sys\n"
        "from lightning_rlhf.runtime.preemption import run_child\n"
        f"print(run_child([sys.executable, '-c', {child!r}]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.communicate(timeout=60)[0] == "101\n"
