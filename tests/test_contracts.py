"""Modules, DataModules and callbacks agree: mypy fails when a method is renamed on one side of a contract only."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
ROOMS = ("lightning_rlhf/modules", "lightning_rlhf/datamodules", "lightning_rlhf/callbacks")

pytestmark = pytest.mark.slow  # mypy reads torch and transformers


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package, with a cache of its own."""
    folder = tmp_path_factory.mktemp("copy")
    leave_out = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "lightning_rlhf", folder / "lightning_rlhf", ignore=leave_out)
    shutil.copy(ROOT / "pyproject.toml", folder)
    if (ROOT / ".mypy_cache").is_dir():
        # what mypy knows of other packages; only a start, since it compares the content of files
        shutil.copytree(ROOT / ".mypy_cache", folder / ".mypy_cache")
    return folder


def mypy(folder: Path) -> str:
    """Check the rooms of a copy in strict mode; returns the errors, nothing if there are none."""
    command = [sys.executable, "-m", "mypy", "--cache-dir", ".mypy_cache", *ROOMS]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode in (0, 1), result.stdout + result.stderr
    return result.stdout if result.returncode else ""


def test_contracts_hold(copy: Path) -> None:
    assert mypy(copy) == ""


@pytest.mark.parametrize(
    ("path", "method"),
    [
        ("lightning_rlhf/modules/policy_gradient.py", "rollout_generator"),
        ("lightning_rlhf/modules/rounds.py", "start_round"),
        ("lightning_rlhf/datamodules/rounds.py", "sample_only"),
        ("lightning_rlhf/datamodules/base.py", "passes_per_pair"),
        ("lightning_rlhf/modules/reward.py", "save_pretrained"),
    ],
)
def test_a_method_renamed_on_one_side_is_an_error(copy: Path, path: str, method: str) -> None:
    file = copy / path
    text = file.read_text(encoding="utf-8")
    renamed, count = re.subn(rf"\bdef {method}\(", f"def {method}_now(", text)
    assert count == 1
    file.write_text(renamed, encoding="utf-8")
    try:
        errors = mypy(copy)
    finally:
        file.write_text(text, encoding="utf-8")
    assert re.search(rf"\b{method}\b", errors), f"mypy does not see that {path} lacks {method}"
