"""A policy that starts from an earlier run's model: weights move in, and the reference stays."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_rlhf.models.load import LoRA, load_policy, load_tokenizer, save_policy
from lightning_rlhf.models.reference import build_reference
from lightning_rlhf.models.save import load_weights


def changed(policy: Path, lora: LoRA | None) -> torch.nn.Module:
    """A policy whose trained weights have moved."""
    torch.manual_seed(1)
    model = load_policy(str(policy), lora=lora)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.tensor([[5, 6, 7]])).logits
    return found


@pytest.mark.parametrize("lora", [None, LoRA(r=2, alpha=4)], ids=["whole", "lora"])
def test_policy_starts_where_the_run_ended_and_the_reference_does_not(
    tiny_policy: Path, tmp_path: Path, lora: LoRA | None
) -> None:
    earlier = changed(tiny_policy, lora)
    save_policy(earlier, load_tokenizer(str(tiny_policy)), tmp_path / "model")  # type: ignore[arg-type]
    policy = load_policy(str(tiny_policy), lora=lora)
    before = logits(policy)
    reference = build_reference(policy, "fixed")
    load_weights(policy, tmp_path / "model")
    torch.testing.assert_close(logits(policy), logits(earlier))
    assert not torch.allclose(logits(policy), before, atol=1e-3)
    with reference.active() as model:
        torch.testing.assert_close(logits(model), before)


def test_other_models_are_refused(tiny_policy: Path, tmp_path: Path) -> None:
    policy = load_policy(str(tiny_policy))
    with pytest.raises(FileNotFoundError, match="a whole model"):
        load_weights(policy, tmp_path)
    save_policy(changed(tiny_policy, LoRA(r=2)), load_tokenizer(str(tiny_policy)), tmp_path / "model")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="a whole model"):
        load_weights(policy, tmp_path / "model" / "adapter")
    with pytest.raises(FileNotFoundError, match="an adapter"):
        load_weights(load_policy(str(tiny_policy), lora=LoRA(r=2)), tiny_policy)
    other = tmp_path / "other"
    shutil.copytree(tiny_policy, other)
    state = load_file(other / "model.safetensors")
    name = next(iter(state))
    save_file({**state, name: torch.zeros(3, 3)}, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="another shape"):
        load_weights(policy, other)
    save_file({"unknown": torch.zeros(3)}, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="another model"):
        load_weights(policy, other)
