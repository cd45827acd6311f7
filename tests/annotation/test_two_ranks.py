"""Two processes that wait for people: both leave with status 75, and go on together to what one process gives."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.runtime.preemption import WAITING


ROOT = Path(__file__).parents[2]
OPTIONS = [
    *("fit", "--config=dpo_online", "--config=labeler/human", "--trainer.accelerator=cpu", "--trainer.max_epochs=1"),
    *("--trainer.precision=32-true", "--trainer.enable_progress_bar=false", "--trainer.check_val_every_n_epoch=9"),
    *("--data.pairs_per_batch=2", "--data.decoding.max_new_tokens=4", "--data.rounds.prompts_per_round=4"),
    *("--data.prompts.limit=8", "--data.heldout=null", "--model.optimizer.lr=1e-3"),
    *("--data.labeler.pairs.overlap=0", "--model.lr_scheduler.warmup_steps=0"),
]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def run(folder: Path, ranks: int, *options: str) -> tuple[list[int], list[str]]:
    """Run as many processes as torchrun would start; returns the status and standard error of each."""
    port, processes = free_port(), []
    for rank in range(ranks):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        if ranks > 1:
            env |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            env |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        overlay = ["--config=trainer/ddp", f"--trainer.devices={ranks}"] if ranks > 1 else ["--config=trainer/cpu"]
        command = [sys.executable, "-m", "lightning_rlhf", OPTIONS[0], *OPTIONS[1:3], *overlay, *OPTIONS[3:], *options]
        processes.append(subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=200)[1] for process in processes]
    return [process.returncode for process in processes], errors


@pytest.mark.slow
def test_two_ranks_leave_together_with_status_75_and_go_on(
    tiny_policy: Path,
    tmp_path: Path,
    start_server: Callable[..., Any],
    start_robot: Callable[..., Any],
    robot_class: type[Any],
) -> None:
    models = []
    for ranks in (2, 1):
        server = start_server(tmp_path / f"people{ranks}")
        options = [f"--model.policy={tiny_policy}", f"--run_dir=run{ranks}"]
        options += [f"--data.labeler.server_dir={server.run_dir}"]
        if ranks == 2:
            statuses, errors = run(tmp_path, ranks, *options, "--data.labeler.wait=exit")
            assert statuses == [WAITING, WAITING], errors
            assert not any("Traceback" in text for text in errors), errors
            robot = robot_class(server, "ann")
            while robot.judge():
                pass
        else:
            start_robot(server, "ann")
        # the same command; the setting of the wait may change
        statuses, errors = run(tmp_path, ranks, *options)
        assert statuses == [0] * ranks, errors
        with PreferenceStore(tmp_path / f"run{ranks}" / "ledger.sqlite", read_only=True) as store:
            assert len(store.votes()) == store.num_labels == 4
        models.append(AutoModelForCausalLM.from_pretrained(tmp_path / f"run{ranks}" / "model"))
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)
