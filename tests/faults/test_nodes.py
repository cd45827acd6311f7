"""The scripts for several nodes, with "nodes" of one process each on this machine; one is killed and replaced."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_rlhf.ledger.store import PreferenceStore


ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


def options(runs: Any, prompts: int, epochs: int, *more: str) -> list[str]:
    return [
        *("--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.callbacks=null"),
        *("--trainer.enable_progress_bar=false", f"--trainer.max_epochs={epochs}", "--data.heldout=null"),
        *("--data.labeler=plugins.Labeler", "--data.labeler.rule=bernoulli", "--data.labeler.reward=plugins.Letters"),
        *(f"--data.rounds.prompts_per_round={prompts}", "--data.pairs_per_batch=4"),
        *("--data.decoding.max_new_tokens=4", "--data.prompt_options.max_prompt_tokens=200"),
        *(f"--model.policy={runs.policy}", "--run_dir=run", *more),
    ]


def node(runs: Any, given: list[str], **variables: str) -> subprocess.Popen[str]:
    """Start a node of one process."""
    return subprocess.Popen(
        [str(ROOT / "examples/torchrun/node.sh"), *given],
        cwd=runs.folder,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{runs.folder}:{ROOT}",
            # the digests of pairs that the plug-ins note are those of Python
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
            "PROCESSES": "1",
            **variables,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(nodes: list[subprocess.Popen[str]], seconds: float) -> list[str]:
    """Wait for nodes, and return what they said."""
    try:
        said = [one.communicate(timeout=seconds)[0] for one in nodes]
    finally:
        for one in nodes:
            one.kill()
    assert [one.returncode for one in nodes] == [0] * len(nodes), "\n".join(text[-3000:] for text in said)
    return said


@pytest.mark.slow
def test_two_local_nodes_train_by_the_torchrun_script(runs: Any) -> None:
    address = f"127.0.0.1:{free_port()}"
    ended([node(runs, options(runs, 4, 2), NODES="2", NODE=str(n), ADDRESS=address) for n in (0, 1)], 240)
    with PreferenceStore(runs.folder / "run" / "ledger.sqlite", read_only=True) as store:
        assert store.num_labels == 8


def trained(folder: Path) -> tuple[dict[str, torch.Tensor], Counter[str]]:
    """Weights at the end, and the pairs that were labeled."""
    content = torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    return content["state_dict"], Counter((folder / "bought.txt").read_text().split())


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("NODE_TESTS") != "required", reason="two minutes of CPU: make test-nodes, NODE_TESTS=required"
)
def test_a_node_that_is_killed_and_replaced_leaves_the_weights_and_labels_of_a_run_without_fault(
    make_runs: Callable[[str], Any],
) -> None:
    straight, killed = make_runs("straight"), make_runs("killed")
    # two steps a round: the third one follows the first checkpoint, and the second purchase of labels
    given = options(straight, 8, 3, "--trainer.callbacks=plugins.Watch", "--checkpoint_every=1")
    common = {"NODES": "3", "RESTARTS": "2"}
    address = f"127.0.0.1:{free_port()}"
    ended([node(straight, given, ADDRESS=address, **common) for _ in range(3)], 900)

    port = free_port()
    common |= {"ADDRESS": f"127.0.0.1:{port}"}
    nodes = [node(killed, given, **common)]
    end = time.monotonic() + 900
    try:
        # the node that comes first holds the list of nodes, and must live
        while not listens(port):
            assert time.monotonic() < end and nodes[0].poll() is None
            time.sleep(0.1)
        nodes += [node(killed, given, **common, FAULT=fault) for fault in ("", "step3=sleep900")]
        while not list(killed.folder.glob("reached.*")):
            assert time.monotonic() < end and all(one.poll() is None for one in nodes)
            time.sleep(0.1)
        nodes[2].kill()
        nodes[2].communicate()
        nodes[2] = node(killed, given, **common)
    except BaseException:
        for one in nodes:
            one.kill()
        raise
    said = "".join(ended(nodes, 900))
    assert "continuing from run/checkpoints/last.ckpt" in said

    (expected, bought), (weights, bought_again) = trained(straight.folder), trained(killed.folder)
    # DDP orders its buckets anew after the first step of a start, and with them the sums over three ranks
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-8)
    assert bought_again == bought and sum(bought.values()) == 24


def test_the_slurm_script_is_sound() -> None:
    script = ROOT / "examples" / "slurm" / "train.sbatch"
    bash = shutil.which("bash")
    assert bash is not None
    assert subprocess.run([bash, "-n", str(script)], check=False).returncode == 0
    assert "--signal=TERM@" in script.read_text()
