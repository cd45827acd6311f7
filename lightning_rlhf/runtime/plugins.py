"""Checks of plug-ins: objects that were not built, return values of the wrong type, errors of constructors."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from jsonargparse import Namespace
from jsonargparse import __file__ as _jsonargparse


T = TypeVar("T")

CLASS_PATH = re.compile(r"([A-Za-z_]\w*\.)+_*[A-Z]\w*")
"""Form of a class path, so that no file name is imported."""

ANYTHING = re.compile(r"((\w+\.)?Optional\[)?(\w+\.)?(Any|object)\]?( *\| *None)?")
"""Annotations that allow any type."""


def check_plugin(seat: str, value: object, kind: type) -> None:
    """Check the type of a plug-in when a run is set up.

    An object with the methods of the type is accepted as well.

    Args:
        seat: name of the argument, e.g. ``data.labeler``.
        value: its value.
        kind: the abstract base class that it needs.

    Raises:
        TypeError: naming the argument, its value and the remedy.
    """
    needed = sorted(getattr(kind, "__abstractmethods__", ()))
    if isinstance(value, kind) or (not isinstance(value, type) and all(callable(_of(value, name)) for name in needed)):
        return
    if isinstance(value, type):
        remedy = f"give an object of the class: {value.__name__}(...)"
    elif isinstance(value, str):
        remedy = (
            f"give an object, not its name; an argument of a class of your own needs a type, "
            f"{seat.rpartition('.')[2]}: {kind.__name__}, for the command line to build it"
        )
    elif isinstance(value, dict | Namespace):
        remedy = (
            f"it was not built, because the argument that it came through has no type: write "
            f"{seat.rpartition('.')[2]}: {kind.__name__} in the constructor"
        )
    else:
        remedy = f"give an object of a subclass of {kind.__name__}"
    raise TypeError(f"{seat} must be an {kind.__name__}; got {_shown(value)}: {remedy}")


def _of(value: object, name: str) -> object:
    if not name.startswith("__"):
        return getattr(value, name, None)
    # Python looks __call__ up in the class; getattr would find that of the metaclass, which makes every object callable
    return next((vars(base)[name] for base in type(value).__mro__ if name in vars(base)), None)


def _shown(value: object) -> str:
    if isinstance(value, Namespace | dict) and "class_path" in value:
        return f"the description of a {value['class_path']}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"{value!r:.80}" if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


def returned(plugin: object, method: str, made: object, count: int, kind: type[T], what: str) -> list[T]:
    """Check the result of a plug-in: a list of objects of one class, one for each input.

    Args:
        plugin: the plug-in.
        method: name of its method.
        made: the result.
        count: number of inputs.
        kind: class of the entries.
        what: the inputs in words, e.g. ``comparisons``.

    Raises:
        TypeError: if the result is no list, or holds objects of another class.
        ValueError: if it has more or fewer entries.
    """
    name = f"{type(plugin).__name__}.{method}"
    expected = f"return a list with a {kind.__name__} per {what.removesuffix('s')}, in order"
    # a string and a mapping can be iterated, but their characters and keys are no results
    if not isinstance(made, Iterable) or isinstance(made, str | bytes | Mapping):
        raise TypeError(f"{name} returned {_shown(made)}; {expected}")
    # a generator runs here, so that its results can be counted
    found = list(made)
    if len(found) != count:
        raise ValueError(
            f"{name} returned {len(found)} {kind.__name__.lower()}s for {count} {what}; return one per "
            f"{what.removesuffix('s')}, in order"
        )
    for item in found:
        if not isinstance(item, kind):
            raise TypeError(f"{name} returned a list that holds {_shown(item)}; {expected}")
    return found


SEATS = ("samplers", "labelers", "rewards", "losses", "advantages", "prompts", "preference_models")
"""Packages whose classes have short names."""


# ---- objects that were not built ---------------------------------------------------------------------------------


def check_built(config: object, path: str = "") -> None:
    """Search a configuration for descriptions of objects that would not be built.

    jsonargparse builds an object only for an argument with a type; an argument without one gets the description.

    Args:
        config: the configuration, before any object is built.
        path: its path in the whole configuration.

    Raises:
        TypeError: naming the class, the argument and the remedy.
    """
    for place, cls, arguments in _classes(config, path):
        for name, value in arguments.items():
            if _typed(cls, name):
                continue
            described = _described(value)
            if described is not None:
                raise TypeError(
                    f"{place}.{name}: {cls.__name__} takes {name} without a type, so that {described} would not be "
                    f"built and it would get its description: write the type in the constructor, as in "
                    f"`{name}: {_kind_of(described)}`"
                )


def _classes(config: object, path: str) -> Iterator[tuple[str, type, Mapping[str, object]]]:
    """Classes of a configuration with their arguments, outer ones first."""
    if isinstance(config, list | tuple):
        for number, item in enumerate(config):
            yield from _classes(item, f"{path}[{number}]")
        return
    config = vars(config) if isinstance(config, Namespace) else config
    if not isinstance(config, dict):
        return
    name = config.get("class_path")
    if isinstance(name, str):
        arguments = config.get("init_args") or {}
        arguments = vars(arguments) if isinstance(arguments, Namespace) else arguments
        cls = _imported(name)
        if cls is not None and isinstance(arguments, dict):
            yield path, cls, arguments
        yield from _classes(arguments, path)
        return
    for key, item in config.items():
        yield from _classes(item, f"{path}.{key}" if path else str(key))


def _imported(name: str) -> type | None:
    module, _, attribute = name.rpartition(".")
    if not module or not CLASS_PATH.fullmatch(name):
        return None
    try:
        found = getattr(__import__(module, fromlist=[attribute]), attribute, None)
    except Exception:  # an error in a user's module is reported when the object is built
        return None
    return found if isinstance(found, type) else None


def _typed(cls: type, name: str) -> bool:
    """Whether an argument of a constructor has a type other than `Any` or `object`."""
    for base in cls.__mro__:
        made = vars(base).get("__init__")
        if made is None:
            continue
        parameters = inspect.signature(made).parameters
        if name in parameters:
            return not ANYTHING.fullmatch(_spelt(parameters[name].annotation))
        # **kwargs hand an argument on to a base class, which may give its type
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            return True  # a dataclass, or a signature that is made at run time
    return True


def _spelt(annotation: object) -> str:
    if annotation is inspect.Parameter.empty:
        return "Any"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _described(value: object) -> str | None:
    """Class path of an object that is described somewhere in a value; None if there is none."""
    if isinstance(value, list | tuple):
        return next(filter(None, map(_described, value)), None)
    if isinstance(value, Namespace | dict):
        name = value.get("class_path") if "class_path" in value else None
        if isinstance(name, str):
            return name
        items = vars(value).values() if isinstance(value, Namespace) else value.values()
        return next(filter(None, map(_described, items)), None)
    if isinstance(value, str):
        # "PILAFSampler" is short for a class of one of our packages
        ours = (f"lightning_rlhf.{seat}.{value}" for seat in SEATS)
        names = [value] if "." in value else ours if value[:1].isupper() else ()
        return next((name for name in names if _plugged(_imported(name))), None)
    return None


def _plugged(cls: type | None) -> bool:
    return cls is not None and any(base.__module__.startswith("lightning_rlhf.") for base in cls.__mro__)


def _kind_of(name: str) -> str:
    """The abstract class of ours that a class belongs to; the class itself if there is none."""
    cls = _imported(name)
    bases = [base.__name__ for base in (cls.__mro__ if cls else ()) if base.__name__.startswith("Abstract")]
    # the last one in the order of resolution is the most general
    return bases[-1] if bases else name.rpartition(".")[2]


# ---- errors of constructors --------------------------------------------------------------------------------------


def constructor_error(error: BaseException, config: object) -> str | None:
    """Message of the constructor that failed, and its place, instead of a dump of the configuration; None if unknown.

    Args:
        error: the error of building the configuration.
        config: the configuration.
    """
    # down the chain of causes to the first error that is not of jsonargparse
    root = error
    while _wrapped(root):
        if root.__cause__ is None:
            # jsonargparse itself refused the value, and writes it out in full behind its message
            return str(root).partition("\nGiven value type:")[0]
        root = root.__cause__
    # a package that is not installed, which the constructor names, is told as short as a wrong value
    if root is error and not isinstance(error, ImportError):
        return None
    place = _raised_in(root)
    message = str(root)
    kind = "" if isinstance(root, ValueError) else f"{type(root).__name__}: "
    if place is None:
        return f"{kind}{message}"
    cls, where = place
    paths = [path for path, found, _ in _classes(config, "") if issubclass(found, cls)]
    at = f" at {paths[0]}" if paths else ""
    return f"{kind}{message}\n(from the constructor of {cls.__module__}.{cls.__qualname__}{at}; {where})"


def _wrapped(error: BaseException) -> bool:
    """Whether an error is of jsonargparse, which repeats the whole value around the cause."""
    return re.search(r"Namespace\(|Given value type:|Problem with given class_path", str(error)) is not None


def _raised_in(error: BaseException) -> tuple[type, str] | None:
    """The class whose constructor raised an error, and file and line of that."""
    # the innermost __init__ of the traceback
    trace, found = error.__traceback__, None
    while trace is not None:
        code, own = trace.tb_frame.f_code, trace.tb_frame.f_locals.get("self")
        inside = Path(code.co_filename).is_relative_to(Path(_jsonargparse).parent)
        if code.co_name == "__init__" and own is not None and not inside:
            found = type(own), f"{code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found
