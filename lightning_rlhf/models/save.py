"""Policies to folders that transformers and peft open."""

from __future__ import annotations

import copy
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.tuners.lora.layer import Embedding, Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.models.checks import PeftLoadResult
from lightning_rlhf.models.dropout import saved_dropout
from lightning_rlhf.models.lora import is_plain
from lightning_rlhf.models.quantization import dequantized, is_quantized


_MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.py", "README.md")
_MODEL_FOLDERS = ("adapter", "adapters", "backbone", "members")


def merged_state_dict(
    model: PreTrainedModel | PeftModel, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Compute the weights of base plus adapter under the base model's names, and leave the model as it is.

    The product of plain LoRA is added in float32 and rounded once to the type of the base weight. Other adapters are
    merged by PEFT, layer by layer in a copy of the layer.

    Args:
        model: a policy with adapters, or a model that has LoRA layers inside.
        state_dict: full tensors under the names of ``model.state_dict()``; for sharded models, whose tensors must be
            gathered first. Default: ``model.state_dict()``.

    Raises:
        ValueError: if an adapter cannot be merged; of sharded models and of those that are no ``PeftModel``, anything
            but plain LoRA on linear and embedding layers.
    """
    if isinstance(model, PeftModel):
        refuse_tied_targets(model)
        if state_dict is None and not all(map(is_plain, model.peft_config.values())):
            return _merged_by_peft(model)
    state = model.state_dict() if state_dict is None else state_dict
    merged = _dequantized(model, base_state_dict(state))
    with torch.no_grad():
        for prefix, layer in model.named_modules():
            if not isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper):
                continue
            if (
                not isinstance(layer, LoraLayer)
                # layers of bitsandbytes have LoRA classes of their own
                or not (isinstance(layer, Linear | Embedding) or is_quantized(layer.get_base_layer()))
                or layer.lora_variant
                or any(layer.lora_bias.values())
            ):
                raise ValueError(
                    f"{prefix} is a {type(layer).__name__} that cannot be merged here; only plain LoRA on linear and "
                    f"embedding layers can: save with merge=False"
                )
            if layer.merged:
                raise ValueError(f"the adapter of {prefix} is merged already; call unmerge_adapter() first")
            key = prefix.removeprefix("base_model.model.") + ".weight"
            weight = merged[key].float()
            for adapter in layer.active_adapters:
                # A: [r, inputs] and B: [outputs, r]; of an embedding A: [r, tokens] and B: [width, r]
                if isinstance(layer, Embedding):
                    a, b = (state[f"{prefix}.lora_embedding_{side}.{adapter}"].float() for side in "AB")
                else:
                    a, b = (state[f"{prefix}.lora_{side}.{adapter}.weight"].float() for side in "AB")
                # W + (alpha / r) B A
                # embeddings and Conv1D keep W as [inputs, outputs], and B A is [outputs, inputs]
                transposed = isinstance(layer, Embedding) or getattr(layer, "fan_in_fan_out", False)
                weight = weight + layer.scaling[adapter] * ((b @ a).T if transposed else b @ a)
            merged[key] = weight.to(merged[key].dtype)
    return merged


def _merged_by_peft(model: PeftModel) -> dict[str, Tensor]:
    """Weights of a policy with any adapters merged."""
    kinds = BaseTunerLayer | AuxiliaryTrainingWrapper
    layers = {prefix: layer for prefix, layer in model.named_modules() if isinstance(layer, kinds)}
    # a wrapper may hold a layer with an adapter, and merges it
    outer = {p: layer for p, layer in layers.items() if not any(p.startswith(f"{other}.") for other in layers)}
    inside = tuple(f"{prefix}." for prefix in outer)
    # weights that an adapter shares between layers have no such prefix
    prefix = "base_model.model."
    merged = {
        name.removeprefix(prefix): tensor.detach()
        for name, tensor in model.state_dict().items()
        if name.startswith(prefix) and not name.startswith(inside)
    }
    with torch.no_grad():
        for name, layer in outer.items():
            if layer.merged_adapters:
                raise ValueError(f"the adapter of {name} is merged already; call unmerge_adapter() first")
            # merging changes the layer in place
            twin = copy.deepcopy(layer)
            try:
                if isinstance(twin, BaseTunerLayer):
                    twin.merge(safe_merge=True)
                    plain = twin.get_base_layer()
                else:
                    plain = twin.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
            except (AttributeError, NotImplementedError, ValueError) as error:
                raise ValueError(
                    f"peft cannot merge {name}, a {type(layer).__name__} ({error}); save with merge=False"
                ) from error
            for leaf, tensor in plain.state_dict().items():
                merged[f"{name.removeprefix(prefix)}.{leaf}"] = tensor.detach()
    return merged


def _dequantized(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in which those that bitsandbytes stores in 4 bits are floating-point numbers."""
    dtype = next((tensor.dtype for tensor in weights.values() if tensor.is_floating_point()), torch.float32)
    for path, layer in model.named_modules():
        if is_quantized(layer):
            name = path.removeprefix("base_model.model.").removesuffix(".base_layer")
            # beside the weight there are scales, such as "weight.absmax"
            for key in [key for key in weights if key.startswith(f"{name}.weight")]:
                del weights[key]
            weights[f"{name}.weight"] = dequantized(layer).to(dtype)
    return weights


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
            with saved_dropout(base):
                whole = cast(PreTrainedModel, base)
                if any(map(is_quantized, whole.modules())):
                    whole = _unquantized(whole, weights or {})
                whole.save_pretrained(scratch, state_dict=None if weights is None else dict(weights))
        tokenizer.save_pretrained(scratch)
    return Path(folder)


def save_base(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path | str) -> Path:
    """Write the model under the adapters as a folder of its own, as `save_policy` does.

    Args:
        model: the policy; the weights under its adapters are written without them.
        tokenizer: its tokenizer.
        folder: where to write.

    Raises:
        FileExistsError: if ``folder`` holds anything but a model, which would be lost.
    """
    base = model.get_base_model()
    weights = _dequantized(model, base_state_dict(model.state_dict()))
    with whole_folder(folder) as scratch:
        with saved_dropout(base):
            whole = cast(PreTrainedModel, base)
            if any(map(is_quantized, whole.modules())):
                whole = _unquantized(whole, weights)
            whole.save_pretrained(scratch, state_dict=weights)
        tokenizer.save_pretrained(scratch)
    return Path(folder)


def _unquantized(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """The model of transformers with other weights and without the quantization in its config."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        plain = cast(Callable[[PreTrainedConfig], PreTrainedModel], type(model))(config)
    plain.load_state_dict(weights, strict=False, assign=True)
    plain.generation_config = model.generation_config
    return plain


@contextmanager
def whole_folder(folder: Path | str) -> Iterator[Path]:
    """Yield an empty folder, which replaces ``folder`` at the end, or is removed after an error.

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
    # beside the target, since rename works within one file system only
    scratch = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.tmp"
    scratch.mkdir(parents=True)
    try:
        yield scratch
        # rename cannot replace a folder that holds files; the old model stays whole until the new one is
        old = scratch.with_suffix(".old")
        if folder.exists():
            folder.rename(old)
        scratch.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def refuse_tied_targets(model: PeftModel) -> None:
    """Raise if an adapter sits on one of two tied embeddings; merging would untie them."""
    base = cast(PreTrainedModel, model.get_base_model())
    ends = (base.get_input_embeddings(), base.get_output_embeddings())  # type: ignore[no-untyped-call]
    tied = getattr(base.config.get_text_config(), "tie_word_embeddings", False)
    if tied and any(isinstance(end, BaseTunerLayer | AuxiliaryTrainingWrapper) for end in ends):
        raise ValueError(
            "LoRA targets an embedding that the model shares with its output head; adapting one of the two would untie "
            "them on merging: remove the embedding and the head from target_modules and modules_to_save"
        )


def load_weights(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Load a folder written by `save_policy` into an existing model: all weights, or those of its adapter.

    Args:
        model: a model of the same shape; keeps its device and types.
        folder: folder written by `save_policy`; for a PeftModel the adapter in it, or an adapter's own folder.

    Raises:
        FileNotFoundError: if the folder holds no such file.
        ValueError: if names or shapes differ.
    """
    peft = isinstance(model, PeftModel)
    if peft and (folder / "adapter").is_dir():
        folder = folder / "adapter"
    files = sorted(folder.glob("adapter_model.safetensors" if peft else "*.safetensors"))
    # a folder with an adapter alone holds safetensors as well, but no whole model
    if not files or (not peft and any(file.name == "adapter_model.safetensors" for file in files)):
        kind = "an adapter (adapter_model.safetensors)" if peft else "a whole model (model.safetensors)"
        raise FileNotFoundError(f"{str(folder)!r} holds no {kind}; name the model folder of a run with the same lora")
    state: dict[str, Tensor] = {}
    for file in files:
        state.update(load_file(file))
    if isinstance(model, PeftModel):
        loaded = cast(PeftLoadResult, set_peft_model_state_dict(model, state))
        # missing_keys also lists all weights of the base
        missing = [key for key in loaded.missing_keys if f".{model.active_adapter}." in f"{key}."]
        unexpected = list(loaded.unexpected_keys)
    else:
        own = dict(model.state_dict())
        # strict=False does not forgive another shape: torch would raise a RuntimeError
        wrong = [name for name, tensor in state.items() if name in own and own[name].shape != tensor.shape]
        if wrong:
            raise ValueError(f"{str(folder)!r} is a model of another shape, e.g. in {wrong[0]!r}")
        report = model.load_state_dict(state, strict=False)
        # a tied head is saved once
        shared = {own[name].data_ptr() for name in own if name in state}
        missing = [name for name in report.missing_keys if own[name].data_ptr() not in shared]
        unexpected = list(report.unexpected_keys)
    if missing or unexpected:
        raise ValueError(f"{str(folder)!r} is another model: {(missing + unexpected)[0]!r} is in one of them only")
