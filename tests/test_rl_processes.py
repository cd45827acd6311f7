"""Policy gradients in real processes: two under DDP equal one, and a run that is killed buys no score twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_rlhf.ledger.rollouts import RolloutTable
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.types import Rollout


# A user's file: a reward that kills its own process at a chosen moment, and notes every score that it gave.
PLUGINS = """
import os, signal
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning_rlhf.generation.rollouts import RolloutGenerator
from lightning_rlhf.rewards import AbstractReward, RewardOutput

HERE = Path(__file__).parent


def die_at(moment):
    if os.environ.get("DIE_AT") == moment:
        os.kill(os.getpid(), signal.SIGKILL)


class Bytes(AbstractReward):
    chunks = 0

    def score(self, prompts, responses):
        self.chunks += 1
        die_at(f"scoring chunk {self.chunks}")
        with open(HERE / "scored.txt", "a") as file:
            for response in responses:
                print(response.ids, file=file)
        values = torch.tensor([float(sum(token % 7 for token in r.ids)) / 10 for r in responses])
        return RewardOutput(values, values / 3)


class Killer(Callback):
    def on_train_batch_end(self, trainer, *_):
        die_at(f"training step {trainer.global_step}")


class Drawer(RolloutGenerator):
    chunks = 0

    def generate(self, requests):
        Drawer.chunks += 1
        die_at(f"sampling chunk {Drawer.chunks}")
        return super().generate(requests)


import lightning_rlhf.modules.policy_gradient
lightning_rlhf.modules.policy_gradient.RolloutGenerator = Drawer
"""
OPTIONS = [
    *("-m", "lightning_rlhf", "fit", "--config", "rlhf"),
    *("--trainer.callbacks=plugins.Killer", "--trainer.callbacks+=lightning_rlhf.callbacks.RolloutMonitor"),
    *(
        "--trainer.callbacks+=lightning_rlhf.callbacks.HFExport",
        "--trainer.callbacks+=lightning_rlhf.callbacks.Summary",
    ),
    *("--trainer.max_epochs=4", "--trainer.check_val_every_n_epoch=9", "--trainer.enable_progress_bar=false"),
    *("--checkpoint_every=1", "--trainer.accelerator=cpu", "--trainer.precision=32-true", "--data.heldout=null"),
    *("--model.optimizer.lr=1e-3", "--model.value.learning_rate=2e-3", "--model.lr_scheduler.warmup_steps=0"),
    *(
        "--model.advantage=GAE",
        "--model.loss.clip=0.2",
        "--model.loss.aggregation=token_mean",
        "--model.loss.whiten_advantages=true",
    ),
    *(
        "--data.reward=UncertaintyPenalty",
        "--data.reward.reward=plugins.Bytes",
        "--data.shaping.normalize_rewards=mean_std",
    ),
    *("--data.rounds.prompts_per_round=6", "--data.prompts_per_batch=4", "--data.responses_per_prompt=2"),
    *(
        "--data.rounds.epochs_per_round=2",
        "--data.shaping.missing_eos_penalty=0.5",
        "--data.prompt_options.max_prompt_tokens=200",
    ),
    *("--data.decoding.max_new_tokens=5", "--data.decoding.rows=6", "--data.decoding.temperature=0.8"),
]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def run(folder: Path, policy: Path, name: str, *options: str, die_at: str = "") -> subprocess.CompletedProcess[str]:
    launcher = TWO if "--trainer.devices=2" in options else []
    return subprocess.run(
        [sys.executable, *launcher, *OPTIONS, f"--model.policy={policy}", *options, f"--run_dir={name}"],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": f"{folder}:{Path(__file__).parents[1]}",
            "OMP_NUM_THREADS": "1",
            "DIE_AT": die_at,
        },
        capture_output=True,
        text=True,
        timeout=400,
    )


def rollouts(folder: Path) -> list[Rollout]:
    with PreferenceStore(folder / "ledger.sqlite", read_only=True) as store:
        return [found for index in store.rounds() for _, _, found in RolloutTable(store).rollouts(index)]


def place(tmp_path: Path, name: str) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "plugins.py").write_text(PLUGINS)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overlay", "options"),
    [
        ("trainer/ddp", []),
        ("trainer/fsdp", []),
        ("trainer/fsdp", ["--model.advantage=RLOO", "--model.kl.placement=loss_k3", "--model.loss.aggregation=sum"]),
    ],
    ids=["ddp_ppo", "fsdp_ppo", "fsdp_rloo"],
)
def test_two_processes_equal_one(tmp_path: Path, tiny_policy: Path, overlay: str, options: list[str]) -> None:
    folder = place(tmp_path, "here")
    for name, more in (("one", []), ("two", [f"--config={overlay}", "--trainer.devices=2"])):
        done = run(folder, tiny_policy, name, *more, *options)
        assert done.returncode == 0, done.stderr[-4000:]
    one, two = rollouts(folder / "one"), rollouts(folder / "two")
    assert len(one) == len(two) == 24
    for a, b in zip(one, two, strict=True):
        assert (a.prompt, a.response.ids) == (b.prompt, b.response.ids)
        assert a.reward == pytest.approx(b.reward, abs=1e-9)
        assert a.values == (b.values and pytest.approx(b.values, abs=1e-4))
    summaries = [json.loads((folder / name / "summary.json").read_text()) for name in ("one", "two")]
    assert summaries[0]["labels"] == summaries[1]["labels"] == 24
    single, several = (AutoModelForCausalLM.from_pretrained(folder / name / "model") for name in ("one", "two"))
    start = AutoModelForCausalLM.from_pretrained(tiny_policy)
    assert max((p - q).abs().max().item() for p, q in zip(single.parameters(), start.parameters(), strict=True)) > 1e-3
    for p, q in zip(single.parameters(), several.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_a_killed_run_buys_no_score_twice_and_ends_with_the_same_weights(tmp_path: Path, tiny_policy: Path) -> None:
    straight, killed = place(tmp_path, "straight"), place(tmp_path, "killed")
    done = run(straight, tiny_policy, "run")
    assert done.returncode == 0, done.stderr[-4000:]
    # two chunks and four steps a round; a checkpoint after every epoch of two steps
    for moment in ("sampling chunk 2", "scoring chunk 2", "training step 3", "scoring chunk 1", "training step 7"):
        died = run(killed, tiny_policy, "run", die_at=moment)
        assert died.returncode == -signal.SIGKILL, f"{moment}: {died.stderr[-4000:]}"
    done = run(killed, tiny_policy, "run")
    assert done.returncode == 0, done.stderr[-4000:]
    expected, got = (
        torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (straight, killed)
    )
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert rollouts(straight / "run") == rollouts(killed / "run")
    assert (killed / "scored.txt").read_text() == (straight / "scored.txt").read_text()
