"""Policies to folders that transformers and peft open."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Embedding, Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


_MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.py", "README.md")
_MODEL_FOLDERS = ("adapter", "adapters", "backbone", "members")


def merged_state_dict(
    model: PreTrainedModel | PeftModel, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Compute the weights of base plus adapter under the base model's names, and leave the model as it is.

    The product is added in float32 and rounded once to the type of the base weight.

    Args:
        model: a LoRA policy, or a model that has LoRA layers inside.
        state_dict: full tensors under the names of ``model.state_dict()``, which is taken when not given; for sharded
            models, whose tensors must be gathered first.

    Raises:
        ValueError: if an adapter is anything but plain LoRA on linear and embedding layers.
    """
    if isinstance(model, PeftModel):
        refuse_tied_targets(model)
    state = model.state_dict() if state_dict is None else state_dict
    merged = base_state_dict(state)
    with torch.no_grad():
        for prefix, layer in model.named_modules():
            if not isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper):
                continue
            if not isinstance(layer, Linear | Embedding) or layer.lora_variant or any(layer.lora_bias.values()):
                raise ValueError(
                    f"{prefix} is a {type(layer).__name__} that cannot be merged here; only plain LoRA on linear and "
                    f"embedding layers can: save with merge=False"
                )
            if layer.merged:
                raise ValueError(f"the adapter of {prefix} is merged already; call unmerge_adapter() first")
            key = prefix.removeprefix("base_model.model.") + ".weight"
            weight = merged[key].float()
            for adapter in layer.active_adapters:
                if isinstance(layer, Embedding):
                    a, b = (state[f"{prefix}.lora_embedding_{side}.{adapter}"].float() for side in "AB")
                else:
                    a, b = (state[f"{prefix}.lora_{side}.{adapter}.weight"].float() for side in "AB")
                transposed = isinstance(layer, Embedding) or layer.fan_in_fan_out
                weight = weight + layer.scaling[adapter] * ((b @ a).T if transposed else b @ a)
            merged[key] = weight.to(merged[key].dtype)
    return merged


def base_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Choose the weights under the adapters, detached, and give them the base model's names."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor.detach()
        for name, tensor in state_dict.items()
        if ".lora_" not in name
    }


def save_policy(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path | str,
    *,
    merge: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a policy as a folder that ``AutoModelForCausalLM.from_pretrained`` opens; the model stays as it is.

    A LoRA policy is written merged, with the adapter in ``adapter/``, which ``PeftModel.from_pretrained`` opens over
    the base. The folder appears complete or not at all; a model folder of that name is replaced. Call it on one rank.

    Args:
        model: the policy.
        tokenizer: its tokenizer, saved with its chat template.
        folder: where to write.
        merge: False writes the adapter of a LoRA policy alone, into ``folder`` itself.
        state_dict: full tensors under the names of ``model.state_dict()``; for sharded models.

    Raises:
        FileExistsError: if ``folder`` holds anything but a model, which would be lost.
    """
    with whole_folder(folder) as scratch:
        if isinstance(model, PeftModel):
            # "auto" would ask the Hub for the size of the base's vocabulary
            adapter = scratch / "adapter" if merge else scratch
            model.save_pretrained(str(adapter), save_embedding_layers=False, state_dict=state_dict)
        if merge or not isinstance(model, PeftModel):
            weights = merged_state_dict(model, state_dict) if isinstance(model, PeftModel) else state_dict
            base = model.get_base_model() if isinstance(model, PeftModel) else model
            cast(PreTrainedModel, base).save_pretrained(scratch, state_dict=None if weights is None else dict(weights))
        tokenizer.save_pretrained(scratch)
    return Path(folder)


@contextmanager
def whole_folder(folder: Path | str) -> Iterator[Path]:
    """Give an empty folder to fill, which takes the place of ``folder`` at the end, or leaves no trace on an error.

    Raises:
        FileExistsError: if ``folder`` holds anything but a model, which would be lost.
    """
    folder = Path(folder)
    ours = (*_MODEL_FILES, *_MODEL_FOLDERS)
    foreign = [p.name for p in folder.iterdir() if not any(map(p.match, ours))] if folder.exists() else []
    if foreign:
        raise FileExistsError(
            f"{folder} holds other things than a model, e.g. {foreign[0]!r}; name a folder of its own"
        )
    scratch = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.tmp"
    scratch.mkdir(parents=True)
    try:
        yield scratch
        old = scratch.with_suffix(".old")
        if folder.exists():
            folder.rename(old)
        scratch.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def refuse_tied_targets(model: PeftModel) -> None:
    """Raise if an adapter sits on one of two tied embeddings; merging would untie them."""
    base: Any = model.get_base_model()
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    tied = getattr(base.config.get_text_config(), "tie_word_embeddings", False)
    if tied and any(isinstance(end, BaseTunerLayer) for end in ends):
        raise ValueError(
            "LoRA targets an embedding that the model shares with its output head; adapting one of the two would untie "
            "them on merging: remove the embedding and the head from target_modules"
        )
