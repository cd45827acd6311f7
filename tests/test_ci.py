"""CI is `make test`, with Chromium where it can be installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


RUN = Path(__file__).parents[1] / ".ci" / "run"
TOOLS = ("bash", "dirname", "env", "id", "sh", "timeout")


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """A checkout with the script alone, and a folder `bin` in which programs only say that they were called."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(RUN, tmp_path / ".ci" / "run")
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(str(shutil.which(tool)))
    program(tmp_path, "make")
    return tmp_path


def program(box: Path, name: str, status: int = 0, passes_on: bool = False) -> None:
    """A program that writes its name and arguments to `calls`; `passes_on` runs the arguments, as sudo does."""
    ends = 'shift; exec "$@"' if passes_on else f"exit {status}"
    path = box / "bin" / name
    path.write_text(f'#!/bin/sh\necho "{name} $*" >> "{box}/calls"\n{ends}\n')
    path.chmod(0o755)


def calls(box: Path, status: int = 0) -> list[str]:
    """Run the script; the programs that it called, in order."""
    command = [str(box / "bin" / "bash"), str(box / ".ci" / "run")]
    ran = subprocess.run(command, env={"PATH": str(box / "bin")}, capture_output=True, text=True, check=False)
    assert ran.returncode == status, ran.stderr
    found = (box / "calls").read_text().splitlines()
    # who is not root installs by sudo
    return [line for line in found if not line.startswith("sudo")]


def test_chromium_is_installed_before_the_tests_where_it_is_absent(box: Path) -> None:
    program(box, "apt-get")
    program(box, "sudo", passes_on=True)
    update, install, make = calls(box)
    assert update.startswith("apt-get update")
    assert install.startswith("apt-get install") and install.endswith(" chromium chromium-driver")
    assert make == "make test"


def test_nothing_is_installed_where_it_is_present_or_cannot_be(box: Path) -> None:
    assert calls(box) == ["make test"], "no apt-get here"
    (box / "calls").unlink()
    for name in ("apt-get", "chromium", "chromedriver"):
        program(box, name)
    assert calls(box) == ["make test"]


def test_a_failed_installation_does_not_fail_ci_and_failed_tests_do(box: Path) -> None:
    program(box, "apt-get", status=100)
    program(box, "sudo", passes_on=True)
    assert calls(box)[-1] == "make test"
    (box / "bin" / "make").unlink()
    program(box, "make", status=2)
    assert calls(box, status=2)[-1] == "make test"
