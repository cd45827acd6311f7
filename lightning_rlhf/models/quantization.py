"""Frozen weights in 4 bits under trained adapters, by bitsandbytes (QLoRA)."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from typing import TypeAlias, cast

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import BitsAndBytesConfig


QuantizationValue: TypeAlias = bool | float | str | list[str]
"""A setting of transformers' ``BitsAndBytesConfig`` as a config file has it."""


def quantization_config(settings: Mapping[str, QuantizationValue]) -> BitsAndBytesConfig:
    """Build the configuration that ``from_pretrained`` quantizes by.

    Args:
        settings: arguments of ``BitsAndBytesConfig``, among them ``load_in_4bit``.

    Raises:
        ValueError: if bitsandbytes is not installed, or there is no such setting.
    """
    known = [name for name in inspect.signature(BitsAndBytesConfig).parameters if name != "kwargs"]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"model.options.quantization: BitsAndBytesConfig has no {name!r}{hint}")
    if settings.get("load_in_8bit") or not settings.get("load_in_4bit"):
        raise ValueError(
            "model.options.quantization needs load_in_4bit: true; in 8 bits bitsandbytes rounds the activations as "
            "well, otherwise in training than in decoding"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "model.options.quantization needs bitsandbytes, which is not installed: pip install bitsandbytes, or leave "
            "the setting out"
        )
    try:
        return cast(Callable[..., BitsAndBytesConfig], BitsAndBytesConfig)(**settings)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"model.options.quantization: {error}") from error


def compute_alike(model: nn.Module) -> None:
    """Let quantized layers compute the same in training and in decoding, in place.

    On CPUs with AVX512 bitsandbytes repacks 4-bit weights for inference with scales in bfloat16, which changes
    log-probabilities by hundredths of a nat.
    """
    for module in model.modules():
        if is_quantized(module) and hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False


def is_quantized(module: nn.Module) -> bool:
    """Whether the weight of a layer is one of bitsandbytes."""
    # its own weight: the layers of PEFT hand out that of the layer inside
    return type(module._parameters.get("weight")).__name__ in ("Params4bit", "Int8Params")


def dequantized(layer: nn.Module) -> Tensor:
    """The weight that a layer of bitsandbytes computes with, float32."""
    with torch.no_grad():
        return cast(Callable[[nn.Module], Tensor], dequantize_module_weight)(layer).detach().float()
