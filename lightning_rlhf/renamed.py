"""Arguments that have new names: the old ones work for one more version, with a note that says the new one.

Version 0.2 put the many flat arguments of modules and DataModules into groups. `RENAMED` is the one table of them; the
command line, configs and constructors all read it. An argument moves into a group: ``learning_rate`` of a model is
``optimizer.lr`` now.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass, replace
from typing import Any, TypeVar


Cls = TypeVar("Cls", bound=type)

RENAMED: dict[str, dict[str, str]] = {
    "model": {
        "learning_rate": "optimizer.lr",
        "weight_decay": "optimizer.weight_decay",
        "warmup_steps": "lr_scheduler.warmup_steps",
        "dtype": "options.dtype",
        "attn_implementation": "options.attn_implementation",
        "gradient_checkpointing": "options.gradient_checkpointing",
        "chat_template": "options.chat_template",
        "layout": "options.layout",
        "tokens_per_batch": "options.scoring_batch_tokens",
        "use_vllm": "options.use_vllm",
        "trust_remote_code": "options.trust_remote_code",
        "disable_dropout": "options.disable_dropout",
        "ema_decay": "reference.ema_decay",
        "objective": "kl.objective",
        "kl_placement": "kl.placement",
        "kl_target": "kl.target",
        "kl_gain": "kl.gain",
        "clip": "loss.clip",
        "aggregation": "loss.aggregation",
        "whiten_advantages": "loss.whiten_advantages",
        "value_model": "value.checkpoint",
        "value_learning_rate": "value.learning_rate",
        "value_coefficient": "value.coefficient",
        "value_clip": "value.clip",
        "margin": "loss.margin",
        "center_coefficient": "loss.center_coefficient",
    },
    "data": {
        "prompts_per_round": "rounds.prompts_per_round",
        "epochs_per_round": "rounds.epochs_per_round",
        "replay": "rounds.replay",
        "label_attempts": "rounds.label_attempts",
        "ledger": "rounds.ledger",
        "tokens_per_batch": "batching.max_tokens_per_micro_batch",
        "length_window": "batching.length_window",
        "max_prompt_tokens": "prompt_options.max_prompt_tokens",
        "on_long_prompt": "prompt_options.on_long_prompt",
        "system_prompt": "prompt_options.system_prompt",
        "normalize_rewards": "shaping.normalize_rewards",
        "missing_eos_penalty": "shaping.missing_eos_penalty",
    },
}
"""Old argument to new path, per section of a config."""

CLASS_PATHS = {
    "optimizer": "torch.optim.AdamW",
    "lr_scheduler": "lightning_rlhf.modules.ConstantWithWarmup",
}
"""Groups that are built by a class: an old argument in a config names the class that it belonged to."""

RENAMED_MODULES = {
    "lightning_rlhf.datamodule": "lightning_rlhf.datamodules",
    "lightning_rlhf.rollout_datamodule": "lightning_rlhf.datamodules",
    "lightning_rlhf.completion_datamodule": "lightning_rlhf.datamodules",
    "lightning_rlhf.comparison": "lightning_rlhf.experiments",
}
"""Modules whose classes configs of version 0.1 name."""

RENAMED_CLASSES = {"SigmoidLoss": "DPOLoss"}
"""Classes with new names."""

KEPT = {"SFTModule": frozenset({"aggregation"})}
"""Arguments whose old name is also the present one, by class."""
RENAMED_SAMPLER_ARGUMENTS = {"label_share": "label_fraction"}
"""Arguments of samplers with new names."""

_REFERENCE_RULES = ("fixed", "previous", "ema")


def renames(section: str, class_path: str | None = None) -> dict[str, str]:
    """Old argument to new path in a section of a config, without those that its class keeps.

    Args:
        section: ``model`` or ``data``.
        class_path: path or name of the class, None if it is not known.
    """
    kept = KEPT.get((class_path or "").rpartition(".")[2], frozenset())
    return {old: new for old, new in RENAMED[section].items() if old not in kept}


def renamed_arguments(
    args: list[str], note: Callable[[str], None] = lambda _: None, model: str | None = None
) -> list[str]:
    """Translate command-line arguments: ``--model.learning_rate=1e-5`` becomes ``--model.optimizer.lr=1e-5``.

    Args:
        args: the arguments.
        note: told every translation.
        model: class of the module, None if it is not known.
    """
    return [
        _renamed_argument(arg, following, note, model) for arg, following in zip(args, [*args[1:], ""], strict=True)
    ]


def _renamed_argument(arg: str, following: str, note: Callable[[str], None], model: str | None) -> str:
    arg = re.sub(
        rf"(?<==)(lightning_rlhf\.[\w.]+|{'|'.join(RENAMED_CLASSES)})$", lambda path: renamed_class(path[0]), arg
    )
    found = re.fullmatch(r"(--data\.(?:init_args\.)?sampler\.(?:init_args\.)?)(\w+)(=.*)?", arg, flags=re.DOTALL)
    if found is not None and found[2] in RENAMED_SAMPLER_ARGUMENTS:
        new = RENAMED_SAMPLER_ARGUMENTS[found[2]]
        note(f"--data.sampler.{found[2]} is --data.sampler.{new} since version 0.2")
        return f"{found[1]}{new}{found[3] or ''}"
    found = re.fullmatch(r"--(\w+)\.(?:init_args\.)?(\w+)(=.*)?", arg, flags=re.DOTALL)
    if found is None:
        return arg
    section, name, value = found[1], found[2], found[3] or ""
    names = renames(section, model) if section in RENAMED else {}
    # "--model.reference previous" has its value in the next argument
    if section == "model" and name == "reference" and (value[1:] or following) in _REFERENCE_RULES:
        new = "reference.rule"
    elif name in names:
        new = names[name]
    else:
        return arg
    note(f"--{section}.{name} is --{section}.{new} since version 0.2")
    return f"--{section}.{new}{value}"


def renamed_config(
    content: dict[str, Any], note: Callable[[str], None] = lambda _: None, model: str | None = None
) -> dict[str, Any]:
    """Translate a config, as read from YAML; the argument is left as it is.

    Args:
        content: the config.
        note: told every translation.
        model: class of the module, for overlays that do not name it.
    """
    result: dict[str, Any] = _with_renamed_classes(content)
    if isinstance(result.get("data"), dict):
        result["data"] = _with_renamed_sampler(result["data"], note)
    for section in RENAMED:
        part = result.get(section)
        if not isinstance(part, dict):
            continue
        names = renames(section, part.get("class_path", model if section == "model" else None))
        # arguments stand under init_args, or, in overlays without a class path, directly in the section
        if isinstance(part.get("init_args"), dict):
            result[section] = {**part, "init_args": _renamed_fields(part["init_args"], section, names, note)}
        elif "class_path" not in part:
            result[section] = _renamed_fields(part, section, names, note)
    return result


def renamed_class(path: str) -> str:
    """The present path of a class that version 0.1 had in another module."""
    module, _, name = path.rpartition(".")
    name = RENAMED_CLASSES.get(name, name)
    return f"{RENAMED_MODULES.get(module, module)}.{name}" if module else name


def _with_renamed_classes(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: renamed_class(inner)
            if key == "class_path" and isinstance(inner, str)
            else _with_renamed_classes(inner)
            for key, inner in value.items()
        }
    return [_with_renamed_classes(inner) for inner in value] if isinstance(value, list) else value


def _with_renamed_sampler(data: dict[str, Any], note: Callable[[str], None]) -> dict[str, Any]:
    """The section ``data`` with the present names of the arguments of its sampler."""
    if isinstance(data.get("init_args"), dict):
        return {**data, "init_args": _with_renamed_sampler(data["init_args"], note)}
    return {**data, "sampler": _renamed_sampler(data["sampler"], note)} if "sampler" in data else data


def _renamed_sampler(sampler: Any, note: Callable[[str], None]) -> Any:
    # a mixture lists its members
    if isinstance(sampler, list):
        return [_renamed_sampler(member, note) for member in sampler]
    if not isinstance(sampler, dict):
        return sampler
    result: dict[str, Any] = {}
    name: str
    for name, value in sampler.items():
        new: str = RENAMED_SAMPLER_ARGUMENTS.get(name, name)
        if new != name:
            note(f"data.sampler.{name} is data.sampler.{new} since version 0.2")
        result[new] = _renamed_sampler(value, note) if name in ("init_args", "samplers") else value
    return result


def _renamed_fields(
    fields: Mapping[str, Any], section: str, names: Mapping[str, str], note: Callable[[str], None]
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in fields.items():
        if section == "model" and name == "reference" and value in _REFERENCE_RULES:
            path = "reference.rule"
        elif name in names:
            path = names[name]
        else:
            result[name] = _merged(result[name], value) if isinstance(result.get(name), dict) else value
            continue
        note(f"{section}.{name} is {section}.{path} since version 0.2")
        group, _, leaf = path.partition(".")
        held = result.get(group)
        target: dict[str, Any] = dict(held) if isinstance(held, dict) else {}
        if group in CLASS_PATHS:
            target = {"class_path": CLASS_PATHS[group], "init_args": {}, **target}
            target["init_args"] = {**target["init_args"], leaf: value}
        else:
            target[leaf] = value
        result[group] = target
    return result


def _merged(old: dict[str, Any], new: Any) -> Any:
    """A group given by its new name; it overrides values that were given by old names."""
    return {**old, **new} if isinstance(new, dict) else new


def adopt_old_selection(sampler: type[Any]) -> None:
    """Let a sampler class of version 0.1 select for labeling, by ``worth_labels`` and ``label_share``.

    Args:
        sampler: a new subclass of `AbstractPairSampler`; changed in place, with a `DeprecationWarning`, if it defines
            ``worth_labels``.
    """
    if "worth_labels" not in vars(sampler):
        return
    warnings.warn(
        f"{sampler.__name__}.worth_labels is select_for_labeling of AbstractSelectiveSampler since version 0.2, and "
        f"label_share is label_fraction",
        DeprecationWarning,
        stacklevel=3,
    )
    sampler.select_for_labeling = sampler.worth_labels
    if not hasattr(sampler, "label_fraction"):
        sampler.label_fraction = property(lambda self: getattr(self, "label_share", 1.0))
    if not hasattr(sampler, "most_labels"):
        # as in AbstractSelectiveSampler
        sampler.most_labels = lambda self, count: math.ceil(self.label_fraction * count - 1e-9)


def renames_arguments(**names: str) -> Callable[[Cls], Cls]:
    """Let a constructor take arguments by their old names, with a `DeprecationWarning`.

    Args:
        names: new name of each old one.
    """

    def decorate(cls: Cls) -> Cls:
        init = cls.__init__  # type: ignore[misc]

        @functools.wraps(init)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
            for old in names.keys() & kwargs.keys():
                kwargs[names[old]] = kwargs.pop(old)
                warnings.warn(
                    f"{cls.__name__}({old}=...) is {names[old]} since version 0.2", DeprecationWarning, stacklevel=2
                )
            init(self, *args, **kwargs)

        cls.__init__ = wrapped  # type: ignore[misc]
        return cls

    return decorate


def accepts_old_names(section: str, **builders: Callable[..., Any]) -> Callable[[Cls], Cls]:
    """Let a constructor take the old names of its arguments, with a `DeprecationWarning`.

    Args:
        section: section of `RENAMED`.
        builders: for groups that are callables, their class with the defaults of old, e.g. a partial of AdamW.
    """

    def decorate(cls: Cls) -> Cls:
        init = cls.__init__  # type: ignore[misc]
        parameters = inspect.signature(init).parameters
        # the groups of this class: dataclasses, and callables with a builder
        groups = {name for name, parameter in parameters.items() if name in builders or is_dataclass(parameter.default)}

        @functools.wraps(init)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
            found: dict[str, dict[str, Any]] = {}
            for name in [name for name in kwargs if name in RENAMED[section] and name not in parameters]:
                group, _, leaf = RENAMED[section][name].partition(".")
                if group in groups:
                    found.setdefault(group, {})[leaf] = kwargs.pop(name)
                    _warn(cls, name, f"{group}.{leaf}")
            if "reference" in groups and kwargs.get("reference") in _REFERENCE_RULES:
                found.setdefault("reference", {})["rule"] = kwargs.pop("reference")
                _warn(cls, "reference", "reference.rule")
            for group, values in found.items():
                held = kwargs.get(group, parameters[group].default)
                if is_dataclass(held) and not isinstance(held, type):
                    kwargs[group] = replace(held, **values)
                else:
                    kwargs[group] = functools.partial(builders[group], **values)
            if found and hasattr(self, "note_arguments"):
                # those of the call had names that the signature does not know
                self.note_arguments(*args, **kwargs)
            init(self, *args, **kwargs)

        cls.__init__ = wrapped  # type: ignore[misc]
        return cls

    return decorate


def _warn(cls: type, old: str, new: str) -> None:
    warnings.warn(f"{cls.__name__}({old}=...) is {new} since version 0.2", DeprecationWarning, stacklevel=3)
