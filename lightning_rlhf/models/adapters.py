"""Adapters of peft over their base: a causal LM, or a reward model whose head lies in the adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, cast

import torch
from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from lightning_rlhf.logprobs.eval_mode import evaluating
from lightning_rlhf.logprobs.exactness import nearly_equal
from lightning_rlhf.models.cache import cached, digest_of, file_digest
from lightning_rlhf.models.checks import PeftLoadResult, check_files, read_json
from lightning_rlhf.models.heads import SCORE_HEADS, probe_rows
from lightning_rlhf.models.lora import changes_base, check_method
from lightning_rlhf.models.pretrained import EMBEDDINGS, embedding_rows, open_pretrained, open_tokenizer


ADAPTER_CONVERTER = 2
"""Version of the merging in `merged_adapter`; raise it when the merged weights change."""


class Resolve(Protocol):
    """Finds the folder or Hub id of a model by its name; see `lightning_rlhf.models.resolve.resolve_checkpoint`."""

    def __call__(self, policy: str, *, trust_remote_code: bool = False) -> Path | str: ...


def base_name(adapter_config: Path) -> str:
    """Name of the base model in an ``adapter_config.json``.

    Raises:
        ValueError: if there is none.
    """
    base = read_json(adapter_config).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{adapter_config} names no base model; set its base_model_name_or_path")
    return str(base)


def merged_adapter(folder: Path, trust_remote_code: bool, resolve: Resolve) -> Path:
    """The safetensors folder made from a peft adapter and its base: a causal LM, or a reward model with its head.

    Args:
        folder: the adapter.
        trust_remote_code: run code that comes with the base.
        resolve: finds the base, which may be an adapter as well.

    Raises:
        FileNotFoundError: if the base cannot be found.
        ValueError: if the merged model computes something else.
    """
    base = base_name(folder / "adapter_config.json")
    try:
        source = resolve(base, trust_remote_code=trust_remote_code)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the base model of the adapter in {str(folder)!r} cannot be found; "
            f"correct base_model_name_or_path in its adapter_config.json: {error}"
        ) from error
    # the base is part of the key: by content if it is a folder, by name if it is on the Hub
    parts = sorted(folder.glob("adapter_*"))
    if isinstance(source, Path):
        parts += sorted(source.glob("*.safetensors"))
    key = digest_of(f"adapter {ADAPTER_CONVERTER}", str(source), *map(file_digest, parts))

    def merge(target: Path) -> None:
        # peft uses random numbers before it loads the weights; those of the run must not change
        with torch.random.fork_rng(devices=[]):
            model = open_adapter(folder, source, trust_remote_code)
            rows = [torch.tensor([row]) for row in probe_rows(cast(PreTrainedConfig, model.config))]
            with evaluating(model.modules()):
                # before merging, which changes the layers in place
                expected = [model(input_ids=row).logits for row in rows]
            try:
                # W + (alpha / r) B A
                # safe_merge raises ValueError where the sum is not finite
                merged = cast(Callable[..., PreTrainedModel], model.merge_and_unload)(safe_merge=True)
            except (AttributeError, ValueError) as error:
                raise ValueError(
                    f"the adapter in {str(folder)!r} cannot be merged into its base ({error}); merge it where it was "
                    f"trained, and name the folder of the whole model"
                ) from error
            merged.save_pretrained(target)
            # the folder is opened again: saving may tie weights that the adapter has changed on one side
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
        # the adapter's own tokenizer first: it may have tokens that the base lacks
        with_tokenizer = folder if (folder / "tokenizer_config.json").exists() else source
        open_tokenizer(with_tokenizer, str(folder), trust_remote_code).save_pretrained(target)

    return cached(folder.resolve().name, key, merge)


def open_adapter(folder: Path, source: Path | str, trust_remote_code: bool = False) -> PeftModel:
    """Open a peft adapter over its base, with its own head and embeddings, on the CPU in float32.

    Args:
        folder: written by ``PeftModel.save_pretrained``.
        source: folder or Hub id of the base.
        trust_remote_code: run code that comes with the base.

    Raises:
        ValueError: if weights are left over or missing, in the adapter or in its base.
    """
    settings = read_json(folder / "adapter_config.json")
    base = base_name(folder / "adapter_config.json")
    own = _adapter_weights(folder)
    heads = {key: tensor for key, tensor in own.items() if key.partition(".")[0] in SCORE_HEADS}
    mapping = settings.get("auto_mapping")
    mapped = (mapping.get("base_model_class") if isinstance(mapping, dict) else None) or ""
    num_scores: int | None = None
    if heads or settings.get("task_type") == "SEQ_CLS" or "SequenceClassification" in mapped:
        # of a head of several layers the last is the smallest
        num_scores = min((len(tensor) for tensor in heads.values()), default=1)
    model = open_pretrained(source, base, "float32", None, trust_remote_code, num_scores=num_scores, replaced=own)
    embedding = saved_embedding(own)
    if embedding is not None and len(embedding) != embedding_rows(model):
        # all rows are in the adapter
        model.resize_token_embeddings(len(embedding), mean_resizing=False)
    return fit_adapters(model, {"default": folder}, base)


def continued_adapter(model: PreTrainedModel, adapter: str, policy: str) -> PeftModel:
    """Put a saved adapter on a policy, to train it further.

    Args:
        model: the causal LM that the adapter was trained on.
        adapter: folder written by ``PeftModel.save_pretrained``, or a model folder of a run with ``adapter`` inside.
        policy: name of the causal LM in errors.

    Raises:
        FileNotFoundError: if the folder holds no adapter.
        ValueError: if the adapter does not fit the model, or took its start out of the weights of its base.
    """
    folder = Path(adapter).expanduser()
    # model folders hold the merged policy, and the adapter inside
    folder = folder / "adapter" if (folder / "adapter").is_dir() else folder
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"model.lora.adapter={adapter!r} holds no adapter_config.json; name a folder that "
            f"PeftModel.save_pretrained wrote, or the model folder of a run with model.lora"
        )
    check_files(folder)
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"peft cannot read {folder / 'adapter_config.json'}: {error}") from error
    check_method(config)
    if changes_base(config):
        raise ValueError(
            f"the adapter in {str(folder)!r} took its start out of the weights of its base (init_lora_weights in its "
            f"adapter_config.json), which {policy!r} does not have; name its merged model folder as model.policy, and "
            f"train a new adapter"
        )
    return fit_adapters(model, {"default": folder}, policy, trained=True)


def fit_adapters(model: nn.Module, folders: Mapping[str, Path], base: str, *, trained: bool = False) -> PeftModel:
    """Put saved adapters on a model, all their weights.

    Args:
        model: the model that they were trained on, or its trunk.
        folders: folders of the adapters, at least one, by the name that each gets.
        base: name of the model in errors.
        trained: whether they are trained further.

    Raises:
        ValueError: if an adapter lacks weights, or has some that the model has no place for.
    """
    adapted: PeftModel | None = None
    for name, folder in folders.items():
        try:
            if adapted is None:
                # a trunk is no PreTrainedModel, but peft treats it as one
                whole = cast(PreTrainedModel, model)
                adapted = PeftModel.from_pretrained(whole, str(folder), name, is_trainable=trained, torch_device="cpu")
            else:
                adapted.load_adapter(str(folder), name, is_trainable=trained, torch_device="cpu")
            state: dict[str, Tensor] = load_peft_weights(str(folder), device="cpu")
            # loaded a second time for its report, which from_pretrained keeps to itself
            report = cast(PeftLoadResult, set_peft_model_state_dict(adapted, state, adapter_name=name))
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise ValueError(
                f"peft cannot open the adapter in {str(folder)!r} over {base!r}: {error}; correct its "
                f"adapter_config.json (base_model_name_or_path, modules_to_save), or save it again with save_pretrained"
            ) from error
        # the report also lists weights of the base and of other adapters, which this file does not hold
        missing = [key for key in report.missing_keys if f".{name}." in f"{key}."]
        unexpected = [key for key in report.unexpected_keys if not _is_second_copy(key, state)]
        if missing or unexpected:
            wrong, relation = (missing, "lacks") if missing else (unexpected, "has no place in the base for")
            raise ValueError(
                f"the adapter in {str(folder)!r} {relation} {len(wrong)} weights, e.g. {wrong[0]!r}, with the base "
                f"{base!r}; correct base_model_name_or_path in its adapter_config.json, or save it again with "
                f"save_pretrained"
            )
    return cast(PeftModel, adapted)


def _is_second_copy(key: str, state: Mapping[str, Tensor]) -> bool:
    """Whether a weight is in the file a second time: peft does so with trained embeddings after the vocabulary grew."""
    copies = (".modules_to_save.", ".original_module.")
    return key in state and any(part in key and key.replace(part, ".") in state for part in copies)


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
    # peft writes "base_model.model.lm_head.base_layer.weight" for "lm_head.weight"
    names = {key.removeprefix("base_model.model.").replace(".base_layer.", "."): t for key, t in state.items()}
    return {key: tensor for key, tensor in names.items() if ".lora_" not in key}
