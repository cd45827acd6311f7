"""Completion in a real bash, by the script that the command prints."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from lightning_rlhf.cli import main
from lightning_rlhf.commands.completion import completion_script


pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

COMPLETE = """
source "$1"
COMP_LINE=$2 COMP_POINT=${#2} COMP_WORDBREAKS=$3
_lightning_rlhf 2> /dev/null
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "lightning-rlhf"
    path.write_text(completion_script())
    return path


def completed(script: Path, line: str, folder: Path, breaks: str = " =:") -> list[str]:
    """Replies of bash to the tabulator key at the end of a line."""
    command = ["bash", "--norc", "-c", COMPLETE, "bash", str(script), line, breaks]
    environment = {"PATH": os.environ["PATH"]}
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return ran.stdout.split()


def test_commands_settings_classes_and_files(script: Path, tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").touch()

    def ends(line: str) -> list[str]:
        return completed(script, f"lightning-rlhf {line}", tmp_path)

    assert ends("ev") == ["evaluate"] and "fit" in ends("")
    assert ends("fit --config quick") == ends("fit -c quick") == ["quickstart"]
    assert ends("fit --config=sampler/pi") == ["sampler/pilaf"]
    assert ends("fit --data.sampler=PIL") == ends("fit --data.sampler PIL") == ["PILAFSampler"]
    assert ends("fit --trainer.callbacks+=HFEx") == ["HFExport"]
    assert ends("fit --model=DPOModule --model.loss=SimP") == ["SimPOLoss"]
    # level by level, and down to the settings of classes and groups
    assert ends("fit --data.sam") == ["--data.sampler=", "--data.sampler."]
    assert "--model.options." in ends("validate --model.o") and "--trainer." in ends("sample --")
    assert "--model.options.disable_dropout=" in ends("fit --model.options.")
    assert ends("fit --model.options.disable_dropout=t") == ["true"]
    assert ends("compare --config compare/smol") == ["compare/smollm2"]
    assert ends("export --content=hel") == ["helpsteer"] and ends("import --format=po") == ["potato"]
    assert ends("export --ledger=led") == ends("fit --ckpt_path led") == ["ledger.sqlite"]
    assert ends("fit --nothing.of.this") == []
    # where bash is told not to break words at "=", the whole word is replaced
    assert completed(script, "lightning-rlhf export --content=v", tmp_path, " ") == ["--content=votes"]


def test_the_tabulator_key_completes_in_an_interactive_bash(script: Path, tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    shell = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "TERM": "dumb", "PS1": "$ "},
        start_new_session=True,
    )
    os.close(follower)
    seen = ""
    try:
        # the last key ends the line, which bash then echoes as a word of `printf`
        os.write(leader, f"source {script}\nprintf '<%s>' done\n".encode())
        for wanted, keys in (
            ("<done>", b"lightning-rlhf fit --data.sampler=PIL\t"),
            ("--data.sampler=PILAFSampler", b"\x15exit\n"),
        ):
            end = time.monotonic() + 60
            while wanted not in seen and time.monotonic() < end:
                if select.select([leader], [], [], 1.0)[0]:
                    seen += os.read(leader, 4096).decode(errors="replace")
            assert wanted in seen
            os.write(leader, keys)
        shell.wait(timeout=30)
    finally:
        shell.kill()
        os.close(leader)


def test_the_command_prints_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--print_completion"])
    text = capsys.readouterr().out
    assert text.startswith("# bash completion of lightning-rlhf") and text.endswith("lightning-rlhf\n")
