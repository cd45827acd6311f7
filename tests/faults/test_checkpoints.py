"""Checkpoints that are damaged, of another config, or cannot be written: refused, with what to do."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed.checkpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_rlhf.cli import main
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.runtime.checkpoints import RunCheckpoint, check_writable, checked, damage, explained, history


def fit(folder: Path, policy: Path, *options: str) -> None:
    main(
        [
            *("fit", "--config", "dpo_offline", "--trainer.accelerator=cpu", "--trainer.precision=32-true"),
            *("--trainer.enable_progress_bar=false", "--trainer.logger=false", "--trainer.callbacks=null"),
            *(f"--model.policy={policy}", "--data.heldout=null", f"--data.prompts.path={folder / 'rows.jsonl'}"),
            *("--data.pairs_per_batch=1", "--data.decoding.max_new_tokens=8", f"--run_dir={folder / 'run'}"),
            *options,
        ]
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rows = [{"prompt": f"{n}?", "chosen": "yes", "rejected": "no"} for n in range(2)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_damaged_checkpoint_is_refused_and_the_one_before_continues(
    folder: Path, tiny_policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(folder, tiny_policy, "--trainer.max_epochs=3")
    last = folder / "run" / "checkpoints" / "last.ckpt"
    names = [path.name for path in history(last.parent)]
    assert names == ["epoch=2-step=6.ckpt", "epoch=1-step=4.ckpt"]
    assert last.resolve().name == names[0]

    whole = last.read_bytes()
    middle = len(whole) // 2
    for broken in (whole[:middle], whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :], b""):
        last.resolve().write_bytes(broken)
        with pytest.raises(ValueError, match=r"is damaged: .*--ckpt_path=.*epoch=1-step=4\.ckpt"):
            fit(folder, tiny_policy, "--trainer.max_epochs=4")
    fit(folder, tiny_policy, "--trainer.max_epochs=4", f"--ckpt_path={last.parent / names[1]}")
    assert history(last.parent)[0].name == "epoch=3-step=8.ckpt"
    assert damage(last) is None


def test_without_another_checkpoint_the_message_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"there is no other one. Restore a copy; or delete .*labels that the ledger"):
        checked(tmp_path / "last.ckpt")


def test_a_checkpoint_of_other_settings_is_refused_with_the_differences(folder: Path, tiny_policy: Path) -> None:
    fit(folder, tiny_policy, "--trainer.max_epochs=1")
    other = ["--trainer.max_epochs=2", "--model.beta=0.5", f"--ckpt_path={folder / 'run/checkpoints/last.ckpt'}"]
    with pytest.raises(ValueError, match=r"model\.init_args\.beta: 0\.1 in the checkpoint, 0\.5 now"):
        fit(folder, tiny_policy, *other, f"--run_dir={folder / 'other'}")
    # how fast a run is may change, and how long it is
    fit(folder, tiny_policy, "--trainer.max_epochs=2", "--data.batching.max_tokens_per_micro_batch=64")


def test_a_try_of_one_batch_leaves_no_checkpoint_to_go_on_from(folder: Path, tiny_policy: Path) -> None:
    fit(folder, tiny_policy, "--trainer.fast_dev_run=true")
    assert not list((folder / "run").rglob("*.ckpt"))


def test_loggers_see_checkpoints_under_their_names(tmp_path: Path) -> None:
    seen = []

    class Logger(DummyLogger):
        def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
            seen.append(Path(checkpoint_callback._last_checkpoint_saved).is_file())

    L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=Logger(),
        callbacks=[RunCheckpoint(tmp_path, every_n_epochs=1)],
        enable_progress_bar=False,
        limit_train_batches=1,
        limit_val_batches=0,
    ).fit(BoringModel())
    assert seen == [True, True]


def test_supervised_runs_are_compared_too(folder: Path, tiny_policy: Path) -> None:
    """They have no ledger that would notice."""
    (folder / "rows.jsonl").write_text('{"prompt": "a?", "completion": "b"}\n')

    def sft(*options: str) -> None:
        main(
            [
                *("fit", "--config", "sft", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
                *("--trainer.logger=false", "--trainer.callbacks=null", f"--model.policy={tiny_policy}"),
                *(
                    "--data.heldout=null",
                    "--data.prompts.path=rows.jsonl",
                    "--data.max_completion_tokens=8",
                    "--run_dir=sft",
                ),
                *options,
            ]
        )

    sft("--trainer.max_epochs=1", "--model.optimizer.lr=1e-4")
    with pytest.raises(ValueError, match=r"optimizer.init_args.lr: 0\.0001 in the checkpoint, 0\.001 now"):
        sft("--trainer.max_epochs=2", "--model.optimizer.lr=1e-3")


def shards(folder: Path, setting: Any = 0.1) -> Path:
    """A sharded checkpoint as torch writes it, of one rank."""
    state = {"state_dict": {"w": torch.arange(64.0), "v": torch.ones(8)}, "optimizer_0": {"lr": setting}}
    torch.distributed.checkpoint.save(state, checkpoint_id=folder, no_dist=True)
    torch.save({"epoch": 1}, folder / "meta.pt")
    return folder


class Evil:
    """What a checkpoint of a stranger may hold; unpickling it would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)

    def __deepcopy__(self, memo: Any) -> Any:  # torch copies what it saves
        return self


def test_shards_are_read_to_their_end_before_torch_loads_them(tmp_path: Path) -> None:
    older, newest = (shards(tmp_path / f"epoch={n}-step={n}.ckpt") for n in (1, 2))
    (tmp_path / "last.ckpt").symlink_to(newest.name)
    assert damage(tmp_path / "last.ckpt") is None
    (shard,) = newest.glob("*.distcp")
    whole = {path: path.read_bytes() for path in newest.iterdir()}
    place = whole[shard].index(torch.arange(64.0).numpy().tobytes())
    flipped = whole[shard][:place] + b"\x01" + whole[shard][place + 1 :]
    evil = pickle.dumps(Evil(tmp_path / "evil"))
    cases: list[tuple[Path, bytes | None, str]] = [
        (shard, flipped, "state_dict.w in .* differs from the one written"),
        (shard, whole[shard][:-100], "too short"),
        (shard, None, "is missing"),
        (newest / "meta.pt", None, "incomplete"),
        (newest / "meta.pt", whole[newest / "meta.pt"][:-30], "cannot be read"),
        (newest / ".metadata", None, "incomplete"),
        (newest / ".metadata", whole[newest / ".metadata"][:-30], "index cannot be read"),
        (newest / ".metadata", evil, "which no checkpoint needs"),
        (newest / ".metadata", pickle.dumps([1]), "a list is no index"),
    ]
    for path, content, said in cases:
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"is damaged: .*{said}.*--ckpt_path=.*epoch=1-step=1\.ckpt"):
            checked(tmp_path / "last.ckpt")
        path.write_bytes(whole[path])
    assert damage(newest) is None

    # each of two processes reads a half; one of them finds the bit
    shard.write_bytes(flipped)
    assert sorted(damage(newest, rank, 2) is None for rank in (0, 1)) == [False, True]

    shutil.rmtree(newest)
    with pytest.raises(ValueError, match=r"does not exist.*--ckpt_path=.*epoch=1-step=1\.ckpt"):
        checked(tmp_path / "last.ckpt")
    assert damage(older) is None


def test_code_among_the_tensors_of_a_sharded_checkpoint_is_not_run(tmp_path: Path) -> None:
    folder = shards(tmp_path / "epoch=1-step=1.ckpt", Evil(tmp_path / "evil"))
    assert "might be code" in (damage(folder) or "")
    assert not (tmp_path / "evil").exists()


def test_a_checkpoint_that_is_gone_is_no_new_beginning(folder: Path, tiny_policy: Path) -> None:
    fit(folder, tiny_policy, "--trainer.max_epochs=2")
    (folder / "run" / "checkpoints" / "last.ckpt").resolve().unlink()
    with pytest.raises(ValueError, match=r"does not exist.*--ckpt_path=.*epoch=0-step=2\.ckpt"):
        fit(folder, tiny_policy, "--trainer.max_epochs=3")


def test_sharded_checkpoints_need_a_strategy_that_shards(folder: Path, tiny_policy: Path) -> None:
    (folder / "run" / "checkpoints").mkdir(parents=True)
    shards(folder / "run" / "checkpoints" / "last.ckpt")
    with pytest.raises(ValueError, match=r"is sharded: continue with --config trainer/fsdp"):
        fit(folder, tiny_policy, "--trainer.max_epochs=3")


def test_the_command_line_wins_over_what_a_checkpoint_remembers(folder: Path, tiny_policy: Path) -> None:
    """Also how often a checkpoint is written; and the end of the training is kept whatever that is."""
    found = folder / "run" / "checkpoints"
    fit(folder, tiny_policy, "--trainer.max_epochs=3", "--checkpoint_every=10", "--trainer.gradient_clip_val=0.5")
    assert [path.name for path in history(found)] == ["epoch=3-step=6.ckpt"]  # of an epoch that begins
    assert (found / "last.ckpt").is_symlink()
    fit(folder, tiny_policy, "--trainer.max_epochs=6", "--checkpoint_every=2", "--trainer.gradient_clip_val=0.25")
    assert [path.name for path in history(found)] == ["epoch=5-step=12.ckpt", "epoch=3-step=8.ckpt"]
    starts = json.loads((folder / "run" / "run.json").read_text())["starts"]
    assert [start["config"]["trainer"]["gradient_clip_val"] for start in starts] == [0.5, 0.25]
    before = (found / "last.ckpt").stat().st_mtime_ns
    fit(folder, tiny_policy, "--trainer.max_epochs=6", "--checkpoint_every=1")  # there is nothing left to do
    assert (found / "last.ckpt").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_disk_that_fills_up_costs_nothing_that_was_written(runs: Any) -> None:
    """A file-size limit stops the write in its middle, as a full disk does."""
    status, said = runs.run("--trainer.max_epochs=1")
    assert status == 0, said
    half = (runs.folder / "run" / "checkpoints" / "last.ckpt").stat().st_size // 2
    status, said = runs.run("--trainer.max_epochs=2", fault=f"step4=limit{half}")
    assert status == 1, said
    assert "raise the limit (ulimit -f)" in said
    assert "earlier checkpoints are kept" in said
    checkpoints = runs.folder / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["epoch=0-step=2.ckpt", "last.ckpt"]
    assert damage(checkpoints / "last.ckpt") is None

    status, said = runs.run("--trainer.max_epochs=3", fault=f"label1=limit{half}")
    assert status == 1, said
    assert "cannot use the ledger (disk I/O error): check the disk and its quota" in said
    status, said = runs.run("--trainer.max_epochs=3")
    assert status == 0, said
    with PreferenceStore(runs.folder / "run" / "ledger.sqlite", read_only=True) as store:
        assert store.num_labels == 24


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_errors_of_writing_name_path_and_remedy(number: int) -> None:
    with pytest.raises(OSError, match=r"--run_dir.*/somewhere") as caught, explained(Path("/somewhere")):
        raise OSError(number, os.strerror(number))
    assert caught.value.errno == number
    with pytest.raises(OSError, match="disk has room"), explained(Path("/x")):
        raise RuntimeError("[enforce fail at inline_container.cc:659] PytorchStreamWriter failed writing file data/0")


def test_a_run_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        check_writable(tmp_path / "file" / "run")
    check_writable(tmp_path / "fresh" / "run")
    assert list((tmp_path / "fresh" / "run").iterdir()) == []
