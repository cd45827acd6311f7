"""Short runs of the command line in processes of their own, with plug-ins that fail or wait where a test says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
PLUGINS = """
import os, resource, signal, time
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning_rlhf.labelers import RewardLabeler
from lightning_rlhf.rewards import AbstractReward, RewardOutput

HERE = Path(__file__).parent


def at(moment):
    # tells the test where the run is, and does there what the test asked for
    place, _, deed = os.environ.get("FAULT", "").partition("=")
    if place != moment:
        return
    (HERE / f"reached.{os.environ.get('RANK', '0')}").touch()
    if deed in ("term", "int", "hup", "usr1"):
        os.kill(os.getpid(), getattr(signal, f"SIG{deed.upper()}"))
    elif deed.startswith("sleep"):
        time.sleep(float(deed[5:]))
    elif deed.startswith("limit"):  # no file may grow beyond so many bytes from now on
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(deed[5:]),) * 2)
    elif deed.startswith("fill"):  # the file system of this folder
        with open(deed[4:], "wb", buffering=0) as file:
            for size in (2**16, 2**9, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue
    elif deed == "raise":
        raise ConnectionError("the judge is gone")
    elif deed == "die":
        os.kill(os.getpid(), signal.SIGKILL)


class Letters(AbstractReward):
    def score(self, prompts, responses):
        return RewardOutput(torch.tensor([r.text.count("e") - 0.1 * len(r.ids) for r in responses]))


class Labeler(RewardLabeler):
    chunks = 0

    def label(self, comparisons, key):
        self.chunks += 1
        at(f"label{self.chunks}")
        labels = super().label(comparisons, key)
        with open(HERE / "bought.txt", "a") as file:
            for c in comparisons:
                print(hash((c.prompt.ids, c.a.ids, c.b.ids)), file=file)
        return labels


class Watch(Callback):
    def on_train_batch_end(self, trainer, *_):
        at(f"step{trainer.global_step}")
"""
OPTIONS = [
    *("fit", "--config", "dpo_online", "--trainer.accelerator=cpu", "--trainer.precision=32-true"),
    "--trainer.callbacks=plugins.Watch",
    "--trainer.enable_progress_bar=false",
    "--trainer.max_epochs=3",
    "--trainer.limit_val_batches=0",
    "--checkpoint_every=1",
    "--model.optimizer.lr=1e-3",
    "--model.lr_scheduler.warmup_steps=0",
    "--data.heldout=null",
    "--data.labeler=plugins.Labeler",
    "--data.labeler.rule=bernoulli",
    "--data.labeler.reward=plugins.Letters",
    "--data.rounds.prompts_per_round=8",
    "--data.pairs_per_batch=4",
    "--data.decoding.max_new_tokens=6",
    "--data.decoding.rows=8",
    "--data.prompt_options.max_prompt_tokens=200",
]


class Runs:
    """A folder in which runs are started.

    Args:
        folder: where the plug-ins and the run folders lie.
        policy: folder of the tiny model.
    """

    def __init__(self, folder: Path, policy: Path) -> None:
        self.folder, self.policy = folder, policy
        (folder / "plugins.py").write_text(PLUGINS)

    def start(self, *options: str, fault: str = "", launcher: Sequence[str] = ()) -> subprocess.Popen[str]:
        """Start a run; ``fault`` is ``MOMENT=DEED`` of the plug-ins."""
        command = ["-m", "lightning_rlhf", *OPTIONS]
        return subprocess.Popen(
            [sys.executable, *launcher, *command, f"--model.policy={self.policy}", "--run_dir=run", *options],
            cwd=self.folder,
            env={
                **os.environ,
                "PYTHONPATH": f"{self.folder}:{ROOT}",
                "PYTHONHASHSEED": "0",
                "FAULT": fault,
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *options: str, fault: str = "", launcher: Sequence[str] = ()) -> tuple[int, str]:
        """Run to the end; returns the exit status and all that was printed."""
        process = self.start(*options, fault=fault, launcher=launcher)
        try:
            out, err = process.communicate(timeout=240)
        finally:
            process.kill()
        return process.returncode, out + err


@pytest.fixture
def runs(tmp_path: Path, tiny_policy: Path) -> Runs:
    """A fresh folder for runs."""
    return Runs(tmp_path, tiny_policy)


@pytest.fixture
def make_runs(tmp_path: Path, tiny_policy: Path) -> Callable[[str], Runs]:
    """Makes folders for runs by name."""

    def make(name: str) -> Runs:
        (tmp_path / name).mkdir()
        return Runs(tmp_path / name, tiny_policy)

    return make
