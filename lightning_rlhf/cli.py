"""The command line: ``lightning-rlhf fit --config quickstart``, and the other commands.

Configs are found by name in the package (``--config dpo_online``, overlays such as ``--config sampler/best_of_n``) or
by path; several merge from left to right, and a file may name its bases under ``defaults``. The rest is LightningCLI.
"""

from __future__ import annotations

import inspect
import os
import signal
import sys
from collections.abc import Callable
from typing import TypeVar

import lightning as L
from jsonargparse import (
    auto_cli,
    set_parsing_settings,
)

from lightning_rlhf.commands import annotate
from lightning_rlhf.commands.completion import print_completion
from lightning_rlhf.commands.config_files import classes_in_configs, config_of, note_once
from lightning_rlhf.commands.errors import ShortErrors
from lightning_rlhf.commands.evaluate import EvaluationRun
from lightning_rlhf.commands.exports import export
from lightning_rlhf.commands.fit import RLHFCLI, RLHFTrainer, hush, told_by_constructors
from lightning_rlhf.commands.label import LabelRun
from lightning_rlhf.commands.overview import answered, short_usage
from lightning_rlhf.commands.parts import Part, asked_for_help, find_class, part_at
from lightning_rlhf.commands.pipeline import Pipeline
from lightning_rlhf.commands.plan import plan_run
from lightning_rlhf.commands.settings import FREE_OF_COMMANDS, _plain
from lightning_rlhf.commands.votes import import_votes
from lightning_rlhf.experiments import CompareRun
from lightning_rlhf.renamed import renamed_arguments
from lightning_rlhf.runtime import distributed
from lightning_rlhf.runtime.fingerprint import without
from lightning_rlhf.runtime.preemption import Stopped, Waiting


# `${model.init_args.beta}` in a config means the value of this run, wherever it was set
set_parsing_settings(omegaconf_absolute_to_relative_paths=True)

Result = TypeVar("Result")

COMMANDS: dict[str, type[LabelRun] | type[EvaluationRun] | type[CompareRun]] = {
    "compare": CompareRun,
    "evaluate": EvaluationRun,
    "label": LabelRun,
}
"""Commands that need no Trainer: classes whose constructor is the configuration, and whose ``run`` does the work."""


def run_command(command: str, args: list[str]) -> None:
    """Run one of `COMMANDS`."""
    kind = COMMANDS[command]
    description = (kind.__doc__ or "").strip().partition("\n\n    Args:")[0]
    parser = ShortErrors(prog=f"lightning-rlhf {command}", description=description, parser_mode="omegaconf+")
    parser.add_argument("-c", "--config", action=config_of(command), help="A file with these settings.")
    # the file of `compare` may stand alone: `lightning-rlhf compare compare/smoke`
    if command == "compare" and args and not args[0].startswith("-"):
        args = ["--config", *args]
    args = renamed_arguments(args, note_once, classes_in_configs(args), command)
    parser.add_class_arguments(kind, as_group=False)
    config = parser.parse_args(args)
    settings = without(_plain(config), FREE_OF_COMMANDS)
    with told_by_constructors(config):
        values = parser.instantiate(config).as_dict()
    values.pop("config")
    kind(**values).run(settings)


def run_pipeline(args: list[str]) -> None:
    """Run a pipeline file."""
    description = inspect.cleandoc(Pipeline.__doc__ or "").partition("\n\nArgs:")[0]
    parser = ShortErrors(prog="lightning-rlhf run", description=description)
    parser.add_argument("pipeline", type=str, help="The pipeline, a YAML file.")
    parser.add_argument("--run_dir", type=str, default=None, help="Folder of all stages, in place of the file's.")
    parser.add_argument("--set", nargs="*", type=str, default=[], help="Variables that differ: NAME=VALUE ...")
    config = parser.parse_args(args)
    changed = [entry.partition("=") for entry in config.set]
    if not all(sign for _, sign, _ in changed):
        parser.error(f"--set takes NAME=VALUE; got {' '.join(config.set)}")
    Pipeline(config.pipeline, config.run_dir, {name: value for name, _, value in changed}).run()


def explain(command: str, args: list[str]) -> bool:
    """Print help about a part, asked for by ``--model.loss.help`` or ``--help=model.loss``; False if none was.

    Raises:
        SystemExit: with status 2, if there is no such part.
    """
    asked = asked_for_help(args)
    if asked is None:
        return False
    given = classes_in_configs(args)
    for arg in args:
        name_given, _, value = arg.partition("=")
        given[name_given.removeprefix("--").rstrip("+").replace("init_args.", "")] = value
    if command in COMMANDS:
        whole = Part("", [COMMANDS[command]], COMMANDS[command])
        inner = {name: whole.inner(name, given) for name in whole.names()}
        roots = {name: part for name, part in inner.items() if part is not None}
    else:
        kinds: dict[str, type] = {"model": L.LightningModule, "data": L.LightningDataModule}
        roots = {name: Part(name, [kind], find_class(given.get(name, ""), [kind])) for name, kind in kinds.items()}
        roots["trainer"] = Part("trainer", [RLHFTrainer], RLHFTrainer)
    path, name = asked
    try:
        part = part_at(path, roots, given)
        if name is not None and (found := find_class(name, part.kinds)) is None:
            raise ValueError(f"no class {name!r} for --{path}")
    except ValueError as error:
        print(f"error: {error}\n{short_usage(f'lightning-rlhf {command}')}", file=sys.stderr)
        raise SystemExit(2) from None
    print((part if name is None else Part(path, part.kinds, found, part.owner)).help())
    return True


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    argv = sys.argv[1:] if args is None else args
    if answered(argv):
        # as argparse ends after its own help
        raise SystemExit(0)
    hush()
    if "" not in sys.path and os.getcwd() not in sys.path:
        # a user's own classes are found in the folder she works in, as with ``python -m``
        sys.path.insert(0, os.getcwd())
    try:
        _run(argv, args)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C (SIGINT); checkpoints and ledger are kept; the same command goes on", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None


def _call(function: Callable[..., Result], argv: list[str]) -> Result:
    name = f"lightning-rlhf {argv[0]}"
    result: Result = auto_cli(function, args=argv[1:], as_positional=False, parser_class=ShortErrors, prog=name)
    return result


def _run(argv: list[str], args: list[str] | None) -> None:
    if argv and argv[0] in ("fit", "validate", "sample", *COMMANDS) and explain(argv[0], argv[1:]):
        raise SystemExit(0)
    if argv[:1] == ["annotate"]:
        annotate.main(argv[1:])
        return
    if argv[:1] == ["export"]:
        print(_call(export, argv))
        return
    if argv[:1] == ["import"]:
        counts = _call(import_votes, argv)
        print("{read} votes read, {new} new, {late} of them late, {labels} new labels".format(**counts))
        return
    if argv and argv[0].partition("=")[0] == "--print_completion":
        print_completion(argv)
        return
    if argv[:1] == ["plan"]:
        print(_call(plan_run, argv))
        return
    if argv[:1] == ["run"]:
        run_pipeline(argv[1:])
        return
    if argv and argv[0] in COMMANDS:
        try:
            run_command(argv[0], argv[1:])
        except Waiting as waiting:
            print(waiting.reason, file=sys.stderr)
            raise
        return
    try:
        RLHFCLI(args=args)
    except Stopped:
        distributed.leave_at_exit()
        if os.environ.get("LOCAL_RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" not in os.environ:
            # a rank that Lightning's rank zero has started: it would kill itself over another status than 0
            raise SystemExit(0) from None
        raise
    # at the exit, because another run may follow; and not after an error, when ranks may be left in a collective
    distributed.leave_at_exit()
