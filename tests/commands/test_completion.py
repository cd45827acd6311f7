"""Completion in a real bash and a real zsh, by the scripts that the command prints."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_rlhf.cli import main
from lightning_rlhf.commands.completion import completion_script


needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
needs_zsh = pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")

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


COMMON = {
    "ev": ["evaluate"],
    "fit --config quick": ["quickstart"],
    "fit -c quick": ["quickstart"],
    "fit --config=sampler/pi": ["sampler/pilaf"],
    "fit --data.sampler=PIL": ["PILAFSampler"],
    "fit --data.sampler PIL": ["PILAFSampler"],
    "fit --trainer.callbacks+=HFEx": ["HFExport"],
    "fit --model=DPOModule --model.loss=SimP": ["SimPOLoss"],
    # level by level, and down to the settings of classes and groups
    "fit --data.sam": ["--data.sampler.", "--data.sampler="],
    "fit --model.options.disable_dropout=t": ["true"],
    "compare --config compare/smol": ["compare/smollm2"],
    "export --content=hel": ["helpsteer"],
    "import --format=po": ["potato"],
    "export --ledger=led": ["ledger.sqlite"],
    "fit --ckpt_path led": ["ledger.sqlite"],
    "fit --print_conf": ["--print_config"],
    "fit --nothing.of.this": [],
}
"""Ends of lines, and their completions in every shell."""
SOME = {"fit --model.options.": "--model.options.disable_dropout=", "validate --model.o": "--model.options."} | {
    "sample --": "--trainer.",
    "": "fit",
}
"""Ends of lines, and one of many completions."""


@needs_bash
def test_commands_settings_classes_and_files(script: Path, tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").touch()

    def ends(line: str) -> list[str]:
        return completed(script, f"lightning-rlhf {line}", tmp_path)

    assert {line: sorted(ends(line)) for line in COMMON} == COMMON
    for line, one in SOME.items():
        assert one in ends(line)
    # where bash is told not to break words at "=", the whole word is replaced
    assert completed(script, "lightning-rlhf export --content=v", tmp_path, " ") == ["--content=votes"]


CAPTURE = r"""
autoload -U compinit; compinit -u -D; source "$SCRIPT"
compadd() {
  # functions of zsh itself filter with these options and add nothing
  if [[ ${@[1,(i)(-|--)]} == *-(O|A|D)\ * ]]; then builtin compadd "$@"; return; fi
  local -a hits
  builtin compadd -A hits "$@"
  (( ${#hits} )) && print -rl -- $hits >> $REPLIES
  builtin compadd "$@"
}
capture() { _lightning_rlhf 2> /dev/null; print -r -- END >> $REPLIES; compstate[insert]= compstate[list]= }
zle -C capture complete-word capture
bindkey '^T' capture
PS1='now> '
"""


class Terminal:
    """An interactive shell with a terminal of its own."""

    def __init__(self, command: list[str], folder: Path, **variables: str) -> None:
        self.leader, follower = pty.openpty()
        self.shell = subprocess.Popen(
            command,
            stdin=follower,
            stdout=follower,
            stderr=follower,
            cwd=folder,
            env={"PATH": os.environ["PATH"], "TERM": "dumb", "PS1": "$ ", **variables},
            start_new_session=True,
        )
        os.close(follower)
        self.seen = ""

    def keys(self, text: str) -> None:
        os.write(self.leader, text.encode())

    def wait_for(self, wanted: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not wanted() and time.monotonic() < end:
            if select.select([self.leader], [], [], 0.05)[0]:
                self.seen += os.read(self.leader, 4096).decode(errors="replace")
        assert wanted(), self.seen

    def close(self) -> None:
        self.shell.kill()
        self.shell.wait()
        os.close(self.leader)


@needs_zsh
def test_zsh_completes_the_same(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").touch()
    (tmp_path / "script").write_text(completion_script("zsh"))
    (tmp_path / "capture").write_text(CAPTURE)
    replies = tmp_path / "replies"
    replies.touch()
    files = {"SCRIPT": str(tmp_path / "script"), "REPLIES": str(replies), "ZDOTDIR": str(tmp_path)}
    terminal = Terminal(["zsh", "-f", "-i"], tmp_path, **files)
    found = {}
    try:
        terminal.keys("source ./capture\n")
        # keys that come before the prompt go to the terminal, where ^U erases them
        terminal.wait_for(lambda: "now> " in terminal.seen)
        for line in [*COMMON, *SOME]:
            replies.write_text("")
            # complete, and clear the line
            terminal.keys(f"lightning-rlhf {line}\x14\x15")
            terminal.wait_for(lambda: replies.read_text().endswith("END\n"))
            found[line] = sorted(set(replies.read_text().split()[:-1]))
    finally:
        terminal.close()
    assert {line: found[line] for line in COMMON} == COMMON
    for line, one in SOME.items():
        assert one in found[line]


@pytest.mark.parametrize(
    ("shell", "start"),
    [
        pytest.param("bash", ["bash", "--norc", "--noprofile", "-i"], marks=needs_bash),
        pytest.param("zsh", ["zsh", "-f", "-i"], marks=needs_zsh),
    ],
)
def test_the_tabulator_key_completes_in_an_interactive_shell(shell: str, start: list[str], tmp_path: Path) -> None:
    (tmp_path / "script").write_text(completion_script(shell))
    terminal = Terminal(start, tmp_path, ZDOTDIR=str(tmp_path))
    try:
        prepare = "autoload -U compinit; compinit -u -D; " if shell == "zsh" else ""
        # the echo of the command does not have the new prompt
        terminal.keys(f"{prepare}source ./script; PS1='now''> '\n")
        terminal.wait_for(lambda: "now> " in terminal.seen)
        terminal.keys("lightning-rlhf fit --data.sampler=PIL\t")
        terminal.wait_for(lambda: "PILAFSampler" in terminal.seen)
    finally:
        terminal.close()


def test_the_command_prints_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--print_completion"])
    text = capsys.readouterr().out
    assert text.startswith("# bash completion of lightning-rlhf") and text.endswith("lightning-rlhf\n")
    for arguments in (["--print_completion=zsh"], ["--print_completion", "zsh"]):
        main(arguments)
        assert capsys.readouterr().out.startswith("#compdef lightning-rlhf\n")
    with pytest.raises(SystemExit) as ended:
        main(["--print_completion=fish"])
    assert ended.value.code == 2
    assert "no completion for 'fish'" in capsys.readouterr().err
