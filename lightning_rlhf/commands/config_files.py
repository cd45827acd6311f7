"""Configs by name or by path: ``--config quickstart``, overlays, and the bases that a file names under ``defaults``."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import resources
from pathlib import Path
from typing import ClassVar

import yaml
from jsonargparse import (  # type: ignore[attr-defined]
    ActionConfigFile,
)
from lightning.pytorch.utilities import rank_zero_warn

from lightning_rlhf.renamed import plain_path, renamed_config, renamed_settings


def config_names() -> list[str]:
    """Names of the configs that come with the package."""
    root = resources.files("lightning_rlhf.configs")
    names = [entry.name[:-5] for entry in root.iterdir() if entry.name.endswith(".yaml")]
    for folder in ("labeler", "sampler", "trainer", "worlds"):
        names += [f"{folder}/{e.name[:-5]}" for e in root.joinpath(folder).iterdir() if e.name.endswith(".yaml")]
    return sorted(names)


def find_config(name: str) -> Path:
    """Find a config by path or by name.

    Raises:
        TypeError: if there is none; the message lists the names that exist.
    """
    if Path(name).is_file():
        return Path(name)
    packaged = resources.files("lightning_rlhf.configs").joinpath(f"{name}.yaml")
    if packaged.is_file():
        return Path(str(packaged))
    raise TypeError(f"no config {name!r}: neither a file, nor one of {', '.join(config_names())}")


class NamedConfig(ActionConfigFile):
    """Reads configs by name or path, and their ``defaults`` first."""

    command: ClassVar[str] = ""
    """The command that is configured, where its settings are not those of a Trainer."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        cfg: argparse.Namespace,
        value: str | Sequence[object] | None,
        option_string: str | None = None,
    ) -> None:
        """Merge one ``--config`` value into the configuration."""
        value = str(value)
        # `nested_nulls` hands settings over as inline JSON, which names no file
        inline = "\n" in value or value.lstrip().startswith("{")
        if inline:
            super().__call__(parser, cfg, value, option_string)  # type: ignore[no-untyped-call]
        else:
            self._merge(parser, cfg, find_config(value), option_string, ())

    def _merge(
        self,
        parser: argparse.ArgumentParser,
        cfg: argparse.Namespace,
        path: Path,
        option: str | None,
        above: tuple[Path, ...],
    ) -> None:
        # else it would be read for ever
        if path in above:
            raise TypeError(f"config {path} names itself among its defaults")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise TypeError(f"config {path} is no YAML: {error}") from None
        # a list or a text
        if not isinstance(content, dict):
            raise TypeError(f"config {path} must map settings to values; it holds {content!r:.80}")
        bases = content.pop("defaults", None)
        # a single name without brackets is a common slip
        if bases is not None and not (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
            raise TypeError(f"config {path}: defaults must be a list of configs; it is {bases!r:.80}")
        # bases first, so that the file itself wins
        for base in bases or ():
            beside = path.parent / f"{base}.yaml"
            self._merge(parser, cfg, beside if beside.is_file() else find_config(base), option, (*above, path))
        # the bases tell the class of the module where this file does not
        if self.command:
            renamed = renamed_settings(content, self.command, note_once)
        else:
            renamed = renamed_config(content, note_once, cfg.get("model.class_path"))
        if bases is None and renamed == content:
            # by path, so that files it names are looked up beside it
            super().__call__(parser, cfg, str(path), option)  # type: ignore[no-untyped-call]
            return
        super().__call__(parser, cfg, yaml.safe_dump(renamed), option)  # type: ignore[no-untyped-call]


def config_of(command: str) -> type[NamedConfig]:
    """The action that reads configs of a command without a Trainer."""
    # argparse builds the action from its class, so the command must be an attribute of the class
    return type("NamedConfig", (NamedConfig,), {"command": command})


def classes_in_configs(args: Sequence[str]) -> dict[str, str]:
    """Names of the classes that the configs of a command line give, by path without ``init_args``.

    A config that cannot be read is left to the parser, whose message is better.

    Args:
        args: the command line.
    """
    found: dict[str, str] = {}
    for arg, following in zip(args, [*args[1:], ""], strict=True):
        option, given, value = arg.partition("=")
        # in the order of the command line: later configs win
        if option in ("--config", "-c"):
            with suppress(TypeError, OSError, yaml.YAMLError, ValueError, RecursionError):
                _collect_classes_of_file(find_config(value if given else following), found, ())
    return found


def _collect_classes_of_file(path: Path, found: dict[str, str], above: tuple[Path, ...]) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or path in above:
        return
    for base in content.get("defaults") or ():
        beside = path.parent / f"{base}.yaml"
        _collect_classes_of_file(beside if beside.is_file() else find_config(base), found, (*above, path))
    _collect_classes(content, "", found)


def _collect_classes(content: object, place: str, found: dict[str, str]) -> None:
    if not isinstance(content, dict):
        return
    for key, value in content.items():
        if key == "class_path" and isinstance(value, str):
            found[plain_path(place)] = value.rpartition(".")[2]
        else:
            _collect_classes(value, f"{place}.{key}" if place else str(key), found)


@cache
def note_once(text: str) -> None:
    """Say on rank zero, once, that an argument has a new name."""
    rank_zero_warn(f"{text}; the old name works for one more version", category=DeprecationWarning, stacklevel=2)


def nested_nulls(args: list[str]) -> list[str]:
    """Write arguments that set a nested option to null as inline configs, which jsonargparse reads rightly.

    jsonargparse 4.53 hands the value of ``--data.rounds.epochs_per_round=null`` from parser to parser as the text
    "None".

    Args:
        args: arguments of a command with the sections ``model`` and ``data``.
    """
    return [_inline_null(arg) for arg in args]


def _inline_null(arg: str) -> str:
    found = re.fullmatch(r"--((?:model|data)(?:\.\w+){2,})=(?:null|None|~)", arg)
    if found is None:
        return arg
    value: object = None
    for key in reversed([key for key in found[1].split(".") if key != "init_args"]):
        value = {key: value}
    return f"--config={json.dumps(value)}"


def with_heldout_class(args: list[str], classes: Mapping[str, str]) -> list[str]:
    """Arguments in which held-out rows have the class of the training rows where none is chosen.

    Args:
        args: ``--data.heldout.path=test.jsonl`` and others.
        classes: names of the classes that configs give, by path.
    """
    given = [arg.partition("=")[0].replace("init_args.", "") for arg in args]
    first = next((i for i, name in enumerate(given) if name.startswith("--data.heldout.")), None)
    chosen = {"--data.heldout", "--data.heldout.class_path"} & set(given) or "data.heldout" in classes
    if first is None or chosen or given[first].endswith(".help"):
        return args
    # the command line comes after configs
    of_rows = classes.get("data.prompts")
    for arg, following in zip(args, [*args[1:], ""], strict=True):
        name, sign, value = arg.partition("=")
        if name in ("--data.prompts", "--data.prompts.class_path"):
            of_rows = value if sign else following
    return args if of_rows is None else [*args[:first], f"--data.heldout={of_rows}", *args[first:]]
