"""LoRA and the other adapters of PEFT: their settings, checked against the model that gets them."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from typing import TYPE_CHECKING, TypeAlias, cast

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, PeftConfig, PeftType
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


PeftValue: TypeAlias = (
    bool | int | float | str | list[int] | list[str] | dict[str, int] | dict[str, float] | dict[str, list[int]] | None
)
"""A setting of PEFT as a config file has it."""

OWN_NAMES = {"r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "target_modules"}
"""Settings of ``peft.LoraConfig`` that `LoRA` has a name for."""

PLAIN_SETTINGS = frozenset(
    {"alpha_pattern", "exclude_modules", "fan_in_fan_out", "layers_pattern", "layers_to_transform", "rank_pattern"}
    | {"use_rslora"}
)
"""Settings of ``peft.LoraConfig`` that leave W + s B A as it is: the layers, the ranks and the scales s."""

_OF_FILES = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type")
"""Settings of PEFT that say where an adapter came from, and not how it computes."""

_FROM_DATA = ("corda", "eva", "loftq", "lora_ga")
"""Initializations that PEFT computes from data, or by quantizing the base."""


@dataclass
class LoRA:
    """Low-rank adapters beside frozen weights (Hu et al. 2021, arXiv 2106.09685), or another adapter of PEFT.

    Args:
        r: rank, >= 1.
        alpha: numerator of the scale ``alpha / r`` on the adapter's output, >= 1.
        dropout: share of the adapter's inputs dropped in training, in [0, 1).
        target_modules: linear layers that get an adapter: a list of names such as ``[q_proj, v_proj]``, a regular
            expression over full names, or ``all-linear`` for all but the output head.
        top_layers: share of the layers, counted from the output, that get an adapter, in (0, 1]. The backward pass
            stops below them: half the layers make a step about a third cheaper.
        peft: more settings by their names in ``peft.LoraConfig``, such as ``{use_dora: true}``. With ``peft_type``, as
            in ``{peft_type: IA3}``, all settings of that method; those above then stay at their defaults.
        adapter: folder of an adapter that is trained further, in place of a new one; its settings come from the folder,
            and those above stay at their defaults. The reference is the policy with this adapter as it was loaded.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    top_layers: float = 1.0
    peft: dict[str, PeftValue] | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        if self.r < 1 or self.alpha < 1:
            raise ValueError(f"LoRA r and alpha must be at least 1; got {self.r} and {self.alpha}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"LoRA dropout must lie in [0, 1); got {self.dropout}")
        if not 0.0 < self.top_layers <= 1.0:
            raise ValueError(f"LoRA top_layers is a share of the layers in (0, 1]; got {self.top_layers}")
        if not self.target_modules:
            raise ValueError(
                "LoRA target_modules is empty; name layers, e.g. ['q_proj', 'v_proj'], or say 'all-linear'"
            )
        complete = "peft.peft_type" if "peft_type" in (self.peft or {}) else "adapter"
        if complete == "peft.peft_type" or self.adapter is not None:
            alone = {"peft", complete}
            idle = [f.name for f in fields(self) if f.name not in alone and getattr(self, f.name) != f.default]
            if idle or (self.adapter is not None and self.peft is not None):
                named = (idle or ["peft"])[0]
                raise ValueError(
                    f"model.lora.{complete} brings all settings of the adapter, so that model.lora.{named} would have "
                    f"no effect; leave it out"
                )
        elif doubled := sorted(OWN_NAMES.keys() & (self.peft or {}).keys()):
            raise ValueError(f"write model.lora.peft.{doubled[0]} as model.lora.{OWN_NAMES[doubled[0]]}")

    @classmethod
    def of(cls, settings: AdapterSettings) -> LoRA:
        """The settings as `LoRA`, from a configuration object of PEFT or from `LoRA` itself.

        Raises:
            TypeError: if it is neither.
            ValueError: if the object holds anything but plain data.
        """
        if isinstance(settings, LoRA):
            return settings
        given: object = settings
        if not is_dataclass(given) or isinstance(given, type):
            raise TypeError(
                f"lora must be LoRA(r=16), or a configuration of PEFT such as LoraConfig(); got {settings!r:.80}"
            )
        kept: dict[str, PeftValue] = {}
        for entry in fields(settings):
            value = getattr(settings, entry.name)
            default = entry.default if entry.default_factory is MISSING else entry.default_factory()
            # PEFT makes sets of lists; those that it filled in itself stay out, such as peft_type
            if entry.name in _OF_FILES or not entry.init or value == default:
                continue
            kept[entry.name] = _plain(value, entry.name)
        kind = cast(str, _plain(settings.peft_type, "peft_type"))
        return cls(peft={**kept, "peft_type": kind})


if TYPE_CHECKING:
    AdapterSettings: TypeAlias = LoRA | PeftConfig
    """Settings of adapters in Python: ours, or a configuration object of PEFT."""
else:
    # the command line and config files have the settings of `LoRA`, which hold those of PEFT
    AdapterSettings = LoRA


def _plain(value: object, name: str) -> PeftValue:
    """A setting of PEFT as plain data."""
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, set):
        return sorted(value)
    if value is None or isinstance(value, bool | int | float | str | list | dict):
        return value
    raise ValueError(f"{name} of the PEFT configuration is a {type(value).__name__}, which is not supported here")


def lora_config(model: PreTrainedModel, lora: LoRA, name: str, task_type: str | None = None) -> PeftConfig:
    """Translate `LoRA` to the configuration of peft.

    Args:
        model: the model that gets adapters.
        lora: rank, scale, dropout and layers.
        name: name of the model in errors.
        task_type: task of the model for peft; None for a trunk without a head.

    Raises:
        ValueError: if the model lacks one of the named layers, PEFT has no such setting, or the method does not go with
            training here.
    """
    settings: dict[str, PeftValue] = {"task_type": task_type, **(lora.peft or {})}
    kind: type[PeftConfig] = LoraConfig
    if "peft_type" in settings:
        kind = _method(str(settings.pop("peft_type")))
        targets = settings.get("target_modules")
    else:
        targets = lora.target_modules
        settings |= {"r": lora.r, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
        settings["target_modules"] = targets if lora.top_layers == 1.0 else _upper_targets(model, lora)
    if isinstance(targets, str | list):
        _check_targets(model, cast("str | list[str]", targets), name)
    known = [entry.name for entry in fields(kind) if entry.init]
    for setting in settings:
        if setting not in known:
            near = difflib.get_close_matches(setting, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"model.lora.peft: {kind.__name__} of the installed peft has no {setting!r}{hint}")
    try:
        config = kind(**settings)  # type: ignore[arg-type]
    except (ImportError, TypeError, ValueError) as error:
        raise ValueError(f"model.lora.peft: {error}") from error
    check_method(config)
    return config


def check_method(config: PeftConfig) -> None:
    """Raise if an adapter needs more than layers of its own, so that it cannot be trained here."""
    remedy = "use LoRA (with DoRA, rsLoRA, PiSSA or OLoRA) or another adapter that leaves the sequence alone"
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ValueError(f"model.lora: {config.peft_type} puts virtual tokens before the prompt; {remedy}")
    if config.peft_type == PeftType.ADALORA:
        raise ValueError(f"model.lora: AdaLoRA has to be told of every step of a known number of them; {remedy}")
    if isinstance(config, LoraConfig):
        if config.init_lora_weights in _FROM_DATA:
            raise ValueError(
                f"model.lora.peft.init_lora_weights={config.init_lora_weights} is computed from data or changes what "
                f"the policy computes; use pissa, olora, gaussian or the default"
            )
        for setting in ("alora_invocation_tokens", "layer_replication"):
            if getattr(config, setting, None):
                raise ValueError(f"model.lora.peft.{setting} is not supported; {remedy}")


def changes_base(config: PeftConfig) -> bool:
    """Whether an adapter takes its start out of the base weights: W - s B A is frozen, and W is nowhere any more.

    PiSSA (Meng et al. 2024, arXiv 2404.02948) and OLoRA (Buyukakyuz 2024, arXiv 2406.01775).
    """
    start = config.init_lora_weights if isinstance(config, LoraConfig) else None
    return isinstance(start, str) and start.startswith(("pissa", "olora"))


def is_plain(config: PeftConfig) -> bool:
    """Whether an adapter computes W x + s B A x on layers, with B = 0 at the start, and trains nothing else."""
    if type(config) is not LoraConfig:
        return False
    default = LoraConfig()
    changed = {f.name for f in fields(config) if f.init and getattr(config, f.name) != getattr(default, f.name)}
    allowed = PLAIN_SETTINGS.union(OWN_NAMES, _OF_FILES, ["init_lora_weights"])
    return config.init_lora_weights in (True, "gaussian") and changed <= allowed


def _method(name: str) -> type[PeftConfig]:
    """Configuration class of a method of PEFT."""
    methods: Mapping[str, type[PeftConfig]] = {str(k.value): kind for k, kind in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if name not in methods:
        raise ValueError(f"model.lora.peft.peft_type must be one of {', '.join(sorted(methods))}; got {name!r}")
    return methods[name]


def _upper_targets(model: PreTrainedModel, lora: LoRA) -> list[str]:
    """Full names of the targets in the upper layers; peft cannot express a share of the layers."""
    num_layers = model.config.get_text_config().num_hidden_layers
    # first = L - ceil(share * L), so that a small share still gives one layer
    first = num_layers - math.ceil(lora.top_layers * num_layers)
    # 'all-linear' of peft leaves the output head out as well
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    linear = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
    targets = lora.target_modules
    if isinstance(targets, list):
        chosen = [name for name in linear if _is_named(name, targets)]
    else:
        chosen = [name for name in linear if targets == "all-linear" or re.fullmatch(targets, name)]
    # "model.layers.11.mlp.up_proj" lies in layer 11
    numbered = [(name, re.search(r"\.(\d+)\.", name)) for name in chosen]
    # linear layers outside of the numbered ones get no adapter
    return [name for name, number in numbered if number is not None and int(number[1]) >= first]


def _is_named(name: str, targets: list[str]) -> bool:
    """Whether the full name of a layer is one of the targets, or ends with one."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _check_targets(model: PreTrainedModel, targets: str | list[str], policy: str) -> None:
    """Raise if LoRA names layers that the model lacks; peft is silent when one of several is missing."""
    if targets == "all-linear":
        return
    names = [name for name, _ in model.named_modules() if name]
    missing: list[str] = []
    if isinstance(targets, str):
        if not any(re.fullmatch(targets, name) for name in names):
            missing = [targets]
    else:
        for target in targets:
            if not any(_is_named(name, [target]) for name in names):
                missing.append(target)
    if missing:
        linear = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ValueError(
            f"LoRA target_modules {missing} match no layer of {policy!r}; its linear layers are {linear}, "
            f"and 'all-linear' takes all but the output head"
        )
