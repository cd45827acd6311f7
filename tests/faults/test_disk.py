"""A file system that is full, or read-only, under a run folder: a real one, of a few megabytes."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.runtime.checkpoints import damage


@pytest.fixture
def disk(runs: Any) -> Iterator[Path]:
    """A small file system."""
    folder: Path = runs.folder / "disk"
    folder.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


@pytest.mark.slow
def test_what_was_written_before_a_disk_filled_up_is_kept_and_gone_on_from(runs: Any, disk: Path) -> None:
    options = ["--run_dir=disk/run"]
    status, said = runs.run(*options, fault="step3=filldisk/filler")
    assert status == 1, said
    assert "the disk is full: free some space, or name another disk as --run_dir" in said
    checkpoints = disk / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["epoch=0-step=2.ckpt", "last.ckpt"]
    assert damage(checkpoints / "last.ckpt") is None

    (disk / "filler").unlink()
    status, said = runs.run(*options, fault="label1=filldisk/filler")
    assert status == 1, said
    assert "cannot use the ledger (database or disk is full): free some space and start again" in said
    (disk / "filler").unlink()

    mount("-o", "remount,ro", str(disk))
    status, said = runs.run(*options)
    assert status == 1, said
    assert "the file system is read-only: name another --run_dir, or mount it writable" in said
    mount("-o", "remount,rw", str(disk))

    status, said = runs.run(*options)
    assert status == 0, said
    with PreferenceStore(disk / "run" / "ledger.sqlite", read_only=True) as store:
        assert store.num_labels == 24
    status, said = runs.run("--run_dir=straight")
    assert status == 0, said
    one, other = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (runs.folder / "straight", disk / "run")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
