"""`precision: auto`: what is chosen on which device, and why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.precision import MixedPrecision, Precision

from lightning_rlhf.commands.fit import RLHFTrainer
from lightning_rlhf.runtime import precision as module
from lightning_rlhf.runtime.precision import (
    bf16_instructions,
    choose_precision,
    cpu_capabilities,
    device_type_of,
)


@pytest.mark.parametrize(
    ("device", "instructions", "precision", "reason"),
    [
        ("cpu", None, "32-true", "this CPU has no bf16 instructions"),
        ("cpu", "amx_bf16", "bf16-mixed", "this CPU multiplies bfloat16 fast (amx_bf16)"),
        ("cuda", None, "32-true", "this GPU has no bf16 instructions"),
        ("cuda", "H200", "bf16-mixed", "this GPU multiplies bfloat16 fast (H200)"),
        ("mps", None, "32-true", "bfloat16 is not known to be fast on MPS"),
    ],
)
def test_bfloat16_is_chosen_where_there_are_instructions_for_it(
    device: str, instructions: str | None, precision: str, reason: str
) -> None:
    assert choose_precision(device, instructions) == (precision, reason)


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16\n", {"fpu", "avx2", "avx512f", "avx512_bf16"}),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\nCPU part\t: 0xd4f\n", {"fp", "asimd", "bf16"}),
        ("vendor_id : IBM/S390\n", set()),
    ],
    ids=["x86", "arm", "other"],
)
def test_flags_are_read_from_linux_where_torch_does_not_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpuinfo: str, expected: set[str]
) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert cpu_capabilities(tmp_path / "cpuinfo") == expected
    assert cpu_capabilities(tmp_path / "missing") == set()


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="compares with what Linux says")
@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="compares with what torch says")
def test_torch_and_linux_agree_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    by_torch = bf16_instructions("cpu")
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert bf16_instructions("cpu") == by_torch


def test_device_types_follow_lightning() -> None:
    assert device_type_of("cpu") == device_type_of(CPUAccelerator()) == "cpu"
    assert device_type_of("cuda") == "cuda"
    resolved = RLHFTrainer(accelerator="auto", logger=False, barebones=True)
    assert device_type_of("auto") == resolved.strategy.root_device.type


@pytest.mark.parametrize(("capabilities", "plugin"), [(set(), Precision), ({"avx512_bf16"}, MixedPrecision)])
def test_the_trainer_resolves_auto(
    monkeypatch: pytest.MonkeyPatch, capabilities: set[str], plugin: type[Precision]
) -> None:
    monkeypatch.setattr(module, "cpu_capabilities", lambda: capabilities)
    trainer = RLHFTrainer(accelerator="cpu", precision="auto", logger=False, barebones=True)
    assert type(trainer.precision_plugin) is plugin
    assert trainer.precision == choose_precision("cpu", bf16_instructions("cpu"))[0]
    # what is asked for by name is left alone
    assert RLHFTrainer(accelerator="cpu", precision="32-true", logger=False, barebones=True).precision == "32-true"


@pytest.mark.gpu
def test_the_gpu_is_asked() -> None:
    fast = torch.cuda.get_device_capability()[0] >= 8 or torch.version.hip is not None
    assert RLHFTrainer(accelerator="gpu", devices=1, precision="auto", logger=False).precision == (
        "bf16-mixed" if fast else "32-true"
    )
