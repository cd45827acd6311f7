"""Two processes: a judge slower than the process group allows, errors that end all ranks, launchers that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest


ROOT = Path(__file__).parents[2]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
SCRIPT = """
import os, sys, time
from datetime import timedelta
import torch.distributed as dist
from lightning_rlhf.runtime import distributed, preemption

dist.init_process_group("gloo", timeout=timedelta(seconds=2))
rank, case = dist.get_rank(), sys.argv[1]

def fail(error):
    raise error

def say(text):
    os.write(1, f"rank {rank}: {text}\\n".encode())  # in one piece: both ranks have the same pipe

try:
    if case == "slow":
        def judge():
            time.sleep(5)
            return {"label": 0.5}
        say(distributed.from_rank_zero(judge))
        say(distributed.interleave(lambda: [rank, rank + 2]))
        say(distributed.any_rank(rank == 1))
    elif case == "rank_zero":
        distributed.from_rank_zero(lambda: fail(ConnectionError("judge is gone")))
    elif case == "other":
        distributed.interleave(lambda: [1] if rank == 0 else fail(MemoryError("no room")))
    elif case == "stopped":
        distributed.from_rank_zero(lambda: fail(preemption.Stopped()))
except preemption.Stopped as error:
    say(f"stopped with {error.code}")
except Exception as error:
    say(f"{type(error).__name__}: {error}")
distributed.leave()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "lines"),
    [
        # the default group would have given up after two seconds
        ("slow", [f"rank {r}: {said}" for r in (0, 1) for said in ("{'label': 0.5}", "[0, 1, 2, 3]", "True")]),
        (
            "rank_zero",
            [
                "rank 0: ConnectionError: judge is gone",
                "rank 1: RankError: process 0 of 2 stopped with ConnectionError: judge is gone",
            ],
        ),
        (
            "other",
            [
                "rank 0: RankError: process 1 of 2 stopped with MemoryError: no room",
                "rank 1: MemoryError: no room",
            ],
        ),
        ("stopped", ["rank 0: stopped with 143", "rank 1: stopped with 143"]),
    ],
)
def test_ranks_wait_for_each_other_and_share_their_errors(tmp_path: Path, case: str, lines: list[str]) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, *TWO, "script.py", case],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert sorted(done.stdout.splitlines()) == sorted(lines), done.stderr[-2000:]


@pytest.mark.slow
def test_a_labeler_that_fails_on_rank_zero_ends_both_processes_with_its_error(runs: Any) -> None:
    begun = time.monotonic()
    options = ["--config=trainer/ddp", "--trainer.devices=2", "--trainer.accelerator=cpu"]
    status, said = runs.run(*options, fault="label2=raise", launcher=TWO)
    assert status != 0
    assert "ConnectionError: the judge is gone" in said
    assert "process 0 of 2 stopped with ConnectionError: the judge is gone" in said
    assert time.monotonic() - begun < 120


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
@pytest.mark.parametrize("moment", ["labeling", "importing"])
def test_a_killed_launcher_leaves_no_process_behind(runs: Any, moment: str) -> None:
    options = ["--config=trainer/ddp", "--trainer.devices=2", "--trainer.accelerator=cpu"]
    process = runs.start(*options, fault="label1=sleep60", launcher=TWO)
    try:
        children: list[str] = []
        end = time.monotonic() + 120
        while len(children) < 2 or (moment == "labeling" and not (runs.folder / "reached.0").exists()):
            assert time.monotonic() < end, process.communicate()
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if moment == "importing":
            time.sleep(0.5)  # of the seconds that it takes
        assert len(children) == 2
        process.send_signal(signal.SIGKILL)
        process.wait()
        end = time.monotonic() + 20
        while any(alive(int(child)) for child in children):
            assert time.monotonic() < end, "a rank outlived its launcher"
            time.sleep(0.1)
    finally:
        process.kill()


def alive(process_id: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
