"""The fingerprint of a run, as plain data: its settings, and the content of the files that they name.

A class counts by its name, in whatever module it is; a folder of a model counts by its content, wherever it lies.
`lightning_rlhf.ledger.same_run` compares fingerprints, and `lightning_rlhf.ledger.store` keeps them.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib
import inspect
import itertools
import json
import re
import textwrap
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from types import CellType
from typing import Any, Protocol, Self, TypeAlias, cast, overload

import torch

from lightning_rlhf.renamed import renamed_config


FREE_OF_SERVERS = {
    *("base_url", "api_key_env", "requests", "prices", "journal"),
    # of the server on which people judge, and of how long a run waits for them
    *("server_dir", "token_env", "queue", "wait", "enough", "max_lag", "guidelines"),
    # by their names of version 0.1
    *("concurrency", "timeout", "retries", "max_wait", "price_in", "price_out"),
}
"""Settings of judges and annotation servers that may change within a run: addresses, requests, prices, waits."""

FREE_OF_MODELS = {"device", "scoring_batch_tokens", "tokens_per_batch"}
"""Settings of labelers, rewards and samplers that say where and how fast they compute."""

WHOLE = 64 << 20
"""Bytes up to which a file is read whole; of a larger one `SAMPLES` pieces of `SAMPLE` bytes count."""
SAMPLES, SAMPLE = 64, 1 << 20
MODEL_SUFFIXES = (".json", ".safetensors", ".bin", ".gguf", ".model", ".txt", ".jinja", ".py", ".tiktoken")
FILE_SUFFIXES = (".yaml", ".yml", ".json", ".jinja", ".gguf", ".safetensors", ".bin", ".pt", ".parquet")
"""Files that a setting may name to be read; others, such as logs, may be written by the run itself."""

_CONTENT = re.compile(r"(.*?) (?:\[content )?([0-9a-f]{16})\]?", re.DOTALL)
_DEPTH = 12

CLASS_PATH = "class_path"
"""Entry of a checkpoint with the class of the module."""


Settings: TypeAlias = dict[str, Any]
"""A tree of plain data: ``class_path`` and ``init_args`` of the parts of a run, as in a config."""


class _Array(Protocol):
    """An array of numpy, or of a library with the same interface."""

    shape: tuple[int, ...]

    def item(self) -> object: ...


class KeepsArguments:
    """Base class of the parts of a run: an object remembers its constructor arguments."""

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        """Make the object and record its arguments, defaults included."""
        # in __new__, so that a subclass whose __init__ does not call super().__init__ is recorded, too
        made = super().__new__(cls)
        made.note_arguments(*args, **kwargs)
        return made

    def note_arguments(self, *args: Any, **kwargs: Any) -> None:
        """Note the arguments that the object is made with; again where old names of them were translated."""
        try:
            bound = inspect.signature(type(self).__init__).bind(self, *args, **kwargs)
        except (TypeError, ValueError):  # a copy is made without arguments, and gets those of the original
            return
        # a default that is written out and one that is left out are the same setting
        bound.apply_defaults()
        self.__dict__["_arguments"] = _named(bound)


def _named(bound: inspect.BoundArguments) -> dict[str, object]:
    """Arguments by name, without the object itself."""
    found: dict[str, object] = {}
    for name, value in list(bound.arguments.items())[1:]:
        if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            found |= value
        else:
            found[name] = value
    return found


def run_settings(module: object, datamodule: object) -> Settings:
    """Settings of a run that was set up in Python, in the form of the command line.

    Args:
        module: the LightningModule.
        datamodule: the DataModule.
    """
    model = cast(Settings, described(module))
    if hasattr(module, "described_optimizer"):
        # callables make them; optimizer and schedule are the same whether a partial, a lambda or a config gave it
        model["init_args"] = {**model["init_args"], **cast(Settings, described(module.described_optimizer()))}
    return decisive({"model": model, "data": cast(Settings, described(datamodule))}, module, datamodule)


def decisive(settings: Mapping[str, Settings], module: object, datamodule: object) -> Settings:
    """The settings that decide the responses, labels and weights of a run; the classes name the others.

    Args:
        settings: ``model`` and ``data``, each ``class_path`` and ``init_args``; others stay as they are.
        module: the LightningModule.
        datamodule: the DataModule.
    """
    kept = {**settings}
    for name, part in (("model", module), ("data", datamodule)):
        free: frozenset[str] = getattr(part, "FREE_SETTINGS", frozenset())
        # which settings are free may depend on others, e.g. on the dropout of the checkpoint
        if hasattr(part, "free_settings"):
            free = part.free_settings()
        arguments = settings[name].get("init_args", {})
        if hasattr(part, "resolved_settings"):
            # a default of None may stand for another value in each class: the value in force counts
            arguments = with_paths(arguments, part.resolved_settings())
        kept[name] = {**settings[name], "init_args": without_paths(arguments, free)}
    return cast(Settings, with_contents(comparable(kept)))


def without_paths(arguments: Mapping[str, object], paths: Iterable[str]) -> Settings:
    """Arguments without those at some paths; a dot leads into a group, as in ``options.layout``."""
    kept: Settings = dict(arguments)
    for path in paths:
        group, _, leaf = path.partition(".")
        if not leaf:
            kept.pop(group, None)
        elif isinstance(kept.get(group), Mapping):
            kept[group] = {name: value for name, value in kept[group].items() if name != leaf}
    return kept


def with_paths(arguments: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with other values at some paths; a dot leads into a group, which must be there."""
    changed = dict(arguments)
    for path, value in values.items():
        group, _, leaf = path.partition(".")
        if not leaf:
            changed[group] = value
        elif isinstance(changed.get(group), Mapping):
            changed[group] = {**changed[group], leaf: value}
    return changed


def comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their present names, without those that may always change within a run.

    Those are the devices of judges and rewards, and the number of rows decoded at once.
    """
    # a ledger or checkpoint of version 0.1 stores the old names
    kept: Settings = renamed_config(dict(settings))
    if isinstance(kept.get("data"), dict):
        kept["data"] = without(kept["data"], FREE_OF_SERVERS | FREE_OF_MODELS)
        # `without` has copied the tree, so that the settings of the caller stay as they are
        decoding = kept["data"].get("init_args", {}).get("decoding")
        if isinstance(decoding, dict):
            kept["data"]["init_args"]["decoding"] = {k: v for k, v in decoding.items() if k != "rows"}
    return kept


def without(settings: Mapping[str, object], names: Collection[str]) -> Settings:
    """A tree of plain data without the branches of some names."""
    return {name: _without(inner, names) for name, inner in settings.items() if name not in names}


def _without(value: object, names: Collection[str]) -> object:
    if isinstance(value, dict):
        return without(value, names)
    return [_without(inner, names) for inner in value] if isinstance(value, list) else value


# -- objects ----------------------------------------------------------------------------------------------------------


@overload
def described(value: Mapping[str, object], depth: int = 0) -> Settings: ...
@overload
def described(value: object, depth: int = 0) -> object: ...
def described(value: object, depth: int = 0) -> object:
    """An object as plain data that is the same in every process: class and arguments, as in a config.

    State that an object has collected since is left out. Tensors and torch modules count by their content.

    Args:
        value: any argument of a constructor.
        depth: depth in the tree; beyond `_DEPTH` only the class counts.
    """
    if value is None or isinstance(value, bool | int | float | str):
        # an Enum of strings or ints is one of these, and counts by its value, as a config gives it
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Enum | torch.dtype | torch.device):
        return str(value)
    if isinstance(value, type):
        return value.__qualname__
    # objects that refer to each other in a circle would recurse without end
    if depth > _DEPTH:
        return {"class_path": class_path(type(value))}
    if isinstance(value, Mapping):
        return {str(name): described(inner, depth + 1) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [described(inner, depth + 1) for inner in value]
    if isinstance(value, set | frozenset):
        # the order of a set of strings differs between processes, since their hashes do
        return sorted((described(inner, depth + 1) for inner in value), key=json.dumps)
    if dataclasses.is_dataclass(value):
        return {field.name: described(getattr(value, field.name), depth + 1) for field in dataclasses.fields(value)}
    if isinstance(value, torch.Tensor):
        return {"tensor": list(value.shape), "digest": _digest(_tensor_bytes(value))}
    if hasattr(value, "__array__") and hasattr(value, "dtype"):
        array = cast(_Array, value)
        # a numpy scalar, such as np.float32(0.1), counts as the number that it holds
        return array.item() if getattr(array, "shape", None) == () else described(torch.as_tensor(array))
    if isinstance(value, functools.partial):
        return {"function": described([value.func, value.args, value.keywords], depth + 1)}
    if inspect.isroutine(value):
        return _described_function(value, depth)
    return _described_object(value, depth)


def _described_object(value: object, depth: int) -> Settings:
    arguments = value.__dict__.get("_arguments") if hasattr(value, "__dict__") else None
    if arguments is None:
        arguments = _attributes_of_arguments(value)
    found = {}
    for name, argument in arguments.items():
        now = vars(value).get(name) if hasattr(value, "__dict__") else None
        # a plain attribute may have been set after the object was made
        plain = isinstance(now, bool | int | float | str) and isinstance(argument, bool | int | float | str)
        found[name] = described(now if plain else argument, depth + 1)
    tree: Settings = {"class_path": class_path(type(value)), "init_args": found}
    # the arguments of our parts decide their weights; another module may have been loaded since it was made
    if isinstance(value, torch.nn.Module) and not isinstance(value, KeepsArguments):
        pieces = (name.encode() + _tensor_bytes(tensor) for name, tensor in sorted(value.state_dict().items()))
        tree["weights"] = _digest(*pieces)
    return tree


def _attributes_of_arguments(value: object) -> Settings:
    """Arguments of an object that keeps none, as far as it has attributes of the same names."""
    try:
        names = list(inspect.signature(type(value).__init__).parameters)[1:]
    except (TypeError, ValueError):
        return {}
    held = vars(value) if hasattr(value, "__dict__") else {}
    return {name: held.get(name, held.get(f"_{name}")) for name in names if name in held or f"_{name}" in held}


def _described_function(function: object, depth: int) -> Settings:
    """A function by its name, its code without comments, and the variables of its closure."""
    inner = getattr(function, "__func__", function)
    tree: Settings = {"function": getattr(inner, "__qualname__", str(inner)), "code": code_digest(inner)}
    cells = getattr(inner, "__closure__", None) or ()
    if cells:
        tree["closure"] = [described(_cell_value(cell), depth + 1) for cell in cells]
    owner = getattr(function, "__self__", None)
    # the owner of a function in C is its module
    if owner is not None and not inspect.ismodule(owner):
        tree["self"] = described(owner, depth + 1)
    return tree


def code_digest(code: object) -> str | None:
    """Digest of the source of a function or class, in which comments and layout do not count; None without a source.

    A lambda counts by its bytecode: its source is a line that may hold several.
    """
    compiled = getattr(code, "__code__", None)
    try:
        if getattr(code, "__name__", "") != "<lambda>":
            return _digest(ast.dump(ast.parse(textwrap.dedent(inspect.getsource(cast(type, code))))).encode())
    except (OSError, TypeError, SyntaxError, ValueError):
        pass
    if compiled is None:
        return None
    return _digest(compiled.co_code, repr((compiled.co_consts, compiled.co_names)).encode())


def code_of_plugins(*objects: object) -> dict[str, str]:
    """Digests of the code of a user's own classes, by class path, with the plain values in their closures.

    Args:
        objects: parts of a run; their arguments are searched, too.
    """
    found: dict[str, str] = {}
    _collect_code(list(objects), found, 0)
    return found


def _collect_code(value: object, found: dict[str, str], depth: int) -> None:
    if depth > _DEPTH:
        return
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for inner in value:
            _collect_code(inner, found, depth + 1)
        return
    if not isinstance(value, KeepsArguments):
        return
    kind = type(value)
    if not kind.__module__.startswith("lightning_rlhf."):
        methods = [member for member in vars(kind).values() if inspect.isfunction(member)]
        values: list[object] = []
        for method in methods:
            values.extend(map(_cell_value, method.__closure__ or ()))
        outer = [repr(value) for value in values if isinstance(value, bool | int | float | str)]
        # a class typed at a prompt has no source: the bytecode of its methods stands for it
        code = code_digest(kind) or "".join(str(code_digest(method)) for method in methods)
        found[class_path(kind)] = _digest(code.encode(), *(text.encode() for text in outer))
    for function in getattr(value, "own_functions", ()):
        found[f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"] = str(
            code_digest(function if inspect.isroutine(function) else type(function))
        )
    _collect_code(value.__dict__.get("_arguments", {}), found, depth + 1)


def _cell_value(cell: CellType) -> object:
    try:
        return cast(object, cell.cell_contents)
    except ValueError:  # the variable is not assigned yet
        return None


def class_path(kind: type) -> str:
    """Module and name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _tensor_bytes(tensor: torch.Tensor) -> bytes:
    # equal bytes of another type or shape are another tensor
    head = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    # viewed as bytes, since numpy has no bfloat16
    return head + (flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    # 64 bits as 16 hex digits, the length that _CONTENT looks for
    return digest.hexdigest()[:16]


def rebuildable(arguments: Mapping[str, object]) -> Settings:
    """Those of described arguments that an object can be built from again: no functions, tensors or local classes."""
    return {name: _without_empty(value) for name, value in arguments.items() if _is_rebuildable(value)}


def _without_empty(value: object) -> object:
    """A tree without the empty ``*args`` of classes that have no constructor of their own."""
    if isinstance(value, list):
        return [_without_empty(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    kept: Settings = {name: _without_empty(inner) for name, inner in value.items()}
    arguments = kept.get("init_args")
    if "class_path" in kept and isinstance(arguments, dict) and arguments.get("args") == []:
        arguments.pop("args")
    return kept


def _is_rebuildable(value: object) -> bool:
    if isinstance(value, list):
        return all(map(_is_rebuildable, value))
    if not isinstance(value, dict):
        return True
    # marks of `described`
    if {"function", "digest", "weights"} & set(value) or "<" in str(value.get("class_path")):
        return False
    return all(map(_is_rebuildable, value.values()))


# -- content ----------------------------------------------------------------------------------------------------------


def with_contents(value: object) -> object:
    """Settings in which folders of models, and files that are read, are named with a digest of their content.

    Rows have digests of their own (`lightning_rlhf.ledger.same_run`): the settings of prompt sources stay as they are.
    """
    if isinstance(value, dict):
        return {
            name: inner if name in ("class_path", "prompts", "heldout", "pairs") else with_contents(inner)
            for name, inner in value.items()
        }
    if isinstance(value, list):
        return [with_contents(inner) for inner in value]
    if isinstance(value, str) and _CONTENT.fullmatch(value) is None:
        digest = content_digest(value)
        return value if digest is None else f"{value} [content {digest}]"
    return value


def content_digest(name: str) -> str | None:
    """Digest of a local folder of a model, or of a file that settings name to be read; None for anything else.

    Of weights larger than `WHOLE` bytes the size, both ends and evenly spaced pieces count.
    """
    if not 0 < len(name) < 4096 or "\n" in name or "\0" in name:
        return None
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            files = _model_files(path)
        else:
            files = {path.name: path} if path.name.lower().endswith(FILE_SUFFIXES) and path.is_file() else {}
        # a file alone counts without its name
        parts = [(relative.encode() if path.is_dir() else b"", _file_digest(file)) for relative, file in files.items()]
    except (OSError, RuntimeError):  # no valid path, no home folder, or not readable
        return None
    return _digest(*itertools.chain.from_iterable(parts)) if parts else None


def _model_files(folder: Path) -> dict[str, Path]:
    """Files of a model by their name in its folder; none if it is no folder of a model."""
    marks = ("config.json", "adapter_config.json", "*.safetensors", "*.gguf")
    if not any(next(folder.glob(mark), None) for mark in marks):
        return {}
    named: dict[str, Path] = {}
    for file in folder.rglob("*"):
        relative = file.relative_to(folder)
        # the Trainer of transformers leaves checkpoints and its own state beside the model
        is_other = file.name in ("trainer_state.json", "training_args.bin")
        is_other |= any(part.startswith((".", "checkpoint-")) for part in relative.parts)
        if file.suffix.lower() in MODEL_SUFFIXES and not is_other and file.is_file():
            named[str(relative)] = file
    return {name: named[name] for name in sorted(named)}


def _file_digest(file: Path) -> bytes:
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        if size <= WHOLE:
            digest.update(stream.read())
        else:
            for number in range(SAMPLES):
                # offset of piece n of N: (size - SAMPLE) n / (N - 1), so that the last one ends with the file
                stream.seek((size - SAMPLE) * number // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE))
    return digest.digest()


# -- comparing --------------------------------------------------------------------------------------------------------


def differences(then: Mapping[str, object], now: Mapping[str, object], where: str) -> list[str]:
    """One line per setting that differs between two trees of plain data, with both values.

    Classes are compared by the last part of their path; folders and files by their content where it is known.

    Args:
        then: stored settings.
        now: settings of this run.
        where: location of the stored settings, in words.
    """
    old, new = dict(_flatten(then)), dict(_flatten(now))
    keys = [key for key in {**old, **new} if key not in old or key not in new or not _same(key, old[key], new[key])]
    return [_line(key, old, new, where) for key in sorted(keys)]


def _flatten(tree: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
            yield from _flatten({str(i): inner for i, inner in enumerate(value)}, f"{prefix}{key}.")
        # a class without arguments may leave them out
        elif value != {} or key not in ("init_args", "dict_kwargs"):
            yield f"{prefix}{key}", value


def _same(key: str, old: object, new: object) -> bool:
    if old == new:
        return True
    if not isinstance(old, str) or not isinstance(new, str):
        return False
    if key.rpartition(".")[2] == "class_path":
        return old.rpartition(".")[2] == new.rpartition(".")[2]
    # a model that was moved or copied is the same one if its content is
    (old_name, old_content), (new_name, new_content) = _split(old), _split(new)
    return old_content == new_content if old_content and new_content else old_name == new_name


def _split(text: str) -> tuple[str, str | None]:
    """A name, and the digest of its content where it has one."""
    found = _CONTENT.fullmatch(text)
    return (text, None) if found is None else (found[1], found[2])


def _line(key: str, old: dict[str, object], new: dict[str, object], where: str) -> str:
    before, after = old.get(key), new.get(key)
    if isinstance(before, str) and isinstance(after, str):
        (old_name, old_content), (new_name, new_content) = _split(before), _split(after)
        if old_content and new_content and old_name == new_name:
            return f"  {key}: the content of {new_name} has changed"
        return f"  {key}: {old_name!r} {where}, {new_name!r} now"
    return f"  {key}: {_shown(old, key)} {where}, {_shown(new, key)} now"


def _shown(flat: dict[str, object], key: str) -> str:
    return repr(flat[key]) if key in flat else "(absent)"


def without_new_defaults(then: Mapping[str, object], now: Mapping[str, object]) -> tuple[Settings, list[str]]:
    """Settings without those that a newer version has added and that are at their defaults, and the names of these.

    Args:
        then: settings that an earlier version has stored.
        now: settings of this run, a tree of ``class_path`` and ``init_args``.
    """
    kept, names = _without_new_defaults(then, now, None)
    return cast(Settings, kept), names


def _without_new_defaults(then: object, now: object, kind: type | None) -> tuple[object, list[str]]:
    """See `without_new_defaults`; ``kind`` is the class whose arguments ``now`` holds, where that is known."""
    if not isinstance(then, dict) or not isinstance(now, dict):
        return now, []
    if isinstance(now.get("class_path"), str):
        kind = _imported(now["class_path"])
        inner, names = _without_new_defaults(then.get("init_args", {}), now.get("init_args", {}), kind)
        return {**now, "init_args": inner}, names
    kept: dict[str, object] = {}
    left_out: list[str] = []
    for name, value in now.items():
        if name not in then and kind is not None and _default(kind, name) == (True, value):
            left_out.append(name)
            continue
        kept[name], inner_names = _without_new_defaults(then.get(name), value, _dataclass_of(kind, name))
        left_out += [f"{name}.{inner}" for inner in inner_names]
    return kept, left_out


def _imported(path: str) -> type | None:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    # a class that is gone has no known defaults: each of its new settings then counts as a difference
    except (ImportError, AttributeError, ValueError):
        return None
    return found if isinstance(found, type) else None


def _default(kind: type, name: str) -> tuple[bool, object]:
    """Whether an argument has a default, and the default as plain data."""
    parameter = _parameters(kind).get(name)
    if parameter is None or parameter.default is inspect.Parameter.empty:
        return False, None
    return True, json.loads(json.dumps(described(parameter.default)))


def _parameters(kind: type) -> Mapping[str, inspect.Parameter]:
    initialize: Callable[..., None] = kind.__init__  # type: ignore[misc]
    try:
        return inspect.signature(initialize).parameters
    except (TypeError, ValueError):
        return {}


def _dataclass_of(kind: type | None, name: str) -> type | None:
    """The dataclass that an argument is annotated with, alone or beside None."""
    if kind is None:
        return None
    try:
        hint = typing.get_type_hints(kind.__init__).get(name)  # type: ignore[misc]
    # an annotation may name a type that is imported for type checking only
    except (NameError, TypeError, AttributeError):
        return None
    for candidate in (hint, *typing.get_args(hint)):
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return candidate
    return None
