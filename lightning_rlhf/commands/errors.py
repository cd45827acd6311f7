"""Errors of the command line in a few lines: the cause with the nearest name first, usage after it."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
import sys
from collections.abc import Collection, Iterator
from typing import NoReturn

import lightning as L
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from lightning_rlhf.commands.config_files import config_names
from lightning_rlhf.commands.elsewhere import CLASSES, our_setting
from lightning_rlhf.commands.overview import short_usage, suggestion
from lightning_rlhf.commands.parts import Part, arguments_of, classes_of, subclasses, type_of


_NOISE = re.compile(
    r"\s*(-\s*)?(Does not validate against any|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>"
    r"|Expected a path but|$)"
)


class ShortErrors(ArgumentParser):
    """A parser whose errors are the cause, and two lines of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the cause and the usage, and exit with status 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        prog = str(parser.prog).replace(" [options]", "")
        sys.stderr.write(f"error: {cause_of(message, set(option_names(parser)))}\n{short_usage(prog)}\n")
        self.exit(2)


class RunParser(ShortErrors, LightningArgumentParser):
    """The same for the commands of a Trainer."""


def option_names(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Options of a parser and its subcommands."""
    for action in parser._actions:
        yield from action.option_strings
        for inner in (getattr(action, "_name_parser_map", None) or {}).values():
            yield from option_names(inner)


def cause_of(message: str, options: set[str]) -> str:
    """The cause in a message of jsonargparse, with its place and the nearest known name.

    Args:
        message: the message: nested, with the types that a value was tried against.
        options: options of the parser, for suggestions.
    """
    if (found := re.fullmatch(r"[Uu]nrecognized arguments: (.*)", message.strip())) is not None:
        # all of them: a command line of another library is translated at once
        words = [word.partition("=")[0] for word in found[1].split()]
        named = [word for word in words if word.startswith("--")]
        return "\n  ".join(_unknown_option(word, options) for word in (named or words[:1])[:12])
    if (found := re.match(r"no config '(.*)': neither a file, nor one of (.*)", message)) is not None:
        known = found[2].split(", ")
        return f"no config {found[1]!r}, neither a file nor a name{suggestion(found[1], known)}"
    place: list[str] = []
    kind, types = "", ""
    lines = message.splitlines()
    for number, line in enumerate(lines):
        place += re.findall(r"Parser key \"([\w.+]+)\":", line)
        if (found := re.search(r"Problem with given class_path '([\w.]+)'", line)) is not None:
            # of a class that cannot be imported, the next line says why
            owner, kind = kind, found[1]
            missing = _not_importable(kind, lines[number + 1 : number + 2], ".".join(place), owner)
            if missing is not None:
                return missing
        if (found := re.search(r"Subtypes: \[(.*)\]", line)) is not None:
            types = found[1]
        text = _known_cause(line, ".".join(place), kind) or _wrong_value(lines[number:], ".".join(place), types)
        if text is not None:
            return text
    # nothing known: the lines that say something, without the repeated value
    lines = [line.strip(" -") for line in lines if not _NOISE.match(line)]
    return "\n  ".join(line[:300] for line in lines[:4])


def _unknown_option(word: str, options: set[str]) -> str:
    trains = "--trainer.max_epochs" in options
    if trains and word in config_names():
        return f"no setting {word}; did you mean --config {word}?"
    if word == "--model" and "--a" in options:
        return "no setting --model; did you mean --a, the policy that is evaluated?"
    return f"no setting {word}{_hint(word, options) if trains else _nearest(word, options)}"


def _hint(word: str, known: Collection[str]) -> str:
    """The end of a message about a setting: our name for that of another library, else the nearest known one."""
    return our_setting(word) or _nearest(word, known) or our_setting(word, misspelt=True) or ""


def _nearest(word: str, known: Collection[str]) -> str:
    """The end of a message about a setting; dashes and sections make no two names alike."""
    bare = {name.lstrip("-"): name for name in known}
    hint = suggestion(word.lstrip("-"), bare, cutoff=0.7)
    return re.sub(r"mean (.*)\?$", lambda found: f"mean {bare[found[1]]}?", hint)


def _known_cause(line: str, place: str, kind: str) -> str | None:
    at = f"--{place}: " if place else ""
    if (found := re.search(r"Subcommand '\w+' does not accept option '([\w.]+)'", line)) is not None:
        return f"no setting {found[1]} in a config{our_setting(found[1]) or ''}"
    if (found := re.search(r"Option '([\w.]+)' is not accepted", line)) is not None:
        # of a callable, such as an optimizer, the class stands behind
        inner = re.search(r"class_path='([\w.]+)'", line)
        return f"{at}{_unknown_argument(found[1], inner[1] if inner else kind, place)}"
    if (found := re.search(r"Invalid content in sub-config file (\S+):", line)) is not None:
        return f"{at}{_no_class(found[1], place, kind)}"
    if (found := re.search(r"Expected a dot import path string: (\S+)", line)) is not None:
        return f"{at}{_no_class(found[1], place, kind)}"
    if re.search(r"Expected an instantiatable class, but ([\w.]+) is abstract", line) is not None:
        example = _example(place, kind)
        return f"{at}no class is chosen: set --{place}={example}, or class_path: {example} in a config"
    if (found := re.search(r"the following arguments are required: (.*)", line)) is not None:
        names = found[1].split(", ")
        if {name.rpartition(".")[2] for name in names} >= {"model", "data"}:
            return _NO_CONFIG
        wanted = ", ".join(f"--{place}.{name}" if place else f"--{name.lstrip('-')}" for name in names)
        return f"{kind.rpartition('.')[2] or 'the command'} needs {', '.join(names)}: set {wanted}"
    return None


_NO_CONFIG = "no class is chosen; begin with a config, as in --config dpo_offline: lightning-rlhf fit --help lists them"


def _wrong_value(lines: list[str], place: str, types: str) -> str | None:
    """The cause where the first line says that a value is no number or no text; `types` are those that were tried."""
    found = re.search(r"Expected a <class '((?!NoneType)\w+)'>(?:\. Got value: (.*))?", lines[0])
    if found is None:
        return None
    wanted, given = found[1], found[2]
    if given is None:
        told = (re.search(r"Given value: (.*)", line) for line in lines)
        given = next((value[1] for value in told if value is not None), "")
        names = re.findall(r"<class '([\w.]+)'>|Literal(\[[^\]]*\])", types)
        wanted = " or ".join((name.rpartition(".")[2] or f"one of {literal}") for name, literal in names) or wanted
        wanted = wanted.replace("NoneType", "null")
    at = f"--{place}: " if place else ""
    return f"{at}must be of type {wanted}; got {given.partition('. Got value: ')[0][:100]}"


def _not_importable(path: str, reason: list[str], place: str, owner: str) -> str | None:
    """The cause where a class path leads nowhere; `reason` is the line that says why."""
    text = reason[0].strip() if reason else ""
    at = f"--{place}: " if place else ""
    if (found := re.search(r"No module named '([\w.]+)'", text)) is None and "has no attribute" not in text:
        return None
    if _is_file(path):
        return f"{at}{_no_class(path, place, owner)}"
    if found is not None:
        return f"{at}no class {path!r}: no module {found[1]!r} in the working folder or on PYTHONPATH"
    module, _, last = path.rpartition(".")
    try:
        known = [name for name in vars(importlib.import_module(module)) if name[:1].isupper()]
    except ImportError:
        known = []
    return f"{at}no class {last!r} in module {module!r}{suggestion(last, known)}"


def _unknown_argument(name: str, class_path: str, place: str) -> str:
    module, _, last = class_path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), last)
    except (ImportError, AttributeError, ValueError):
        return f"{last or 'it'} takes no {name!r}"
    if kind in (L.LightningModule, L.LightningDataModule):
        return _NO_CONFIG
    part: Part | None = Part(place, [kind], kind)
    *groups, leaf = name.split(".")
    for group in groups:
        part = part.inner(group, {}) if part is not None else None
    if part is None or part.chosen is None:
        taker, word, known = last, (groups[0] if groups else name), list(arguments_of(kind))
    else:
        taker, word, known = part.chosen.__name__, leaf, part.names()
    return f"{taker} takes no {word!r}{_hint(leaf if word == name else word, known)}"


def _no_class(name: str, place: str, owner: str) -> str:
    """A value that is no class where one is wanted: a file of rows, or a misspelt name."""
    if _is_file(name):
        if place == "data":
            return f"{name!r} is no class: rows are --data.prompts.path={name}"
        example = _example(place, owner)
        return f"{name!r} is no class: --{place}={example} --{place}.path={name} reads it"
    wanted = _wanted(place, owner)
    groups = [kind.__name__ for kind in wanted if dataclasses.is_dataclass(kind)]
    if groups and len(groups) == len(wanted):
        setting = next(iter(arguments_of(wanted[0])), "")
        return f"got {name}, but {groups[0]} is a group of settings, such as --{place}.{setting}"
    known = {found for kind in wanted for found in subclasses(kind)} or _class_names()
    if place == "model" and not suggestion(name, known):
        return f"no class {name!r}; a checkpoint is --model.policy={name}, or --model.backbone of a reward model"
    alias = CLASSES.get(name.lower(), "")
    hint = f"; did you mean {alias}?" if alias in known else suggestion(name.rpartition(".")[2], known)
    return f"no class {name!r}{hint}"


def _wanted(place: str, owner: str) -> list[type]:
    """Classes that are allowed at a place; none if it is not known."""
    section, _, leaf = place.rpartition(".")
    if place in ("model", "data"):
        return [L.LightningModule if place == "model" else L.LightningDataModule]
    module, _, last = owner.rpartition(".")
    try:
        kind = L.Trainer if section == "trainer" else getattr(importlib.import_module(module), last)
    except (ImportError, AttributeError, ValueError):
        return []
    found = classes_of(type_of(kind, leaf.rstrip("+")))
    return [kind for kind in found if kind.__module__ != "builtins"]


_EXAMPLES = {
    "AbstractPromptSource": "DatasetPrompts",
    "AbstractReward": "FunctionReward",
    "AbstractLabeler": "RewardLabeler",
    "AbstractPairSampler": "VanillaSampler",
}


def _example(place: str, owner: str) -> str:
    """A class for a place, for messages."""
    names = [kind.__name__ for kind in _wanted(place, owner)]
    known = [_EXAMPLES[name] for name in names if name in _EXAMPLES]
    known += sorted(found for kind in _wanted(place, owner) for found in subclasses(kind))
    known += ["DatasetPrompts"] if place.rpartition(".")[2] in ("prompts", "heldout", "pairs") else ["NAME"]
    return known[0]


def _is_file(name: str) -> bool:
    return re.search(r"\.(jsonl|json|csv|tsv|parquet|txt|arrow|gz|zst)$", name) is not None


def _class_names() -> set[str]:
    # every class that jsonargparse finds by a short name is a subclass of something that is imported
    return {name for name, kind in subclasses(object).items() if str(kind.__module__).startswith(_PACKAGES)}


_PACKAGES = ("lightning_rlhf", "torch.optim", "lightning.pytorch")
