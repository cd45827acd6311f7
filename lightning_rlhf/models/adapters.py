"""Adapters of peft over their base: a causal LM, or a reward model whose head lies in the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedConfig

from lightning_rlhf.models.cache import cached, file_digest
from lightning_rlhf.models.checks import read_json
from lightning_rlhf.models.load import (
    EMBEDDINGS,
    SCORE_HEADS,
    base_name,
    digest_of,
    embedding_rows,
    nearly_equal,
    open_model,
    open_tokenizer,
    probe_rows,
    resolve_checkpoint,
)
from lightning_rlhf.models.modes import evaluating


ADAPTER_CONVERTER = 2
"""Version of what `merged_adapter` writes to the cache; raise it when merging changes."""


def merged_adapter(folder: Path, trust_remote_code: bool) -> Path:
    """The safetensors folder made from a peft adapter and its base: a causal LM, or a reward model with its head."""
    base = base_name(folder / "adapter_config.json")
    try:
        source = resolve_checkpoint(base, trust_remote_code=trust_remote_code)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the base model of the adapter in {str(folder)!r} cannot be found; "
            f"correct base_model_name_or_path in its adapter_config.json: {error}"
        ) from error
    # the base counts as well: by content if it is a folder, by name if it is on the Hub
    parts = [
        *sorted(folder.glob("adapter_*")),
        *(sorted(source.glob("*.safetensors")) if isinstance(source, Path) else []),
    ]
    key = digest_of(f"adapter {ADAPTER_CONVERTER}", str(source), *map(file_digest, parts))

    def merge(target: Path) -> None:
        # what peft draws before it loads must not change what a run draws later
        with torch.random.fork_rng(devices=[]):
            model = open_adapter(folder, trust_remote_code)
            rows = [torch.tensor([row]) for row in probe_rows(cast(PreTrainedConfig, model.config))]
            with evaluating(model.modules()):
                expected = [model(input_ids=row).logits for row in rows]
            try:
                merged = cast(Any, model).merge_and_unload(safe_merge=True)
            except (AttributeError, ValueError) as error:
                raise ValueError(
                    f"the adapter in {str(folder)!r} cannot be merged into its base ({error}); merge it where it was "
                    f"trained, and name the folder of the whole model"
                ) from error
            merged.save_pretrained(target)
            again = type(merged).from_pretrained(target)
            with evaluating(again.modules()):
                same = all(
                    nearly_equal(again(input_ids=row).logits, logits)
                    for row, logits in zip(rows, expected, strict=True)
                )
        if not same:
            raise ValueError(
                f"the adapter in {str(folder)!r} computes other numbers once it is merged into {base!r} (perhaps it "
                f"changes an embedding that the base shares with its output head); merge it where it was trained, and "
                f"name the folder of the whole model"
            )
        open_tokenizer(str(folder), trust_remote_code).save_pretrained(target)

    return cached(folder.resolve().name, key, merge)


def open_adapter(folder: Path, trust_remote_code: bool = False) -> PeftModel:
    """Open a peft adapter over its base as peft does, with its own head and embeddings, on the CPU in float32.

    Args:
        folder: what ``PeftModel.save_pretrained`` wrote.
        trust_remote_code: run code that comes with the base.

    Raises:
        ValueError: if weights are left over or missing, in the adapter or in its base.
    """
    settings = read_json(folder / "adapter_config.json")
    base = base_name(folder / "adapter_config.json")
    own = _adapter_weights(folder)
    heads = {key: tensor for key, tensor in own.items() if key.partition(".")[0] in SCORE_HEADS}
    mapped = (settings.get("auto_mapping") or {}).get("base_model_class") or ""
    if heads or settings.get("task_type") == "SEQ_CLS" or "SequenceClassification" in mapped:
        # of a head of several layers the last is the smallest
        labels = min((len(tensor) for tensor in heads.values()), default=1)
        model = open_model(base, "float32", None, trust_remote_code, num_scores=labels, replaced=own)
    else:
        model = open_model(base, "float32", None, trust_remote_code, replaced=own)
    embedding = saved_embedding(own)
    if embedding is not None and len(embedding) != embedding_rows(model):
        # all rows are in the adapter
        model.resize_token_embeddings(len(embedding), mean_resizing=False)
    return fit_adapters(model, {"default": folder}, base)


def fit_adapters(model: nn.Module, folders: Mapping[str, Path], base: str, *, trained: bool = False) -> PeftModel:
    """Put saved adapters on a model, all their weights.

    Args:
        model: what they were trained on, or its trunk.
        folders: where each adapter lies, by the name it gets.
        base: what to call the model in errors.
        trained: whether they are trained further.

    Raises:
        ValueError: if an adapter lacks weights, or has some that the model has no place for.
    """
    adapted: Any = None
    for name, folder in folders.items():
        try:
            if adapted is None:
                adapted = PeftModel.from_pretrained(
                    cast(Any, model), str(folder), name, is_trainable=trained, torch_device="cpu"
                )
            else:
                adapted.load_adapter(str(folder), name, is_trainable=trained, torch_device="cpu")
            state = load_peft_weights(str(folder), device="cpu")
            loaded: Any = set_peft_model_state_dict(adapted, state, adapter_name=name)
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise ValueError(
                f"peft cannot open the adapter in {str(folder)!r} over {base!r}: {error}; correct its "
                f"adapter_config.json (base_model_name_or_path, modules_to_save), or save it again with save_pretrained"
            ) from error
        missing = [key for key in loaded.missing_keys if f".{name}." in f"{key}."]
        # peft writes trained embeddings a second time where the vocabulary has grown
        copies = (".modules_to_save.", ".original_module.")
        twice = {key for key in state for part in copies if part in key and key.replace(part, ".") in state}
        unexpected = [key for key in loaded.unexpected_keys if key not in twice]
        if missing or unexpected:
            wrong, what = (missing, "lacks") if missing else (unexpected, "has no place in the base for")
            raise ValueError(
                f"the adapter in {str(folder)!r} {what} {len(wrong)} weights, e.g. {wrong[0]!r}, with the base "
                f"{base!r}; correct base_model_name_or_path in its adapter_config.json, or save it again with "
                f"save_pretrained"
            )
    return cast(PeftModel, adapted)


def saved_embedding(own: dict[str, Tensor]) -> Tensor | None:
    """The embedding that an adapter was saved with; None if it uses the base's."""
    found = [tensor for key, tensor in own.items() if key.endswith(EMBEDDINGS)]
    return found[0] if found else None


def _adapter_weights(folder: Path) -> dict[str, Tensor]:
    """Weights in an adapter's file that replace those of the base, by the base's names."""
    try:
        state: dict[str, Tensor] = load_peft_weights(str(folder), device="cpu")
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"the adapter folder {str(folder)!r} is incomplete: {error}; it needs adapter_model.safetensors"
        ) from error
    names = {key.removeprefix("base_model.model.").replace(".base_layer.", "."): t for key, t in state.items()}
    return {key: tensor for key, tensor in names.items() if ".lora_" not in key}
