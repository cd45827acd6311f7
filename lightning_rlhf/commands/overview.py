"""The commands in one place: ``lightning-rlhf --help``, ``--version``, and misspelt commands. Imports no torch."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Collection, Sequence

from lightning_rlhf import __version__
from lightning_rlhf.commands.elsewhere import COMMANDS as ELSEWHERE


COMMANDS = {
    "fit": "train a policy or a reward model; the same command continues a run that was stopped",
    "validate": "evaluate on held-out rows: loss and accuracy of pairs, reward, KL and J of answers",
    "sample": "sample one round of pairs or rollouts into the ledger, without labels",
    "label": "label existing pairs, and report how good the labels are",
    "evaluate": "compare two policies on held-out prompts",
    "compare": "samplers, losses or recipes over seeds at equal label budgets, in one report",
    "run": "several commands in a row, from a pipeline file; restartable",
    "annotate": "serve pairs to people in a browser",
    "export": "write a ledger as rows, or a checkpoint as a model folder",
    "import": "votes of people from a file into a ledger",
    "plan": "memory and time of a run on paper",
}
"""Commands with a line each."""

STATUSES = {
    0: "done",
    1: "an error, told on standard error",
    2: "the command line or a config is wrong; nothing was computed",
    75: "people have not answered yet; the same command goes on",
    "129, 130, 143": "stopped by SIGHUP, Ctrl-C, SIGTERM, with a checkpoint; the same command goes on",
}
"""Exit statuses with their meaning."""


def answered(args: Sequence[str]) -> bool:
    """Answer ``--help`` and ``--version``, and refuse a command that does not exist.

    Returns:
        Whether there is nothing left to do.

    Raises:
        SystemExit: with status 2, naming the nearest command.
    """
    first = args[0] if args else ""
    if first in ("--version", "-V"):
        print(f"lightning-rlhf {__version__}")
        return True
    if first in ("--help", "-h", "help"):
        print(overview())
        return True
    if not first or (first not in COMMANDS and not first.startswith("-")):
        ours = f"; here it is lightning-rlhf {ELSEWHERE[first]}" if first in ELSEWHERE else suggestion(first, COMMANDS)
        cause = f"no command {first!r}{ours}" if first else "no command given"
        print(f"error: {cause}\n{short_usage()}", file=sys.stderr)
        raise SystemExit(2)
    return False


def overview() -> str:
    """The text of ``lightning-rlhf --help``."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{text}" for name, text in COMMANDS.items()]
    statuses = [f"  {status!s:<15}{text}" for status, text in STATUSES.items()]
    return "\n".join(
        [
            "usage: lightning-rlhf COMMAND [--config NAME] [--SETTING=VALUE ...]",
            "",
            "Align a language model with the fewest preference labels.",
            "",
            "commands:",
            *lines,
            "",
            "lightning-rlhf COMMAND --help lists the settings of a command, and the shipped configs.",
            "lightning-rlhf fit --model.help, --data.sampler.help, --data.sampler.help=PILAFSampler explain a part.",
            "lightning-rlhf fit --config NAME --print_config prints all settings as they are in force.",
            "lightning-rlhf --version prints the version, --print_completion a script for completion in bash,",
            "--print_completion=zsh in zsh.",
            "",
            "exit statuses:",
            *statuses,
        ]
    )


def short_usage(prog: str = "lightning-rlhf") -> str:
    """Usage in two lines, for the end of an error."""
    command = prog.partition(" ")[2]
    if not command:
        return f"usage: {prog} COMMAND [--config NAME] [--SETTING=VALUE ...]\nhelp: {prog} --help"
    part = ", of one of them: --model.help, --data.sampler.help" if command in ("fit", "validate", "sample") else ""
    return f"usage: {prog} [--config NAME] [--SETTING=VALUE ...]\nhelp on all settings: {prog} --help{part}"


def suggestion(word: str, known: Collection[str], cutoff: float = 0.6) -> str:
    """The end of a message about a word that is not known: the nearest known one, if one is near.

    Args:
        word: the word.
        known: words that are known.
        cutoff: how near one must be, from 0 to 1 (`difflib.SequenceMatcher.ratio`).
    """
    # names of classes differ in capitals
    lower = {name.lower(): name for name in sorted(known)}
    whole = word.lower()
    near = [lower[whole]] if whole in lower else difflib.get_close_matches(word, sorted(known), n=1, cutoff=cutoff)
    near = near or [lower[found] for found in difflib.get_close_matches(whole, list(lower), n=1, cutoff=cutoff)]
    # "cosine" for CosineWithWarmup: the shortest name that begins with it
    longer = sorted((name for name in lower if len(whole) > 2 and name.startswith(whole)), key=len)
    near = near or [lower[name] for name in longer[:1]]
    return f"; did you mean {near[0]}?" if near else ""
