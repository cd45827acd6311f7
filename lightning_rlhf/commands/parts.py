"""Parts of a run by their place on the command line: their classes, their arguments, and help about them."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import types
import typing
from collections.abc import Mapping, Sequence

from docstring_parser import parse as parse_docstring

from lightning_rlhf.commands.overview import suggestion


HELP = re.compile(r"--([\w.]+)\.help(?:=(.+))?")


def arguments_of(kind: type) -> dict[str, inspect.Parameter]:
    """Arguments of a constructor by name, those of base classes included where it hands them on."""
    found: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__:
        made = vars(base).get("__init__")
        if made is None:
            continue
        parameters = list(inspect.signature(made).parameters.values())[1:]
        found = {p.name: p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)} | found
        # the base class has the arguments that this one hands on
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def type_of(kind: type, name: str) -> object:
    """Annotation of an argument, `object` where it has none."""
    for base in kind.__mro__:
        made = vars(base).get("__init__")
        try:
            hints = typing.get_type_hints(made) if made is not None else {}
        # an annotation may name a type that is imported for type checking only
        except (NameError, TypeError):
            hints = {}
        if name in hints:
            return hints[name]
    return object


def classes_of(annotation: object) -> list[type]:
    """Classes that an annotation allows, without None; of a callable, those of its result."""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return [] if annotation is types.NoneType else [annotation]
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return []
    # an optimizer is given as a callable that makes one
    made = arguments[-1:] if "Callable" in str(typing.get_origin(annotation)) else arguments
    found: list[type] = []
    for inner in made:
        found += classes_of(inner)
    return found


def subclasses(kind: type) -> dict[str, type]:
    """Classes that can be built where a class is expected, by their short name."""
    found: dict[str, type] = {}
    waiting = [kind]
    while waiting:
        one = waiting.pop()
        waiting += type.__subclasses__(one)
        # helpers of tests and of other libraries begin with an underscore
        if not inspect.isabstract(one) and not one.__name__.startswith(("_", "Abstract")):
            found[one.__name__] = one
    return found


def find_class(name: str, kinds: Sequence[type]) -> type | None:
    """A class by its short name or its path, among those that are allowed."""
    module, _, last = name.rpartition(".")
    if module:
        try:
            found = getattr(importlib.import_module(module), last)
        except (ImportError, AttributeError, ValueError):
            return None
        return found if isinstance(found, type) else None
    return next((found[name] for found in map(subclasses, kinds) if name in found), None)


class Part:
    """A part of a run on the command line.

    Args:
        path: its place, e.g. ``data.sampler``.
        kinds: classes that are allowed there.
        chosen: the class that is there; None for a plain value, or where nothing is chosen.
        owner: class whose argument it is; None for a whole section.
    """

    def __init__(self, path: str, kinds: Sequence[type], chosen: type | None, owner: type | None = None) -> None:
        self.path, self.kinds, self.chosen, self.owner = path, kinds, chosen, owner

    def inner(self, name: str, given: Mapping[str, str]) -> Part | None:
        """The part at one of the arguments of the class that is chosen; None if it has none of that name."""
        if self.chosen is None or name not in arguments_of(self.chosen):
            return None
        path = f"{self.path}.{name}" if self.path else name
        kinds = [kind for kind in classes_of(type_of(self.chosen, name)) if kind.__module__ != "builtins"]
        # groups of settings are dataclasses, which stand for themselves
        alone = kinds[0] if len(kinds) == 1 and dataclasses.is_dataclass(kinds[0]) else None
        return Part(path, kinds, find_class(given[path], kinds) if path in given else alone, self.chosen)

    def names(self) -> list[str]:
        """Names of the arguments of the class that is chosen."""
        return [] if self.chosen is None else list(arguments_of(self.chosen))

    def classes(self) -> dict[str, type]:
        """Classes that can be chosen here, by their short name; groups of settings are none."""
        found: dict[str, type] = {}
        for kind in self.kinds:
            found |= {} if dataclasses.is_dataclass(kind) else subclasses(kind)
        return {name: kind for name, kind in found.items() if _ours(kind)}

    def help(self) -> str:
        """Describe the part: its classes, and the arguments of the one that is chosen."""
        lines = []
        if self.owner is not None:
            lines += [f"--{self.path}: {described_argument(self.owner, self.path.rpartition('.')[2])}", ""]
        choices = sorted(self.classes())
        if choices:
            lines += [f"classes: {', '.join(choices)}; or module.Class of your own", ""]
            lines += [f"--{self.path}.help={choices[0]} explains one of them; --{self.path}=NAME chooses it", ""]
        if self.chosen is not None:
            lines += [
                f"{self.chosen.__module__}.{self.chosen.__qualname__}",
                "",
                *_described_class(self.chosen, self.path),
            ]
        return "\n".join(lines).rstrip()


def described_argument(kind: type, name: str) -> str:
    """Type, default and meaning of an argument in one line."""
    parameter = arguments_of(kind)[name]
    default = "required" if parameter.default is parameter.empty else f"default {_short(parameter.default)}"
    meaning = next((text for text in _meanings(kind, name)), "")
    return f"{_named(type_of(kind, name))}, {default}{': ' if meaning else ''}{meaning}"


def _meanings(kind: type, name: str) -> list[str]:
    found = []
    for base in kind.__mro__:
        for text in (base.__doc__, vars(base).get("__init__", object).__doc__):
            described = parse_docstring(text or "").params
            found += [" ".join((p.description or "").split()) for p in described if name in p.arg_name.split(", ")]
    return found


def _described_class(kind: type, path: str) -> list[str]:
    parsed = parse_docstring(inspect.cleandoc(kind.__doc__ or ""))
    lines = [*filter(None, [parsed.short_description, parsed.long_description]), ""]
    for name in arguments_of(kind):
        lines += [f"  --{path}.{name}", f"      {described_argument(kind, name)}"]
    return lines


def _ours(kind: type) -> bool:
    """Whether the package of a class exports it: others are bases, or parts of a command."""
    package, _, _ = str(kind.__module__).rpartition(".")
    known = package.startswith(("lightning_rlhf.", "torch.optim", "lightning.pytorch.callbacks"))
    return known and getattr(importlib.import_module(package), kind.__name__, None) is kind


def _named(annotation: object) -> str:
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return re.sub(r"(?:\w+\.)+(\w+)", r"\1", text).replace("NoneType", "null").replace("None", "null")


def _short(value: object) -> str:
    if value is None:
        return "null"
    if dataclasses.is_dataclass(value):
        return "see its settings"
    return "a function" if callable(value) else repr(value)


def asked_for_help(args: Sequence[str]) -> tuple[str, str | None] | None:
    """Path and class that a command line asks help about, by ``--model.loss.help`` or ``--help=model.loss``."""
    for arg in args:
        if (found := HELP.fullmatch(arg)) is not None:
            return found[1].replace("init_args.", ""), found[2]
        if arg.startswith("--help="):
            return arg.partition("=")[2].replace("init_args.", ""), None
    return None


def part_at(path: str, roots: Mapping[str, Part], given: Mapping[str, str]) -> Part:
    """Find a part by its path.

    Args:
        path: the path, e.g. ``data.sampler``.
        roots: sections of the command line by name.
        given: class names by path, of configs and command line.

    Raises:
        ValueError: if there is none, naming the nearest.
    """
    first, *rest = path.split(".")
    if first not in roots:
        raise ValueError(f"no section {first!r}{suggestion(first, roots)}; there are {', '.join(roots)}")
    part = roots[first]
    for name in rest:
        inner = part.inner(name, given)
        if inner is None and part.chosen is None:
            raise ValueError(f"choose a class for --{part.path} first, as in --{part.path}=NAME --{path}.help")
        if inner is None:
            taker = part.chosen.__name__ if part.chosen else part.path
            raise ValueError(f"{taker} takes no {name!r}{suggestion(name, part.names())}")
        part = inner
    return part
