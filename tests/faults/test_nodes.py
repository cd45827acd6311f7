"""The scripts for several nodes: two "nodes" of one process each on this machine give the run of one process."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_rlhf.ledger.store import PreferenceStore


ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_local_nodes_train_by_the_torchrun_script(runs: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        *("--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.callbacks=null"),
        *("--trainer.enable_progress_bar=false", "--trainer.max_epochs=2", "--data.heldout=null"),
        *("--data.labeler=plugins.Labeler", "--data.labeler.rule=bernoulli", "--data.labeler.reward=plugins.Letters"),
        *("--data.rounds.prompts_per_round=4", "--data.pairs_per_batch=4", "--data.decoding.max_new_tokens=4"),
        *("--data.prompt_options.max_prompt_tokens=200", f"--model.policy={runs.policy}", "--run_dir=run"),
    ]
    folder = Path(sys.executable).parent
    nodes = [
        subprocess.Popen(
            [str(ROOT / "examples/torchrun/node.sh"), *options],
            cwd=runs.folder,
            env={
                **os.environ,
                "PATH": f"{folder}:{os.environ['PATH']}",
                "PYTHONPATH": f"{runs.folder}:{ROOT}",
                "OMP_NUM_THREADS": "1",
                **{"NODES": "2", "NODE": str(node), "PROCESSES": "1", "ADDRESS": f"127.0.0.1:{port}"},
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in (0, 1)
    ]
    try:
        said = [node.communicate(timeout=240)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], said
    with PreferenceStore(runs.folder / "run" / "ledger.sqlite", read_only=True) as store:
        assert store.num_labels == 8


def test_the_slurm_script_is_sound() -> None:
    script = ROOT / "examples" / "slurm" / "train.sbatch"
    bash = shutil.which("bash")
    assert bash is not None
    assert subprocess.run([bash, "-n", str(script)], check=False).returncode == 0
    assert "--signal=TERM@" in script.read_text()
