"""Open a folder or Hub id with transformers, and check that every weight came from it.

transformers initializes missing weights at random and only warns. Here a checkpoint opens completely or not at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import cast

import torch
import transformers
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lightning_rlhf.logprobs.eval_mode import evaluating
from lightning_rlhf.logprobs.exactness import nearly_equal
from lightning_rlhf.models.checks import (
    HEADS,
    LoadingReport,
    check_class,
    check_files,
    check_keys,
    check_not_quantized,
)
from lightning_rlhf.models.heads import in_score_head, probe_rows
from lightning_rlhf.models.quantization import QuantizationValue, compute_alike, quantization_config
from lightning_rlhf.runtime.hub_access import hub_fault, hub_or_cache


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
"""Endings of the names of embeddings."""

_LANGUAGE_MODELS = ("LM", "LMHeadModel", "LMHead", "ConditionalGeneration", "Model")
"""Endings of the names of classes without a score."""


def open_pretrained(
    source: Path | str,
    name: str,
    dtype: str,
    attn_implementation: str | None,
    trust_remote_code: bool,
    num_scores: int | None = None,
    meta: bool = False,
    new_head: bool = False,
    replaced: Iterable[str] = (),
    quantization: Mapping[str, QuantizationValue] | None = None,
) -> PreTrainedModel:
    """Load a causal LM or a classifier from safetensors, with all its weights but those of a new head.

    Args:
        source: folder or Hub id that transformers opens.
        name: name of the checkpoint in errors.
        dtype: a key of `DTYPES`.
        attn_implementation: attention of transformers. Default: its own choice.
        trust_remote_code: run code that comes with the checkpoint.
        num_scores: outputs of the score head; None opens a causal LM.
        meta: leave the weights out: all tensors are on the meta device.
        new_head: whether the score head may be new.
        replaced: names of weights that the caller loads from elsewhere.
        quantization: settings of ``BitsAndBytesConfig``. Default: weights of type ``dtype``.

    Raises:
        FileNotFoundError: if transformers finds no such checkpoint.
        ValueError: if weights are missing or left over, or the checkpoint is of another class.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    if isinstance(source, Path) and not any(source.glob("*.safetensors")):
        raise ValueError(
            f"policy folder {name!r} holds no .safetensors file; pickled weights can run code when opened: "
            f"save the model again with save_pretrained"
        )
    config = open_config(source, str(source), trust_remote_code)
    if config is not None:
        check_not_quantized(config, source, name)
        check_class(config, name, trust_remote_code)
    options: dict[str, object] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    if quantization is not None:
        options["quantization_config"] = quantization_config(quantization)
    if meta:
        options["device_map"] = "meta"
    if num_scores is not None:
        options["num_labels"] = num_scores
    model, report = _loaded(source, name, DTYPES[dtype], trust_remote_code, num_scores is not None, options)
    if quantization is not None:
        compute_alike(model)
    named = config.architectures[0] if config is not None and config.architectures else None
    is_language_model = _check_weights(report, model, name, named, num_scores, new_head, set(replaced))
    # without weights there is nothing to compare
    if not meta and named is not None and named != type(model).__name__ and not is_language_model:
        _check_named_class(named, model, source, name, DTYPES[dtype])
    embedding: nn.Module = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding) and embedding.padding_idx is not None:
        # torch gives this row no gradient, and where padding and EOS are one token no model learns to end; padding is
        # left out here by lengths, never by its id
        embedding.padding_idx = None
    return model


def _loaded(
    source: Path | str,
    name: str,
    dtype: torch.dtype,
    trust_remote_code: bool,
    is_scorer: bool,
    options: dict[str, object],
) -> tuple[PreTrainedModel, LoadingReport]:
    """Run ``from_pretrained``, and put its errors into words."""
    kind = AutoModelForSequenceClassification if is_scorer else AutoModelForCausalLM
    from_pretrained = cast(Callable[..., tuple[PreTrainedModel, LoadingReport]], kind.from_pretrained)
    try:
        with hub_or_cache(source):
            model, report = from_pretrained(
                source,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                # pickled weights can run code when they are opened
                use_safetensors=True,
                output_loading_info=True,
                # reported, and refused by `check_keys`
                ignore_mismatched_sizes=True,
                **options,
            )
    except OSError as error:
        raise _not_found(name, source, error) from error
    except (KeyError, ValueError, SafetensorError) as error:
        raise ValueError(f"transformers cannot open {name!r}: {error}") from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(f"policy {name!r} is an adapter on the Hub; download it and name the local folder")
    return model, report


def _check_weights(
    report: LoadingReport,
    model: PreTrainedModel,
    name: str,
    named: str | None,
    num_scores: int | None,
    new_head: bool,
    replaced: set[str],
) -> bool:
    """Compare the weights of a checkpoint with those of the model; arguments as in `open_pretrained`.

    Args:
        report: loading info of ``from_pretrained``.
        model: the model.
        name: name of the checkpoint in errors.
        named: class that the config names.
        num_scores: outputs of the score head; None for a causal LM.
        new_head: whether the score head may be new.
        replaced: weights that the caller loads from elsewhere.

    Returns:
        Whether a classifier was made of a causal LM.
    """
    # of a config that names no class, nothing can be said against a causal LM
    has_no_score = named is None or (named.endswith(_LANGUAGE_MODELS) and not named.endswith("RewardModel"))
    # a reward model whose head is missing, or has another shape: a new head would lose the trained one
    has_trained_head = not has_no_score or any(key.partition(".")[0] in HEADS for key in report["unexpected_keys"])
    mismatched = {entry[0] for entry in report["mismatched_keys"]}
    # the head may also come from an adapter, which replaces it
    gets_head = num_scores is not None and (new_head or any(in_score_head(key) for key in replaced))
    from_language_model = gets_head and has_no_score

    def may_lack(key: str) -> bool:
        # a head of another shape is replaced only for several scores: where one is wanted, the checkpoint is
        # a classifier of several labels and no reward model
        new = num_scores != 1 if key in mismatched else not has_trained_head
        return key in replaced or (new_head and in_score_head(key) and new)

    check_keys(
        report,
        model,
        name,
        kind="a reward model" if num_scores is not None and not from_language_model else "a causal LM",
        may_lack=may_lack,
        may_hold=functools.partial(_language_head, config=model.config) if from_language_model else lambda keys: set(),
    )
    return from_language_model


def _language_head(keys: Iterable[str], config: PreTrainedConfig) -> set[str]:
    """Those of some weights that belong to the causal LM of a family; a reward model does not use its head."""
    keys = set(keys)
    # nothing is left over, as with most checkpoints: no model has to be built
    if not keys:
        return keys
    from_config = cast(Callable[[PreTrainedConfig], PreTrainedModel], AutoModelForCausalLM.from_config)
    try:
        # only the names matter, so that no memory is needed
        with torch.device("meta"):
            model = from_config(config)
    except (KeyError, ValueError):
        # without a causal LM of this family, all weights left over are errors
        return set()
    return keys & set(model.state_dict())


def _check_named_class(named: str, model: PreTrainedModel, source: Path | str, name: str, dtype: torch.dtype) -> None:
    """Compare a model with the class that its checkpoint names, on two short texts.

    Raises:
        ValueError: if that class computes something else, or cannot be opened.
    """
    kind = getattr(transformers, named, None)
    if kind is None or not hasattr(kind, "from_pretrained"):
        return  # code of its own, which has been opened already
    remedy = f"correct architectures in its config.json, or name a checkpoint of a {type(model).__name__}"
    # opening a model may use random numbers, which must not change those of the run
    with torch.random.fork_rng(devices=[]):
        try:
            with hub_or_cache(source):
                other = kind.from_pretrained(source, dtype=dtype, use_safetensors=True)
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{name!r} is a {named} (architectures in its config.json) and does not open as one ({error}); {remedy}"
            ) from error
    with evaluating([*model.modules(), *other.modules()]):
        for row in probe_rows(model.config):
            ids = torch.tensor([row])
            ours, theirs = model(input_ids=ids).logits, getattr(other(input_ids=ids), "logits", None)
            if theirs is None:
                return  # a trunk without a head: its weights are all there, or `check_keys` would have said so
            if ours.shape != theirs.shape or not nearly_equal(ours, theirs):
                raise ValueError(
                    f"{name!r} is a {named} (architectures in its config.json), and computes other numbers as a "
                    f"{type(model).__name__}, which it would be used as; {remedy}"
                )


def embedding_rows(model: PreTrainedModel | PeftModel) -> int | None:
    """Rows of the embedding; None where there is no table."""
    embedding = cast(Callable[[], nn.Module], model.get_input_embeddings)()
    weight = getattr(embedding, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) else None


def open_config(source: Path | str, name: str, trust_remote_code: bool) -> PreTrainedConfig | None:
    """Configuration of a checkpoint; None for an unknown Hub id, for which opening the model raises the error.

    Raises:
        ValueError: if transformers cannot read it.
    """
    try:
        return required_config(source, name, trust_remote_code)
    except FileNotFoundError:
        return None


def required_config(source: Path | str, name: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Configuration of a checkpoint.

    Raises:
        FileNotFoundError: if transformers finds no such checkpoint.
        ValueError: if transformers cannot read it.
    """
    try:
        with hub_or_cache(source):
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise _not_found(name, source, error) from error
    except (KeyError, ValueError) as error:
        raise ValueError(f"transformers cannot open the config.json of {name!r}: {error}") from error
    return cast(PreTrainedConfig, config)


def open_tokenizer(source: Path | str, name: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Tokenizer of a folder or Hub id.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if its files cannot be read.
    """
    if isinstance(source, Path):
        check_files(source)
    try:
        with hub_or_cache(source):
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise _not_found(name, source, error) from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"transformers cannot open the tokenizer of {name!r}: {error}; put the files that "
            f"tokenizer.save_pretrained writes into its folder"
        ) from error
    return cast(PreTrainedTokenizerBase, tokenizer)


def _not_found(name: str, source: Path | str, error: OSError) -> OSError:
    if isinstance(source, Path):
        return FileNotFoundError(f"policy folder {name!r} is incomplete: {error}")
    fault = hub_fault()
    if fault is not None:
        return FileNotFoundError(
            f"policy {name!r} is no local folder (relative paths count from {Path.cwd()}), is not in the cache of the "
            f"Hub, or not whole, and {fault}: correct the name, name a local folder, or download it where the Hub can "
            f"be reached"
        )
    return FileNotFoundError(
        f"policy {name!r} is no local folder, and the Hub gave no such model (private, misspelt, or without "
        f"safetensors? Relative paths count from {Path.cwd()}): {error}"
    )
