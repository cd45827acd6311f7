"""Runs that are killed with SIGKILL while they sample, label and train, and are started again with the same command."""

from __future__ import annotations

import csv
import os
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch


# A user's file: plug-ins that kill their own process at a chosen moment, and note every label that was handed over.
PLUGINS = """
import os, signal
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning_rlhf.labelers import RewardLabeler
from lightning_rlhf.rewards import AbstractReward, RewardOutput
from lightning_rlhf.samplers import PILAFSampler

HERE = Path(__file__).parent


def die_at(moment):
    if os.environ.get("DIE_AT") == moment:
        os.kill(os.getpid(), signal.SIGKILL)


class Letters(AbstractReward):
    def score(self, prompts, responses):
        return RewardOutput(torch.tensor([r.text.count("e") - 0.1 * len(r.ids) for r in responses]))


class Sampler(PILAFSampler):
    chunks = 0

    def sample(self, prompts, engine, key):
        self.chunks += 1
        die_at(f"sampling chunk {self.chunks}")
        return super().sample(prompts, engine, key)


class Labeler(RewardLabeler):
    chunks = 0

    def label(self, comparisons, key):
        self.chunks += 1
        die_at(f"labeling chunk {self.chunks}")
        labels = super().label(comparisons, key)
        with open(HERE / "bought.txt", "a") as file:
            for comparison in comparisons:
                print(hash((comparison.prompt.ids, comparison.a.ids, comparison.b.ids)), file=file)
        return labels


class Killer(Callback):
    def on_train_batch_end(self, trainer, *_):
        die_at(f"training step {trainer.global_step}")
"""

COMMAND = [
    *(sys.executable, "-m", "lightning_rlhf", "fit", "--config", "dpo_online", "--config", "trainer/cpu"),
    "--trainer.callbacks=plugins.Killer",
    "--trainer.callbacks+=lightning_rlhf.callbacks.RewardMonitor",
    "--trainer.callbacks+=lightning_rlhf.callbacks.Summary",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.max_epochs=3",
    "--trainer.check_val_every_n_epoch=3",
    "--checkpoint_every=1",
    "--model.optimizer.lr=1e-3",
    "--data.heldout.limit=4",
    "--data.sampler=plugins.Sampler",
    "--data.labeler=plugins.Labeler",
    "--data.labeler.rule=bernoulli",
    "--data.labeler.reward=plugins.Letters",
    "--data.rounds.prompts_per_round=8",
    "--data.pairs_per_batch=4",
    "--data.rounds.replay=2",
    "--data.decoding.max_new_tokens=6",
    "--data.decoding.rows=8",
    "--data.prompt_options.max_prompt_tokens=200",
]


def run(folder: Path, policy: Path, run_dir: str, die_at: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, f"--model.policy={policy}", f"--run_dir={run_dir}"],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": f"{folder}:{Path(__file__).parents[1]}",
            "DIE_AT": die_at,
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def points(folder: Path) -> list[tuple[str, int, str]]:
    """Points of all curves in the CSV files of all starts: name, step and value."""
    found = []
    for file in folder.glob("metrics/version_*/metrics.csv"):
        for row in csv.DictReader(file.open(newline="")):
            step = int(row.pop("step"))
            found += [
                (name, step, value) for name, value in row.items() if value and name.startswith(("train/", "val/"))
            ]
    return sorted(found)


@pytest.mark.slow
def test_a_killed_run_buys_no_label_twice_and_ends_with_the_same_weights(tmp_path: Path, tiny_policy: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for folder in (straight, killed):
        folder.mkdir()
        (folder / "plugins.py").write_text(PLUGINS)
    done = run(straight, tiny_policy, "run")
    assert done.returncode == 0, done.stderr

    # two chunks a round: two deaths in round 0, one in round 1 after a checkpoint, two in round 2
    for moment in ("sampling chunk 2", "labeling chunk 2", "training step 3", "sampling chunk 1", "training step 8"):
        died = run(killed, tiny_policy, "run", die_at=moment)
        assert died.returncode == -signal.SIGKILL, f"{moment}: {died.stderr}"
    done = run(killed, tiny_policy, "run")
    assert done.returncode == 0, done.stderr

    expected, got = weights(straight / "run"), weights(killed / "run")
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)

    # each point of a curve is there once, wherever the run was killed
    assert points(killed / "run") == points(straight / "run")
    steps = [step for name, step, _ in points(killed / "run") if name == "train/reward"]
    assert steps == [1, 5, 9]

    bought = Counter((killed / "bought.txt").read_text().split())
    assert sum(bought.values()) == 24
    ledger = sqlite3.connect(killed / "run" / "ledger.sqlite")
    assert ledger.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    attempts = ledger.execute("SELECT COUNT(*) FROM attempts GROUP BY comparison").fetchall()
    assert attempts == [(1,)] * 24
