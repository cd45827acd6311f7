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

_CHAIN_OF_THOUGHT = {
    "samples": "chain_of_thought.samples",
    "temperature": "chain_of_thought.temperature",
    "top_p": "chain_of_thought.top_p",
    "max_rationale_tokens": "chain_of_thought.max_tokens",
}
_JUDGE_OPTIONS = {
    "chat": "judge_options.chat",
    "chat_template": "judge_options.chat_template",
    "dtype": "judge_options.dtype",
    "device": "judge_options.device",
    "tokens_per_batch": "judge_options.scoring_batch_tokens",
    "trust_remote_code": "judge_options.trust_remote_code",
}

RENAMED_OF_CLASS: dict[str, dict[str, str]] = {
    "LLMLabeler": _CHAIN_OF_THOUGHT | _JUDGE_OPTIONS,
    "ServerLabeler": _CHAIN_OF_THOUGHT,
    "LLMScoreReward": _JUDGE_OPTIONS,
    "RewardModelReward": {"tokens_per_batch": "scoring_batch_tokens"},
    "LocalJudge": {old: new.replace("judge_options.", "options.") for old, new in _JUDGE_OPTIONS.items()},
    "PolicyWeightedSampler": {"label_share": "label_fraction"},
    "JudgeServer": {
        "concurrency": "requests.concurrency",
        "timeout": "requests.timeout",
        "retries": "requests.retries",
        "max_wait": "requests.max_wait",
        "price_in": "prices.input",
        "price_out": "prices.output",
    },
    "EvaluationRun": {
        "dtype": "policy_options.dtype",
        "device": "policy_options.device",
        "chat_template": "policy_options.chat_template",
        "on_long_prompt": "policy_options.on_long_prompt",
        "trust_remote_code": "policy_options.trust_remote_code",
        "harmless_above": "options.harmless_above",
        "reference": "options.reference",
        "label_attempts": "options.label_attempts",
        "chunk": "options.chunk",
        "seed": "options.seed",
    },
}
"""Old argument to new path, per class, wherever in a config the class stands."""

SWITCHES = {"LLMLabeler": "chain_of_thought", "ServerLabeler": "chain_of_thought"}
"""Groups that version 0.1 switched on and off with ``true`` and ``false``."""

CLASS_OF_ARGUMENT = {("ServerLabeler", "server"): "JudgeServer", ("ServerScoreReward", "server"): "JudgeServer"}
"""Arguments whose class a config or command line may leave out, by the class that they belong to."""

CLASS_OF_COMMAND = {"evaluate": "EvaluationRun"}
"""Classes whose arguments are the settings of a command."""

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
    args: list[str],
    note: Callable[[str], None] = lambda _: None,
    classes: Mapping[str, str] | None = None,
    command: str = "",
) -> list[str]:
    """Translate command-line arguments: ``--model.learning_rate=1e-5`` becomes ``--model.optimizer.lr=1e-5``.

    Args:
        args: the arguments.
        note: told every translation.
        classes: names of the classes that configs give, by path without ``init_args``, such as ``data.labeler``.
        command: the command, where its settings are not those of a Trainer.
    """
    # the command line comes after configs: a class that it names replaces theirs
    known = {**(classes or {}), **_classes_in(args)}
    renamed = args
    if not command:
        pairs = zip(args, [*args[1:], ""], strict=True)
        renamed = [_renamed_argument(arg, following, note, known.get("model")) for arg, following in pairs]
    if command in CLASS_OF_COMMAND:
        known[""] = CLASS_OF_COMMAND[command]
    return _without_late_switches([_renamed_of_class(arg, known, note) for arg in renamed])


def plain_path(path: str) -> str:
    """Path of a setting without ``init_args`` and ``class_path``, as a user writes it on the command line."""
    return ".".join(part for part in path.split(".") if part not in ("init_args", "class_path"))


def _classes_in(args: list[str]) -> dict[str, str]:
    """Names of classes that arguments give, by path: ``--labeler=LLMLabeler`` or ``--labeler LLMLabeler``."""
    found: dict[str, str] = {}
    for arg, following in zip(args, [*args[1:], ""], strict=True):
        path, given, value = arg.partition("=")
        name = value if given else following
        if path.startswith("--") and re.fullmatch(r"([A-Za-z_]\w*\.)*[A-Z]\w*", name):
            found[plain_path(path[2:])] = name.rpartition(".")[2]
    return found


def _renamed_of_class(arg: str, classes: Mapping[str, str], note: Callable[[str], None]) -> str:
    found = re.fullmatch(r"--((?:\w+\.)*)(\w+)(=.*)?", arg, flags=re.DOTALL)
    if found is None:
        return arg
    prefix, name, value = found[1], found[2], found[3] or ""
    place = plain_path(prefix.rstrip("."))
    outer, _, argument = place.rpartition(".")
    owner = classes.get(place) or CLASS_OF_ARGUMENT.get((classes.get(outer, ""), argument), "")
    if name == SWITCHES.get(owner) and value.lower() in ("=true", "=false"):
        # the group that replaced the switch: {} has its defaults, null switches it off
        return f"--{prefix}{name}={'{}' if value.lower() == '=true' else 'null'}"
    new = RENAMED_OF_CLASS.get(owner, {}).get(name)
    if new is None:
        return arg
    note(f"--{prefix}{name} is --{prefix}{new} since version 0.2")
    return f"--{prefix}{new}{value}"


def _without_late_switches(args: list[str]) -> list[str]:
    """Arguments without ``GROUP={}`` behind settings of the group, which it would take back."""
    kept: list[str] = []
    for arg in args:
        group = arg.removesuffix("={}")
        if group == arg or not any(earlier.startswith(f"{group}.") for earlier in kept):
            kept.append(arg)
    return kept


def _renamed_argument(arg: str, following: str, note: Callable[[str], None], model: str | None) -> str:
    arg = re.sub(
        rf"(?<==)(lightning_rlhf\.[\w.]+|{'|'.join(RENAMED_CLASSES)})$", lambda path: renamed_class(path[0]), arg
    )
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
    result: dict[str, Any] = _with_renamed_classes(content, note)
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


def renamed_settings(
    settings: Mapping[str, Any], command: str, note: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Translate the settings of a command without a Trainer, from a config or from a ledger of version 0.1.

    Args:
        settings: the settings.
        command: the command.
        note: told every translation.
    """
    result: dict[str, Any] = _with_renamed_classes(dict(settings), note)
    if "verb" in result:
        result["command"] = result.pop("verb")
    owner = CLASS_OF_COMMAND.get(command)
    return result if owner is None else _renamed_of(owner, result, note)


def renamed_class(path: str) -> str:
    """The present path of a class that version 0.1 had in another module."""
    module, _, name = path.rpartition(".")
    name = RENAMED_CLASSES.get(name, name)
    return f"{RENAMED_MODULES.get(module, module)}.{name}" if module else name


def _with_renamed_classes(value: Any, note: Callable[[str], None]) -> Any:
    """Settings with the present names of classes, and of the arguments of classes."""
    if isinstance(value, list):
        return [_with_renamed_classes(inner, note) for inner in value]
    if not isinstance(value, dict):
        return value
    result = {key: _with_renamed_classes(inner, note) for key, inner in value.items()}
    path = result.get("class_path")
    if not isinstance(path, str):
        return result
    # `result` is a copy, inner objects included: the caller keeps its settings
    result["class_path"] = renamed_class(path)
    arguments, owner = result.get("init_args"), result["class_path"].rpartition(".")[2]
    if not isinstance(arguments, dict):
        return result
    for name, argument in arguments.items():
        inner = CLASS_OF_ARGUMENT.get((owner, name))
        # without a class path the type of the argument says the class
        if inner is not None and isinstance(argument, dict) and "class_path" not in argument:
            arguments[name] = _renamed_of(inner, argument, note)
    if owner in RENAMED_OF_CLASS:
        result["init_args"] = _renamed_of(owner, arguments, note)
    return result


def _renamed_of(owner: str, arguments: Mapping[str, Any], note: Callable[[str], None]) -> dict[str, Any]:
    """Arguments of a class of `RENAMED_OF_CLASS` by their present names."""
    names, switch = RENAMED_OF_CLASS[owner], SWITCHES.get(owner)
    result: dict[str, Any] = {}
    for name, value in arguments.items():
        if name == switch and isinstance(value, bool):
            # old names before the switch may have filled the group
            result[name] = {**(result.get(name) or {})} if value else None
            continue
        if name not in names:
            held = result.get(name)
            result[name] = _merged(held, value) if isinstance(held, dict) else value
            continue
        group, _, leaf = names[name].partition(".")
        if group == switch and arguments.get(group) in (None, False):
            # version 0.1 read these settings only where the group was switched on; to pass them on would switch it on
            note(f"{owner}.{name} has no effect without {owner}.{group}; since version 0.2 it is {names[name]}")
            continue
        note(f"{owner}.{name} is {owner}.{names[name]} since version 0.2")
        result[group] = {**(result.get(group) or {}), leaf: value} if leaf else value
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
            # a class path that is given beside old names comes last, and wins
            target = {"class_path": CLASS_PATHS[group], "init_args": {}, **target}
            target["init_args"] = {**target["init_args"], leaf: value}
        else:
            target[leaf] = value
        result[group] = target
    return result


def _merged(old: dict[str, Any], new: Any) -> Any:
    """A group that is given by its new name, over the values that old names gave it."""
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
        # the class statement of the user: this function, __init_subclass__, then that line
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
        section: section of `RENAMED`, or a class of `RENAMED_OF_CLASS`.
        builders: for groups that are callables, their class with the defaults of old, e.g. a partial of AdamW; for
            groups that may be absent, their dataclass.
    """

    old_names = RENAMED[section] if section in RENAMED else RENAMED_OF_CLASS[section]

    def decorate(cls: Cls) -> Cls:
        init = cls.__init__  # type: ignore[misc]
        parameters = inspect.signature(init).parameters
        # the groups of this class: dataclasses, and callables or dataclasses with a builder
        known = {name for name, parameter in parameters.items() if name in builders or is_dataclass(parameter.default)}

        # wraps keeps the signature, which the command line and the fingerprint read
        @functools.wraps(init)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
            groups: dict[str, dict[str, Any]] = {}
            given = dict(kwargs)
            for name in [n for n in kwargs if n in old_names and n not in parameters]:
                group, _, leaf = old_names[name].partition(".")
                # the name is one of another class of the section: the constructor refuses it
                if group not in (known if leaf else parameters):
                    continue
                value = kwargs.pop(name)
                if leaf:
                    groups.setdefault(group, {})[leaf] = value
                else:
                    kwargs[group] = value
                warnings.warn(
                    f"{cls.__name__}({name}=...) is {old_names[name]} since version 0.2",
                    DeprecationWarning,
                    stacklevel=2,
                )
            if "reference" in known and kwargs.get("reference") in _REFERENCE_RULES:
                groups.setdefault("reference", {})["rule"] = kwargs.pop("reference")
                warnings.warn(
                    f"{cls.__name__}(reference=...) is reference.rule since version 0.2",
                    DeprecationWarning,
                    stacklevel=2,
                )
            switch = SWITCHES.get(section)
            if (
                switch is not None
                and kwargs.get(switch) in (None, True, False)
                and (switch in groups or switch in kwargs)
            ):
                # version 0.1 read the settings of a group only where the group was switched on
                values = groups.pop(switch, {})
                kwargs[switch] = builders[switch](**values) if kwargs.get(switch) else None
            for group, values in groups.items():
                held = kwargs.get(group, parameters[group].default)
                if is_dataclass(held) and not isinstance(held, type):
                    # a copy: the default of a signature is shared by all objects
                    kwargs[group] = replace(held, **values)
                else:
                    kwargs[group] = functools.partial(builders[group], **values)
            # a subclass with a constructor of its own has noted the arguments of that one
            if kwargs != given and type(self).__init__ is wrapped and hasattr(self, "note_arguments"):
                self.note_arguments(*args, **kwargs)
            init(self, *args, **kwargs)

        cls.__init__ = wrapped  # type: ignore[misc]
        return cls

    return decorate
