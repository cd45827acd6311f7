"""Checkpoints of any callback: written safely, loaded in Python, and exported as model folders."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import AutoPeftModelForCausalLM
from torch.optim import SGD
from transformers import AutoModelForCausalLM

from lightning_rlhf import Decoding, DPOModule, KTOModule, PreferenceDataModule
from lightning_rlhf.callbacks import FinalValidation, WeightAverage
from lightning_rlhf.cli import main
from lightning_rlhf.commands.checkpoint_export import export_checkpoint
from lightning_rlhf.datamodules.options import PreferenceRoundOptions
from lightning_rlhf.labelers import RecordedLabeler
from lightning_rlhf.losses import IPOLoss
from lightning_rlhf.models.load import LoRA
from lightning_rlhf.models.scorer import open_scorer
from lightning_rlhf.modules import RewardModule
from lightning_rlhf.prompts import DatasetPrompts
from lightning_rlhf.runtime.checkpoint_io import SafeCheckpointIO
from lightning_rlhf.samplers import OfflineSampler


ROWS = [{"prompt": f"say {n}: ", "chosen": f"{n}z", "rejected": "yx"} for n in range(5)]


def data(folder: Path) -> PreferenceDataModule:
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    return PreferenceDataModule(
        DatasetPrompts(str(rows)),
        OfflineSampler(),
        RecordedLabeler(),
        heldout=DatasetPrompts(str(rows)),
        pairs_per_batch=5,
        decoding=Decoding(max_new_tokens=8),
        rounds=PreferenceRoundOptions(epochs_per_round=None),
    )


def fitted(folder: Path, module: L.LightningModule, *callbacks: L.Callback, epochs: int = 2) -> ModelCheckpoint:
    """Train on the rows; returns the callback with the best and the last checkpoint."""
    saved = ModelCheckpoint(folder / "saved", monitor="val/loss", save_last=True, filename="best")
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=epochs,
        num_sanity_val_steps=0,
        callbacks=[*callbacks, FinalValidation(), saved],
        plugins=[SafeCheckpointIO()],
        **quiet,
    ).fit(module, datamodule=data(folder))
    return saved


def export(checkpoint: object, out: Path) -> None:
    main(["export", f"--checkpoint={checkpoint}", f"--out={out}"])


def test_a_full_policy(tmp_path: Path, tiny_policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = DPOModule(str(tiny_policy), loss=IPOLoss(), beta=0.3, optimizer=partial(SGD, lr=1e-4, momentum=0.5))
    saved = fitted(tmp_path, module)
    export(saved.last_model_path, tmp_path / "model")
    assert "step 2" in capsys.readouterr().out
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, value in module.policy.state_dict().items():
        assert torch.equal(opened.state_dict()[name], value), name

    loaded = DPOModule.load_from_checkpoint(saved.last_model_path)
    assert isinstance(loaded.loss, IPOLoss)
    assert loaded.beta == 0.3
    (group,) = loaded.optimizer([torch.nn.Parameter(torch.zeros(2))]).param_groups
    assert (group["lr"], group["momentum"]) == (1e-4, 0.5)
    trained = module.policy.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in loaded.policy.state_dict().items())
    # the reference is the model that the run started from
    assert loaded.reference is not None
    with loaded.reference.active() as reference:
        start = AutoModelForCausalLM.from_pretrained(tiny_policy).state_dict()
        assert all(torch.equal(value, start[name]) for name, value in reference.state_dict().items())
    other = DPOModule.load_from_checkpoint(saved.last_model_path, beta=0.7)
    assert other.beta == 0.7

    with pytest.raises(ValueError, match="is not empty"):
        export_checkpoint(saved.last_model_path, str(tmp_path / "model"))
    # there is no run.json: the card has the facts of the checkpoint
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"Trained from `{tiny_policy}` by [DPO]" in card
    assert "| loss | IPOLoss |\n| beta | 0.3 |" in card and "| optimizer steps | 2 |" in card
    assert "labels" not in card and "Results" not in card


def test_an_adapter_and_a_checkpoint_of_another_one(tmp_path: Path, tiny_policy: Path) -> None:
    lora = LoRA(r=2, target_modules=["q_proj"])
    module = KTOModule(str(tiny_policy), lora=lora, optimizer=partial(SGD, lr=1.0))
    saved = fitted(tmp_path, module)
    export(saved.best_model_path, tmp_path / "model")
    opened = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "model" / "adapter"))
    ids = torch.arange(12)[None]
    best = KTOModule.load_from_checkpoint(saved.best_model_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(opened(ids).logits, best.policy(ids).logits)
        assert not torch.equal(opened(ids).logits, AutoModelForCausalLM.from_pretrained(tiny_policy)(ids).logits)
    with pytest.raises(ValueError, match=r"lacks \d+ trained weights of KTOModule.*another adapter"):
        KTOModule.load_from_checkpoint(saved.best_model_path, lora=LoRA(r=2, target_modules=["v_proj"]))


def test_the_average_is_exported_where_there_is_one(tmp_path: Path, tiny_policy: Path) -> None:
    module = DPOModule(str(tiny_policy), optimizer=partial(SGD, lr=1.0))
    saved = fitted(tmp_path, module, WeightAverage(decay=0.5))
    export(saved.last_model_path, tmp_path / "model")
    # the callback has left its average in the module
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(opened[name], value) for name, value in module.policy.state_dict().items())
    raw = torch.load(saved.last_model_path, weights_only=True)["state_dict"]
    assert any(not torch.equal(raw[f"policy.{name}"], value) for name, value in opened.items())


def test_a_reward_model_with_its_moments(tmp_path: Path, tiny_policy: Path) -> None:
    module = RewardModule(str(tiny_policy), optimizer=partial(SGD, lr=0.1))
    saved = fitted(tmp_path, module)
    export(saved.last_model_path, tmp_path / "model")
    opened = open_scorer(str(tmp_path / "model"))
    assert opened.means == pytest.approx(module.scorer.means)
    assert opened.stds == pytest.approx(module.scorer.stds)
    for ours, theirs in zip(opened.parameters(), module.scorer.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_best_and_last_of_the_command_line(tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    main(
        [
            *("fit", "--config=dpo_offline", "--trainer.accelerator=cpu", "--trainer.precision=32-true"),
            *("--trainer.enable_progress_bar=false", f"--model.policy={tiny_policy}", "--data.prompts.path=rows.jsonl"),
            *("--data.heldout=DatasetPrompts", "--data.heldout.path=rows.jsonl", "--data.decoding.max_new_tokens=8"),
            *("--trainer.max_epochs=2", "--model.optimizer.lr=1e-2", "--run_dir=run"),
            *("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor=val/loss"),
            *("--trainer.callbacks.save_last=true",),
        ]
    )
    names = {path.name for path in Path("run/checkpoints/user").iterdir()}
    assert names == {"epoch=1-step=2.ckpt", "last.ckpt"}
    export(next(Path("run/checkpoints").glob("epoch=*-step=1.ckpt")), tmp_path / "earlier")
    export("run/checkpoints/user/last.ckpt", tmp_path / "of_file")
    # a run folder stands for its newest checkpoint; as of 0.1, whose checkpoints do not say their module
    last = Path("run/checkpoints/last.ckpt").resolve()
    content = torch.load(last, weights_only=True)
    del content["class_path"], content["hyper_parameters"]
    torch.save(content, last)
    export("run", tmp_path / "of_run")
    models = [AutoModelForCausalLM.from_pretrained(path).state_dict() for path in ("of_file", "of_run", "run/model")]
    for name, value in models[2].items():
        assert torch.equal(models[0][name], value) and torch.equal(models[1][name], value)

    # the card is the one that the end of the run has written
    written = Path("run/model/README.md").read_text()
    assert "| labels | 5 |" in written and "| val/loss | " in written and f"`{tiny_policy}`" in written
    for name in ("of_file", "of_run"):
        assert Path(name, "README.md").read_text() == written.replace("# run\n", f"# {name}\n")
    earlier = Path("earlier/README.md").read_text()
    assert "| optimizer steps | 1 |" in earlier and "| labels | 5 |" in earlier
    assert earlier != written.replace("optimizer steps | 2", "optimizer steps | 1").replace("# run\n", "# earlier\n")


@pytest.mark.slow
def test_shards_of_two_processes(tmp_path: Path, tiny_policy: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *("-m", "lightning_rlhf", "fit", "--config=dpo_offline", "--config=trainer/fsdp", "--trainer.devices=2"),
            *("--trainer.accelerator=cpu", "--trainer.precision=32-true", f"--model.policy={tiny_policy}"),
            *("--data.prompts.path=rows.jsonl", "--data.decoding.max_new_tokens=8", "--data.pairs_per_batch=2"),
            *("--model.optimizer.lr=1e-2", "--run_dir=run", "--trainer.enable_progress_bar=false"),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_dir()
    assert export_checkpoint(str(tmp_path / "run"), str(tmp_path / "model")) == 3
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tmp_path / "model", tmp_path / "run/model")
    )
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


# -- the plugin --------------------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin, path = SafeCheckpointIO(), tmp_path / "best.ckpt"
    plugin.save_checkpoint({"x": torch.ones(3)}, path)

    def full(*_: object) -> None:
        (tmp_path / ".best.ckpt.partial").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"the disk is full: free some space.*best\.ckpt"):
        plugin.save_checkpoint({"x": torch.zeros(3)}, path)
    assert torch.equal(plugin.load_checkpoint(path, weights_only=True)["x"], torch.ones(3))
    assert [entry.name for entry in tmp_path.iterdir()] == ["best.ckpt"]


def test_a_damaged_file_is_not_loaded(tmp_path: Path) -> None:
    plugin, path = SafeCheckpointIO(), tmp_path / "best.ckpt"
    plugin.save_checkpoint({"x": torch.arange(1000.0)}, path)
    plugin.load_checkpoint(path, weights_only=True)
    whole = path.read_bytes()
    path.write_bytes(whole[:-2000] + bytes([whole[-2000] ^ 1]) + whole[-1999:])
    with pytest.raises(ValueError, match=r"best\.ckpt is damaged"):
        plugin.load_checkpoint(path, weights_only=True)
