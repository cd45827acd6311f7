"""Precision of a run: ``auto``, which is resolved when the Trainer is built, and checks of unusable combinations.

``auto`` is bfloat16 where the device multiplies it fast, float32 elsewhere. Weights have the type
``model.options.dtype``, and the log-softmax is computed in float32 in either case.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch.accelerators import (
    Accelerator,
    CPUAccelerator,
    CUDAAccelerator,
    MPSAccelerator,
    XLAAccelerator,
)


AutoPrecision = Literal["bf16-mixed", "32-true"]

CPU_BF16 = ("amx_bf16", "avx512_bf16", "bf16")
"""Names of instructions that multiply bfloat16, as torch and Linux spell them: x86 tiles, x86 vectors, ARM."""


def choose_precision(device_type: str, instructions: str | None) -> tuple[AutoPrecision, str]:
    """Choose the precision of a Trainer, with the reason.

    Args:
        device_type: ``cpu``, ``cuda``, ``mps`` or ``tpu``.
        instructions: result of `bf16_instructions`; None if there are none.
    """
    device = {"cpu": "CPU", "cuda": "GPU"}.get(device_type, device_type.upper())
    if instructions is not None:
        return "bf16-mixed", f"this {device} multiplies bfloat16 fast ({instructions})"
    if device_type in ("cpu", "cuda"):
        return "32-true", f"this {device} has no bf16 instructions"
    return "32-true", f"bfloat16 is not known to be fast on {device}"


def check_precision(precision: str, plugin: str = "") -> None:
    """Refuse a precision of Lightning that casts or exchanges the layers of the model.

    Lightning would cast the policy but not its reference, and LoRA adapters and optimizer states with it.

    Args:
        precision: ``trainer.precision``.
        plugin: class of the Trainer's precision plugin.

    Raises:
        ValueError: naming the remedy.
    """
    remedies = {
        "bf16-true": "for weights in bfloat16 set model.options.dtype=bfloat16 with trainer.precision=32-true or "
        "bf16-mixed",
        "16-true": "for weights in half precision set model.options.dtype=bfloat16 with trainer.precision=32-true or "
        "bf16-mixed; for float16 on a GPU, model.options.dtype=float32 with trainer.precision=16-mixed",
        "64-true": "weights are float32 at most; set trainer.precision=32-true",
    }
    if precision.startswith("transformer-engine"):
        remedy: str | None = "set trainer.precision=bf16-mixed"
    elif plugin == "BitsandbytesPrecision":
        remedy, precision = "set trainer.precision=bf16-mixed and leave the plugin out", plugin
    else:
        # Lightning takes "64" for "64-true"
        remedy = remedies.get({"64": "64-true"}.get(precision, precision))
    if remedy is not None:
        raise ValueError(f"trainer.precision={precision} is not supported: {remedy}")


def check_dtype(dtype: str, precision: str, trained_whole: bool) -> None:
    """Refuse to train in float16 where small gradients would be 0.

    Args:
        dtype: ``model.options.dtype``.
        precision: ``trainer.precision``.
        trained_whole: whether weights of that type are trained, not adapters alone, which are float32.

    Raises:
        ValueError: naming the remedy.
    """
    if dtype != "float16" or (precision == "16-mixed" and not trained_whole):
        return
    # smallest positive number of float16: 2^-24 = 6e-8
    refused = "as a whole" if trained_whole else f"with precision {precision}"
    raise ValueError(
        f"model.options.dtype=float16 cannot be trained {refused}: gradients below 6e-8 would be 0. Set "
        f"model.options.dtype=bfloat16; or model.options.dtype=float32 with trainer.precision=16-mixed on a GPU, which "
        f"scales the loss"
    )


def bf16_instructions(device_type: str) -> str | None:
    """Instructions, or the GPU, that multiply bfloat16 fast on this machine; None if unknown or absent."""
    if device_type == "cuda":
        # without emulation: older GPUs compute it, but slowly
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.cuda.get_device_name() if supported else None
    if device_type == "cpu":
        capabilities = cpu_capabilities()
        return next((name for name in CPU_BF16 if name in capabilities), None)
    return None


def cpu_capabilities(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Names of the instruction sets of this CPU.

    Args:
        cpuinfo: list of Linux, for torch versions without one.
    """
    ask = getattr(torch.cpu, "get_capabilities", None)  # torch 2.6, the oldest that we run on, lacks it
    if ask is not None:
        return {name for name, value in ask().items() if value is True}
    if not cpuinfo.exists():
        return set()
    found: set[str] = set()
    for line in cpuinfo.read_text().splitlines():
        name, _, flags = line.partition(":")
        # "flags" on x86, "Features" on ARM
        if name.strip() in ("flags", "Features"):
            found.update(flags.split())
    return found


def device_type_of(accelerator: str | Accelerator) -> str:
    """Device type that a Trainer will use, by the rules of Lightning: XLA first, then MPS, CUDA, CPU."""
    if isinstance(accelerator, Accelerator):
        kinds = {CPUAccelerator: "cpu", CUDAAccelerator: "cuda", MPSAccelerator: "mps", XLAAccelerator: "tpu"}
        return next((name for kind, name in kinds.items() if isinstance(accelerator, kind)), type(accelerator).__name__)
    if accelerator == "auto" and XLAAccelerator.is_available():
        return "tpu"
    if accelerator in ("auto", "gpu"):
        if MPSAccelerator.is_available():
            return "mps"
        # without a GPU, "gpu" is an error of the Trainer
        return "cuda" if accelerator == "gpu" or CUDAAccelerator.is_available() else "cpu"
    return accelerator
