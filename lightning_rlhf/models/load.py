"""Policies and scorers for training: from the Hub, folders, GGUF files and adapters.

Names are resolved in `resolve`, weights opened and checked in `pretrained`; `lora`, `tokenizers` and `stops` hold the
rest of a policy. Their public names can be imported from here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from lightning_rlhf.logprobs.eval_mode import evaluating
from lightning_rlhf.logprobs.exactness import nearly_equal
from lightning_rlhf.models.adapters import continued_adapter
from lightning_rlhf.models.heads import probe_rows, reads_last_token, score_head
from lightning_rlhf.models.lora import AdapterSettings, LoRA, is_plain, lora_config
from lightning_rlhf.models.pretrained import open_pretrained
from lightning_rlhf.models.quantization import QuantizationValue, is_quantized
from lightning_rlhf.models.reference import build_reference, off_is_start
from lightning_rlhf.models.resolve import resolve_checkpoint
from lightning_rlhf.models.save import refuse_tied_targets, save_policy
from lightning_rlhf.models.stops import context_window, end_of_sequence_ids
from lightning_rlhf.models.tokenizers import load_tokenizer


__all__ = [
    "AdapterSettings",
    "LoRA",
    "context_window",
    "end_of_sequence_ids",
    "load_policy",
    "load_scorer",
    "load_tokenizer",
    "open_classifier",
    "resolve_checkpoint",
    "save_policy",
    "score_head",
]


def load_policy(
    policy: str,
    *,
    lora: AdapterSettings | None = None,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
    quantization: Mapping[str, QuantizationValue] | None = None,
    meta: bool = False,
) -> PreTrainedModel | PeftModel:
    """Load a policy for training, in train mode.

    An adapter folder is merged into its base first. With ``lora`` the merged model is the start of the fresh adapter,
    and so the reference; without, it is trained whole. The fresh adapter is initialized with torch's global generator,
    and changes nothing until it is trained. ``lora.adapter`` is an adapter that is trained further instead.

    Args:
        policy: as for `resolve_checkpoint`.
        lora: train adapters only: `LoRA`, or a configuration object of PEFT. Default: train the whole model.
        dtype: floating-point type of the weights: ``float32``, ``bfloat16`` or ``float16``. Adapters are float32.
        attn_implementation: attention of transformers, e.g. ``sdpa``. Default: its own choice.
        gradient_checkpointing: recompute activations in the backward pass, for memory.
        trust_remote_code: run code that comes with the checkpoint.
        quantization: settings of transformers' ``BitsAndBytesConfig`` for the frozen weights under adapters (QLoRA,
            Dettmers et al. 2023, arXiv 2305.14314). Default: none.
        meta: leave the weights out: all tensors are on the meta device.

    Raises:
        FileNotFoundError: if there is no such policy, or a Hub id is neither cached nor reachable.
        ValueError: if the checkpoint is no causal LM, holds no safetensors, LoRA names layers the model lacks, or the
            adapter has no reference: the model without it is not the checkpoint.
    """
    if quantization is not None and (lora is None or meta):
        raise ValueError(
            "quantized weights cannot be trained or sharded: set model.lora with model.options.quantization, and run "
            "without trainer/fsdp"
        )
    source = resolve_checkpoint(policy, trust_remote_code=trust_remote_code)
    model = open_pretrained(
        source, policy, dtype, attn_implementation, trust_remote_code, meta=meta, quantization=quantization
    )
    if gradient_checkpointing:
        _checkpoint_gradients(model)
    if lora is None:
        return cast(PreTrainedModel, model.train())
    adapted = _adapted(model, LoRA.of(lora), policy, meta)
    # here, and not at the end of training, when the policy is saved merged
    refuse_tied_targets(adapted)
    return adapted.train()


def _adapted(model: PreTrainedModel, lora: LoRA, policy: str, meta: bool) -> PeftModel:
    """Put the adapter on a policy, and check that its reference is the checkpoint."""
    if lora.adapter is not None:
        if meta:
            raise ValueError("model.lora.adapter does not run sharded; leave trainer/fsdp out, or use model.start")
        return continued_adapter(model, lora.adapter, policy)
    config = lora_config(model, lora, policy, task_type="CAUSAL_LM")
    plain = is_plain(config)
    if meta and not plain:
        raise ValueError(
            f"only plain LoRA runs sharded, and model.lora.peft asks for more ({config.peft_type}); leave trainer/fsdp "
            f"out"
        )
    if not plain and any(map(is_quantized, model.modules())):
        raise ValueError("model.options.quantization goes with plain LoRA; leave settings of model.lora.peft out")
    before = [] if plain else _probe(model)
    try:
        # without weights, those of the adapter are on the meta device too
        adapted = cast(PeftModel, get_peft_model(model, config, low_cpu_mem_usage=meta))
    except (KeyError, NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(f"model.lora: peft cannot put this adapter on {policy!r}: {error}") from error
    if not plain:
        _check_reference(adapted, before, policy)
    return adapted


def _probe(model: PreTrainedModel) -> list[Tensor]:
    """Logits of two short texts, in eval mode."""
    with evaluating(list(model.modules())):
        return [model(input_ids=torch.tensor([row], device=model.device)).logits for row in probe_rows(model.config)]


def _check_reference(policy: PeftModel, checkpoint: list[Tensor], name: str) -> None:
    """Compare the fixed reference of a policy with the checkpoint, while the adapter is far from its start.

    Args:
        policy: the policy with its new adapter.
        checkpoint: results of `_probe` before it got the adapter.
        name: name of the checkpoint in errors.

    Raises:
        ValueError: if they differ.
    """
    reference = build_reference(policy, "fixed")
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in trained]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter))
        with reference.active() as model:
            found = _probe(model)
    finally:
        with torch.no_grad():
            for parameter, tensor in zip(trained, start, strict=True):
                parameter.copy_(tensor)
    if not all(map(nearly_equal, found, checkpoint)):
        kind = policy.active_peft_config.peft_type
        place = "with its adapters switched off" if off_is_start(policy) else "with its adapters as they start"
        raise ValueError(
            f"{name!r} {place} computes something else than without adapters ({kind}, {policy.dtype}), so that there "
            f"would be no reference; set model.options.dtype=float32, or leave out the settings of model.lora.peft "
            f"that change the base weights"
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
        checkpoint: as for `resolve_checkpoint`: a reward model, or a causal LM, which gets a head that is initialized
            with torch's global generator.
        num_scores: outputs of the head, >= 1. A checkpoint whose head has fewer or more gets a new one if this is
            above 1.
        dtype: floating-point type of the weights: ``float32``, ``bfloat16`` or ``float16``.
        attn_implementation: attention of transformers, e.g. ``sdpa``. Default: its own choice.
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
        _checkpoint_gradients(model)
    # raises where there is no such head, also without weights
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
    """Open a checkpoint with ``AutoModelForSequenceClassification``, with any head; arguments as in `load_scorer`."""
    return open_pretrained(
        resolve_checkpoint(checkpoint, trust_remote_code=trust_remote_code),
        checkpoint,
        dtype,
        attn_implementation,
        trust_remote_code,
        num_scores=num_scores,
        meta=meta,
        new_head=new_head,
    )


def _checkpoint_gradients(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass."""
    enable = cast(Callable[..., None], model.gradient_checkpointing_enable)
    # reentrant checkpoints lose the gradient where the inputs of a block need none, as under LoRA
    enable(gradient_checkpointing_kwargs={"use_reentrant": False})
