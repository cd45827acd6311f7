"""Errors of the command line in a few lines: the cause with the nearest name first, usage after it."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Iterator
from typing import NoReturn

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from lightning_rlhf.commands.overview import short_usage, suggestion
from lightning_rlhf.commands.parts import Part, arguments_of, subclasses


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
        word = found[1].split("=")[0].split()[0]
        return f"no setting {word}{suggestion(word, options)}"
    if (found := re.match(r"no config '(.*)': neither a file, nor one of (.*)", message)) is not None:
        known = found[2].split(", ")
        return f"no config {found[1]!r}, neither a file nor a name{suggestion(found[1], known)}"
    place: list[str] = []
    kind = ""
    for line in message.splitlines():
        if (found := re.search(r"Parser key \"([\w.+]+)\":", line)) is not None:
            place.append(found[1])
        if (found := re.search(r"Problem with given class_path '([\w.]+)'", line)) is not None:
            kind = found[1]
        text = _known_cause(line, ".".join(place), kind)
        if text is not None:
            return text
    # nothing known: the lines that say something, without the repeated value
    lines = [line.strip(" -") for line in message.splitlines() if not _NOISE.match(line)]
    return "\n  ".join(line[:300] for line in lines[:4])


def _known_cause(line: str, place: str, kind: str) -> str | None:
    at = f"--{place}: " if place else ""
    if (found := re.search(r"Option '([\w.]+)' is not accepted", line)) is not None:
        # of a callable, such as an optimizer, the class stands behind
        inner = re.search(r"class_path='([\w.]+)'", line)
        return f"{at}{_unknown_argument(found[1], inner[1] if inner else kind, place)}"
    if (found := re.search(r"Expected a dot import path string: (\S+)", line)) is not None:
        return f"{at}no class {found[1]!r}{suggestion(found[1], _class_names())}"
    if (found := re.search(r"the following arguments are required: (.*)", line)) is not None:
        names = found[1].split(", ")
        wanted = ", ".join(f"--{place}.{name}" if place else f"--{name.lstrip('-')}" for name in names)
        return f"{kind.rpartition('.')[2] or 'the command'} needs {', '.join(names)}: set {wanted}"
    if (found := re.search(r"Expected a <class '(?!NoneType)(\w+)'>\. Got value: (.*)", line)) is not None:
        return f"{at}must be of type {found[1]}; got {found[2][:100]}"
    return None


def _unknown_argument(name: str, class_path: str, place: str) -> str:
    module, _, last = class_path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), last)
    except (ImportError, AttributeError, ValueError):
        return f"{last or 'it'} takes no {name!r}"
    part: Part | None = Part(place, [kind], kind)
    *groups, leaf = name.split(".")
    for group in groups:
        part = part.inner(group, {}) if part is not None else None
    if part is None or part.chosen is None:
        return f"{last} takes no {name!r}{suggestion(groups[0] if groups else name, list(arguments_of(kind)))}"
    return f"{part.chosen.__name__} takes no {leaf!r}{suggestion(leaf, part.names())}"


def _class_names() -> set[str]:
    # every class that jsonargparse finds by a short name is a subclass of something that is imported
    return {name for name, kind in subclasses(object).items() if str(kind.__module__).startswith(_PACKAGES)}


_PACKAGES = ("lightning_rlhf", "torch.optim", "lightning.pytorch")
