"""Runs of every kind that are stopped between two checkpoints and go on: the same weights, bit by bit.

One process, two under DDP and two under FSDP2. The run that is left alone and the one that is stopped share a process,
the one that goes on is another.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lightning_rlhf.cli import main
from lightning_rlhf.runtime.checkpoints import damage, history


ROOT = Path(__file__).parents[2]
DRIVER = """
import json, os, sys
from lightning_rlhf.cli import main

for fault, arguments in json.load(open(sys.argv[1])):
    os.environ["FAULT"] = fault
    try:
        main(arguments)
        status = 0
    except SystemExit as stopped:
        status = stopped.code
    if os.environ.get("RANK", "0") == "0":
        print("STATUS", status, flush=True)
"""
COMMON = [
    *("--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.enable_progress_bar=false"),
    *(
        "--trainer.logger=false",
        "--trainer.limit_val_batches=0",
        "--data.heldout=null",
        "--model.lr_scheduler.warmup_steps=5",
    ),
    *("--trainer.callbacks=plugins.Watch", "--trainer.callbacks+=lightning_rlhf.callbacks.HFExport"),
    "--checkpoint_every=100",  # what is there was written on the signal
]
RECORDED = ["--data.prompts.path=pairs.jsonl", "--data.decoding.max_new_tokens=8", "--data.pairs_per_batch=4"]
DRAWN = [
    *("--data.labeler=plugins.Labeler", "--data.labeler.rule=bernoulli", "--data.labeler.reward=plugins.Letters"),
    *("--data.rounds.prompts_per_round=8", "--data.pairs_per_batch=4", "--data.decoding.max_new_tokens=6"),
    *("--data.decoding.rows=8", "--data.prompt_options.max_prompt_tokens=200"),
]
LORA = ["--model.lora.r=2", "--model.lora.alpha=4"]
DROPOUT = [*LORA, "--model.lora.dropout=0.2", "--model.optimizer.lr=1e-2"]
# a name: where it is stopped, its options, and those of several processes in place of some
RECIPES: dict[str, tuple[str, list[str]]] = {
    # 12 rows, 3 steps an epoch; in passes of a few tokens
    "dpo": ("step5=term", ["--config=dpo_offline", *RECORDED, "--model.optimizer.lr=1e-3", "--trainer.max_epochs=3"]),
    # the optimizer has float32 copies of the weights
    "dpo_bfloat16": (
        "step5=term",
        [
            *("--config=dpo_offline", *RECORDED, "--model.options.dtype=bfloat16", "--model.optimizer.lr=1e-3"),
            *("--trainer.gradient_clip_val=1.0", "--trainer.max_epochs=3"),
        ],
    ),
    "dpo_lora": (
        "step4=term",
        [
            "--config=dpo_offline",
            *RECORDED,
            *DROPOUT,
            "--data.batching.max_tokens_per_micro_batch=40",
            "--trainer.max_epochs=3",
        ],
    ),
    "reward_model": (
        "step4=term",
        ["--config=reward_model", *RECORDED, "--model.optimizer.lr=1e-3", "--trainer.max_epochs=3"],
    ),
    "sft": (
        "step4=term",
        [
            *("--config=sft", "--data.prompts.path=completions.jsonl", "--data.max_completion_tokens=8"),
            *("--data.rows_per_batch=4", "--model.optimizer.lr=1e-3", "--trainer.max_epochs=3"),
        ],
    ),
    # while a round is labeled: the second half of round 1 in one process, round 3 in two
    "online": (
        "label4=term",
        [
            "--config=dpo_online",
            *DRAWN,
            "--data.rounds.replay=2",
            "--model.optimizer.lr=1e-3",
            "--trainer.max_epochs=4",
        ],
    ),
    # in the second pass over round 1; the reference moves along
    "iterative": (
        "step7=term",
        [
            *("--config=dpo_iterative", *DRAWN, *DROPOUT, "--model.reference.rule=previous", "--trainer.max_epochs=6"),
        ],
    ),
    # two steps an epoch and two epochs a round
    "policy_gradient": (
        "step7=term",
        [
            *("--config=rlhf", "--model.loss.clip=0.2", "--model.optimizer.lr=1e-3", "--data.reward=plugins.Letters"),
            *(
                "--data.shaping.normalize_rewards=mean_std",
                "--data.rounds.prompts_per_round=6",
                "--data.prompts_per_batch=3",
            ),
            *(
                "--data.responses_per_prompt=2",
                "--data.rounds.epochs_per_round=2",
                "--data.prompt_options.max_prompt_tokens=200",
            ),
            *("--data.decoding.max_new_tokens=5", "--data.decoding.rows=6", "--trainer.max_epochs=6"),
        ],
    ),
    # the discriminator has been trained in the round, and has to be as it was
    "rlgaf": (
        "step7=term",
        [
            *("--config=rlgaf", "--model.optimizer.lr=1e-3", "--data.reward.discriminator=NGramDiscriminator"),
            *("--data.prompts.path=completions.jsonl", "--data.reward.demonstrations.path=completions.jsonl"),
            *("--data.reward.steps.first=8", "--data.rounds.prompts_per_round=6", "--data.rounds.epochs_per_round=2"),
            *("--data.prompts_per_batch=3", "--data.responses_per_prompt=2", "--data.decoding.max_new_tokens=5"),
            *("--data.decoding.rows=6", "--trainer.max_epochs=6"),
        ],
    ),
}
GAE = ["--model.advantage=GAE", "--model.value.learning_rate=2e-3"]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


class Place:
    """A folder with rows and plug-ins, and runs in it.

    Args:
        runs: the folder of the fixture.
        launcher: what starts the processes.
        options: of all runs.
    """

    def __init__(self, runs: Any, launcher: list[str], *options: str) -> None:
        self.folder, self.policy, self.launcher, self.options = runs.folder, runs.policy, launcher, options
        (self.folder / "driver.py").write_text(DRIVER)
        answers = [("yes" * (n % 3 + 1), "no" * (n % 4 + 1)) for n in range(12)]
        pairs = [{"prompt": f"{n}?", "chosen": yes, "rejected": no} for n, (yes, no) in enumerate(answers)]
        (self.folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
        rows = [{"prompt": f"{n}?", "completion": yes} for n, (yes, _) in enumerate(answers)]
        (self.folder / "completions.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def command(self, name: str, run_dir: str, *more: str) -> list[str]:
        """Arguments of a run."""
        model = "backbone" if name == "reward_model" else "policy"
        own = [*RECIPES[name][1], *COMMON, *self.options, *more]
        return ["fit", *own, f"--model.{model}={self.policy}", f"--run_dir={run_dir}"]

    def drive(self, *jobs: tuple[str, list[str]]) -> list[int]:
        """Run commands one after the other in the same processes; their exit statuses."""
        status, said = self.start(*jobs)
        assert status == 0, said[-6000:]
        return [int(line.split()[1]) for line in said.splitlines() if line.startswith("STATUS")]

    def start(self, *jobs: tuple[str, list[str]]) -> tuple[int, str]:
        """The same; returns the status of the launcher, and all that was printed."""
        (self.folder / "jobs.json").write_text(json.dumps(jobs))
        done = subprocess.run(
            [sys.executable, *self.launcher, "driver.py", "jobs.json"],
            cwd=self.folder,
            env={
                **os.environ,
                "PYTHONPATH": f"{self.folder}:{ROOT}",
                "PYTHONHASHSEED": "0",
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            text=True,
            timeout=580,
        )
        self.said = done.stdout + done.stderr
        return done.returncode, self.said

    def stop_and_go_on(self, recipes: dict[str, list[str]]) -> None:
        """Run each recipe straight and with a stop, then compare what they exported."""
        jobs = []
        for name, more in recipes.items():
            jobs.append(("", self.command(name, f"{name}/straight", *more)))
            jobs.append((RECIPES[name][0], self.command(name, f"{name}/stopped", *more)))
        assert self.drive(*jobs) == [0, 143] * len(recipes), self.said[-6000:]
        for name in recipes:
            assert not (self.folder / name / "stopped" / "model").exists()
            assert damage(self.folder / name / "stopped" / "checkpoints" / "last.ckpt") is None
        again = [("", self.command(name, f"{name}/stopped", *more)) for name, more in recipes.items()]
        assert self.drive(*again) == [0] * len(recipes), self.said[-6000:]
        different = [name for name in recipes if not self.equal(name)]
        assert different == []

    def equal(self, name: str) -> bool:
        """Whether the stopped run of a recipe ended with the weights of the other one."""
        straight, stopped = (exported(self.folder / name / run / "model") for run in ("straight", "stopped"))
        assert straight.keys() == stopped.keys()
        return all(torch.equal(straight[key], stopped[key]) for key in straight)


def exported(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder that transformers opens."""
    found = {path.name: load_file(path) for path in sorted(folder.rglob("*.safetensors"))}
    assert found
    return {f"{name}/{key}": tensor for name, tensors in found.items() for key, tensor in tensors.items()}


@pytest.mark.slow
def test_one_process_goes_on_as_if_it_had_not_stopped(runs: Any) -> None:
    more = {name: GAE if name == "policy_gradient" else [] for name in RECIPES}
    Place(runs, [], "--config=trainer/cpu").stop_and_go_on(more)


@pytest.mark.slow
def test_two_processes_go_on_as_if_they_had_not_stopped(runs: Any) -> None:
    more = {name: GAE if name == "policy_gradient" else [] for name in RECIPES}
    Place(runs, TWO, "--config=trainer/ddp", "--trainer.devices=2").stop_and_go_on(more)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "whole"])
def test_two_sharded_processes_go_on_as_if_they_had_not_stopped(runs: Any, sharded: bool) -> None:
    place = Place(
        *(runs, TWO, "--config=trainer/fsdp", "--trainer.devices=2"),
        f"--trainer.strategy.save_distributed_checkpoint={str(sharded).lower()}",
    )
    # a reference of its own that moves is sharded too
    own = {"policy_gradient": GAE, "online": ["--model.reference.rule=ema"]}
    more = {name: own.get(name, []) for name in RECIPES}
    if not sharded:
        more = {name: more[name] for name in ("dpo_bfloat16", "dpo_lora", "reward_model", "online")}
    place.stop_and_go_on(more)


@pytest.mark.slow
def test_sharded_checkpoints_that_are_damaged_or_cannot_be_written(runs: Any) -> None:
    place = Place(runs, TWO, "--config=trainer/fsdp", "--trainer.devices=2")
    often = ["--checkpoint_every=1"]
    longer = [*often, "--trainer.max_epochs=4"]
    straight, run = place.command("dpo", "dpo/straight", *longer), place.command("dpo", "dpo/stopped", *often)
    assert place.drive(("", straight), ("", run)) == [0, 0]
    checkpoints = place.folder / "dpo" / "stopped" / "checkpoints"
    names = [path.name for path in history(checkpoints)]
    assert names == ["epoch=2-step=9.ckpt", "epoch=1-step=6.ckpt"]
    shard = next((checkpoints / "last.ckpt").glob("__1_*.distcp"))  # what rank one wrote
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])

    status, said = place.start(("", place.command("dpo", "dpo/stopped", *longer)))
    assert status != 0
    assert "is damaged: its file __1_0.distcp is too short. The one before is whole" in said
    older = f"--ckpt_path=dpo/stopped/checkpoints/{names[1]}"
    assert older in said

    status, said = place.start(("", place.command("dpo", "dpo/other", *longer, older, "--model.beta=0.5")))
    assert status != 0
    assert "model.init_args.beta: 0.1 in the checkpoint, 0.5 now" in said

    status, said = place.start(("step7=limit50000", place.command("dpo", "dpo/stopped", *longer, older)))
    assert status != 0
    assert re.search(
        r"OSError: .*(raise the limit \(ulimit -f\)|check that the disk has room).*earlier checkpoints are kept", said
    )
    assert sorted(path.name for path in checkpoints.iterdir()) == [*reversed(names), "last.ckpt"]

    assert place.drive(("", place.command("dpo", "dpo/stopped", *longer, older))) == [0]
    assert place.equal("dpo")
    assert [path.name for path in history(checkpoints)] == ["epoch=3-step=12.ckpt", names[0]]
    assert [damage(path) for path in history(checkpoints)] == [None, None]


@pytest.mark.parametrize("name", ["recorded", "sampled"])
def test_a_run_that_max_steps_ended_goes_on_within_its_epoch(
    name: str, tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning counts the epoch that was cut short as done, and would leave out its other steps."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Name {n}", "chosen": " yes", "rejected": f" no {n}"} for n in range(12)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recorded = ["--config=dpo_offline", *RECORDED]
    sampled = ["--config=dpo_online", "--data.rounds.prompts_per_round=8", "--data.pairs_per_batch=4"]
    sampled += ["--data.labeler.reward=LexiconReward", "--data.decoding.max_new_tokens=6"]
    # 3 steps an epoch, or 2 a round
    command = ["fit", *(recorded if name == "recorded" else sampled), f"--model.policy={tiny_policy}", *DROPOUT]
    command += [option for option in COMMON if "plugins" not in option]
    command += ["--trainer.max_epochs=3", "--trainer.callbacks=lightning_rlhf.callbacks.HFExport"]
    # within the first epoch, again within it or at its end, within the second one
    for folder, ends in (("whole", (5,)), ("parts", (1, 2, 5))):
        for steps in ends:
            main([*command, f"--run_dir={folder}", f"--trainer.max_steps={steps}"])
    whole, parts = (load_file(tmp_path / folder / "model" / "model.safetensors") for folder in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert json.loads((tmp_path / "parts" / "run.json").read_text())["starts"][-1]["continued_from"]
    assert torch.load(tmp_path / "parts" / "checkpoints" / "last.ckpt", weights_only=False)["global_step"] == 5
