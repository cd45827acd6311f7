"""LoRA: the layers of a model that get low-rank adapters."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


@dataclass
class LoRA:
    """Low-rank adapters beside frozen weights (Hu et al. 2021, arXiv 2106.09685).

    Args:
        r: rank, >= 1.
        alpha: numerator of the scale ``alpha / r`` on the adapter's output, >= 1.
        dropout: share of the adapter's inputs dropped in training, in [0, 1).
        target_modules: linear layers that get an adapter: a list of names such as ``[q_proj, v_proj]``, a regular
            expression over full names, or ``all-linear`` for all but the output head.
        top_layers: share of the layers, counted from the output, that get an adapter, in (0, 1]. The backward pass
            stops below them: half the layers make a step about a third cheaper.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    top_layers: float = 1.0

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


def lora_config(model: PreTrainedModel, lora: LoRA, name: str, task_type: str | None = None) -> LoraConfig:
    """Translate `LoRA` to the configuration of peft.

    Args:
        model: the model that gets adapters.
        lora: rank, scale, dropout and layers.
        name: name of the model in errors.
        task_type: task of the model for peft; None for a trunk without a head.

    Raises:
        ValueError: if the model lacks one of the named layers.
    """
    _check_targets(model, lora.target_modules, name)
    return LoraConfig(
        task_type=task_type,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules if lora.top_layers == 1.0 else _upper_targets(model, lora),
    )


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
