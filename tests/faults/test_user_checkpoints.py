"""Whatever a user's settings are, the run keeps what it continues from; what cannot be kept is said or refused."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_rlhf.callbacks import NonFiniteGuard
from lightning_rlhf.cli import main
from lightning_rlhf.runtime.checkpoints import RunCheckpoint, history


def fit(folder: Path, policy: Path, trainer: dict[str, Any], *options: str) -> None:
    """Train on two recorded pairs, a step each, so that an epoch has two steps."""
    settings = {"logger": False, "callbacks": None, **trainer}
    config = folder / "mine.yaml"
    config.write_text(yaml.safe_dump({"trainer": settings}))
    main(
        [
            *("fit", "--config", "dpo_offline", "--config", str(config), "--trainer.accelerator=cpu"),
            *("--trainer.precision=32-true", "--trainer.enable_progress_bar=false", f"--model.policy={policy}"),
            *("--data.heldout=null", f"--data.prompts.path={folder / 'rows.jsonl'}", "--data.pairs_per_batch=1"),
            *("--data.decoding.max_new_tokens=8", f"--run_dir={folder / 'run'}", *options),
        ]
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rows = [{"prompt": f"{n}?", "chosen": "yes", "rejected": "no"} for n in range(2)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def saver(**options: Any) -> dict[str, Any]:
    return {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": options}


@pytest.mark.parametrize(
    "callbacks",
    [
        [saver(save_top_k=0)],
        [saver(save_last=True, save_top_k=-1)],
        [saver(every_n_train_steps=1, dirpath="run/checkpoints", save_last=True)],
        [saver(monitor="train/loss", dirpath="mine"), saver(every_n_epochs=5)],
        {"class_path": "lightning.pytorch.callbacks.OnExceptionCheckpoint", "init_args": {"dirpath": "mine"}},
    ],
    ids=["none", "default folder", "our folder", "own folder", "on exception"],
)
def test_a_users_own_checkpoints_stand_beside_ours(
    folder: Path, tiny_policy: Path, capsys: pytest.CaptureFixture[str], callbacks: Any
) -> None:
    ours = folder / "run" / "checkpoints"
    for epochs in (1, 2):
        fit(folder, tiny_policy, {"callbacks": callbacks}, f"--trainer.max_epochs={epochs}")
        assert ("continuing from" in capsys.readouterr().out) == (epochs > 1)
        assert (ours / "last.ckpt").resolve() == history(ours)[0].resolve()
        assert history(ours)[0].name == f"epoch={epochs - 1}-step={2 * epochs}.ckpt"
    names = {path.name for path in ours.iterdir()} - {"user"}
    assert names == {"last.ckpt", "epoch=1-step=4.ckpt", "epoch=0-step=2.ckpt"}
    if callbacks in ([saver(save_last=True, save_top_k=-1)],):
        assert (ours / "user" / "last.ckpt").exists()


def test_last_is_ours(folder: Path, tiny_policy: Path) -> None:
    mine = {"callbacks": [saver(save_last=True, dirpath="mine")]}
    fit(folder, tiny_policy, mine, "--trainer.max_epochs=1")
    wrong = torch.load(folder / "mine" / "last.ckpt", weights_only=True)
    torch.save({**wrong, "global_step": 77}, folder / "mine" / "last.ckpt")
    fit(folder, tiny_policy, mine, "--trainer.max_epochs=2", "--ckpt_path=last")
    assert history(folder / "run" / "checkpoints")[0].name == "epoch=1-step=4.ckpt"


def test_checkpoints_by_steps_and_by_minutes(folder: Path, tiny_policy: Path) -> None:
    ours = folder / "run" / "checkpoints"
    rare = ["--trainer.max_epochs=1", "--checkpoint_every=100"]
    fit(folder, tiny_policy, {}, *rare, "--checkpoint_every_steps=1", "--checkpoint_every_minutes=null")
    assert [path.name for path in history(ours)] == ["epoch=0-step=2.ckpt", "epoch=0-step=1.ckpt"]
    held = torch.load(ours / "epoch=0-step=1.ckpt", weights_only=True)
    assert held["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"] == 1
    again = folder / "again"
    fit(folder, tiny_policy, {}, *rare, "--checkpoint_every_minutes=1e-9", f"--run_dir={again}")
    assert [path.name for path in history(again / "checkpoints")] == ["epoch=0-step=2.ckpt", "epoch=0-step=1.ckpt"]
    for wrong in ("--checkpoint_every_steps=0", "--checkpoint_every_minutes=0", "--checkpoint_every=0"):
        with pytest.raises((ValueError, SystemExit), match=r"checkpoint_every|2"):
            fit(folder, tiny_policy, {}, *rare, wrong, f"--run_dir={folder / 'third'}")


def test_what_settings_take_away_is_said(
    folder: Path, tiny_policy: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    limited = {"enable_checkpointing": False, "limit_train_batches": 1}
    fit(folder, tiny_policy, limited, "--trainer.max_epochs=1")
    said = caplog.text
    assert "enable_checkpointing=false: this run keeps no checkpoints" in said
    assert "leaves out FinalValidation, HFExport, Summary: no model/ folder" in said
    assert "limit_train_batches=1: pairs that are sampled and labeled beyond" in said
    assert not (folder / "run" / "checkpoints").exists()
    del capsys


def test_a_loss_that_is_nan_is_caught_whatever_the_callbacks_are(
    folder: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "broken.py").write_text(
        "from lightning_rlhf.losses import DPOLoss\n"
        "class Broken(DPOLoss):\n"
        "    def __call__(self, *args, **kwargs):\n"
        "        return super().__call__(*args, **kwargs) * float('nan')\n"
    )
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(FloatingPointError, match=r"the loss or its gradient is not finite in step 0"):
        fit(folder, tiny_policy, {}, "--trainer.max_epochs=1", "--model.loss=broken.Broken")


def test_a_guard_of_the_users_own_stays(folder: Path, tiny_policy: Path) -> None:
    guard = {"class_path": "lightning_rlhf.callbacks.NonFiniteGuard", "init_args": {"action": "skip"}}
    seen = []

    class Look(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            seen.extend(c.action for c in trainer.callbacks if isinstance(c, NonFiniteGuard))  # type: ignore[attr-defined]

    sys.modules["look"] = type(sys)("look")
    sys.modules["look"].Look = Look  # type: ignore[attr-defined]
    fit(folder, tiny_policy, {"callbacks": [guard, {"class_path": "look.Look"}]}, "--trainer.max_epochs=1")
    assert seen == ["skip"]


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"barebones": True}, "barebones=true switches off checkpoints"),
        ({"callbacks": [{"class_path": "lightning.pytorch.callbacks.LearningRateFinder"}]}, "LearningRateFinder would"),
        ({"plugins": [{"class_path": "lightning.pytorch.plugins.io.AsyncCheckpointIO"}]}, "AsyncCheckpointIO"),
        (
            {
                "callbacks": [
                    {"class_path": "lightning_rlhf.runtime.checkpoints.RunCheckpoint", "init_args": {"folder": "x"}}
                ]
            },
            "continues from",
        ),
    ],
)
def test_what_cannot_be_made_safe_is_refused(
    folder: Path, tiny_policy: Path, capsys: pytest.CaptureFixture[str], trainer: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, SystemExit)) as caught:
        fit(folder, tiny_policy, trainer, "--trainer.max_epochs=1")
    assert message in str(caught.value) + capsys.readouterr().err


def test_intervals_out_of_range_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint_every_steps"):
        RunCheckpoint(tmp_path, every_n_steps=0)
    with pytest.raises(ValueError, match="checkpoint_every_minutes"):
        RunCheckpoint(tmp_path, every_n_minutes=0)


# ---- signals and kills ---------------------------------------------------------------------------------------------

RARE = ("--checkpoint_every=100", "--data.pairs_per_batch=2", "--trainer.max_epochs=2")  # four steps a round
MINE = ("--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint", "--trainer.callbacks.save_top_k=0")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.slow
def test_ctrl_c_and_a_kill_within_an_epoch_lose_nothing(make_runs: Callable[[str], Any]) -> None:
    straight, runs = make_runs("straight"), make_runs("stopped")
    status, said = straight.run(*RARE)
    assert status == 0, said

    status, said = runs.run(*RARE, *MINE, fault="step1=int")
    assert status == 130, said
    assert "stopped by Ctrl-C (SIGINT) after step 1: checkpoint" in said
    assert "Traceback" not in said
    # a kill within the second round, a step behind a checkpoint of the interval
    status, said = runs.run(*RARE, *MINE, "--checkpoint_every_steps=1", fault="step7=die")
    assert status == -signal.SIGKILL, said
    last = (runs.folder / "run" / "checkpoints" / "last.ckpt").resolve().name
    assert last == "epoch=1-step=6.ckpt"
    status, said = runs.run(*RARE, *MINE)
    assert status == 0, said
    expected, got = weights(straight.folder), weights(runs.folder)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def wait_for(path: Path, process: Any) -> None:
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.05)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_the_run_at_once(runs: Any) -> None:
    process = runs.start(*RARE, fault="step1=sleep600")
    wait_for(runs.folder / "reached.0", process)
    process.send_signal(signal.SIGINT)
    assert "Ctrl-C again ends the run at once" in next(line for line in process.stderr if "Ctrl-C" in line)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(30) in (130, -signal.SIGINT)


@pytest.mark.slow
def test_ctrl_c_reaches_all_processes_and_one_checkpoint_is_written(runs: Any) -> None:
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")
    process = runs.start(*RARE, "--trainer.devices=2", fault="step1=sleep3", launcher=launcher)
    wait_for(runs.folder / "reached.1", process)
    # as a terminal does: to the launcher and to the ranks, which the launcher sends it once more
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in (*children, str(process.pid)):
        os.kill(int(child), signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert "stopped by Ctrl-C (SIGINT) after step 1: checkpoint" in out, out + err
    assert (runs.folder / "run" / "checkpoints" / "last.ckpt").resolve().name == "epoch=0-step=1.ckpt"


@pytest.mark.slow
def test_slurm_queues_the_job_again_once_the_checkpoint_is_written(
    runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/scontrol.txt\n")
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name, value in {"NTASKS": 1, "JOB_NAME": "train", "JOB_ID": 7, "PROCID": 0, "LOCALID": 0, "NODEID": 0}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    status, said = runs.run(*RARE, fault="step1=usr1")
    assert status == 128 + signal.SIGUSR1, said
    assert "stopped by SIGUSR1 after step 1: checkpoint" in said
    assert "job 7 is queued again" in said
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 7\n"
    assert not list((runs.folder / "run").glob("hpc_ckpt*"))


def test_a_trainer_by_hand_keeps_checkpoints_beside_its_own(tmp_path: Path) -> None:
    from lightning.pytorch.demos.boring_classes import BoringModel

    ours = RunCheckpoint(tmp_path / "checkpoints", every_n_steps=10)
    trainer = L.Trainer(
        default_root_dir=tmp_path,
        max_steps=25,
        limit_val_batches=0,
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(save_last=True), ours],
    )
    trainer.fit(BoringModel())
    assert [path.name for path in history(tmp_path / "checkpoints")] == ["epoch=0-step=25.ckpt", "epoch=0-step=20.ckpt"]
    assert (tmp_path / "checkpoints" / "user" / "last.ckpt").exists()
