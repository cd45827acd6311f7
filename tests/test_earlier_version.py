"""A run folder of version 0.1, made before classes moved and options were grouped, is continued or refused by name."""

from __future__ import annotations

import sqlite3
import tarfile
import warnings
from pathlib import Path

import pytest

from lightning_rlhf.commands.fit import RLHFCLI


OLD_COMMAND = [
    *("fit", "--config=worlds/menu", "--model.lora.r=1", "--model.warmup_steps=0", "--checkpoint_every=1"),
    *("--trainer.check_val_every_n_epoch=2", "--trainer.enable_progress_bar=false", "--data.heldout.repeats=1"),
    *("--data.prompts_per_round=4", "--data.pairs_per_batch=4"),
]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """Two rounds of four pairs, with a checkpoint behind the second."""
    with tarfile.open(Path(__file__).parent / "data" / "run_0_1.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run_0_1"


def rows(folder: Path, table: str) -> list[tuple[object, ...]]:
    """All rows of a table of the ledger."""
    with sqlite3.connect(folder / "ledger.sqlite") as db:
        return db.execute(f"SELECT * FROM {table}").fetchall()


def test_the_command_of_version_0_1_continues_its_run(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Old names of arguments, ledger and checkpoint: round 2 is sampled, rounds 0 and 1 stay as they were."""
    before = rows(run_folder, "attempts")
    assert len(before) == 8
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        RLHFCLI([*OLD_COMMAND, "--model.learning_rate=1e-2", "--trainer.max_epochs=3", f"--run_dir={run_folder}"])
    assert "continuing from" in capsys.readouterr().out
    assert any("--model.learning_rate is --model.optimizer.lr" in str(warning.message) for warning in caught)
    after = rows(run_folder, "attempts")
    assert after[:8] == before
    assert len(after) == 12
    assert (run_folder / "checkpoints" / "epoch=2-step=3.ckpt").exists()


def test_other_settings_are_refused_by_their_new_names(run_folder: Path) -> None:
    """Version 0.1 stored the flat name; the message names the setting as it is written now."""
    with pytest.raises((ValueError, SystemExit), match=r"model\.init_args\.optimizer\.init_args\.lr"):
        RLHFCLI([*OLD_COMMAND, "--model.optimizer.lr=2e-2", "--trainer.max_epochs=3", f"--run_dir={run_folder}"])
    assert len(rows(run_folder, "attempts")) == 8
