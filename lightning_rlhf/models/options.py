"""How checkpoints are loaded and run: the options that all modules share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from lightning_rlhf.logprobs.compute import Layout
from lightning_rlhf.models.quantization import QuantizationValue


class LoadArguments(TypedDict):
    """Keyword arguments of `load_policy`, `load_scorer` and `build_scorer`."""

    dtype: str
    attn_implementation: str | None
    gradient_checkpointing: bool
    trust_remote_code: bool


@dataclass(frozen=True)
class ModelOptions:
    """How a checkpoint is loaded and run.

    Args:
        dtype: data type of the weights: ``float32``, ``bfloat16`` (trained through float32 master weights) or
            ``float16`` (not for training).
        attn_implementation: attention of transformers: ``sdpa``, ``eager``, ``flash_attention_2``; default: its choice.
        gradient_checkpointing: recompute activations in the backward pass, which saves memory.
        chat_template: Jinja chat template, a file with one, or ``human_assistant``; default: the tokenizer's own.
        disable_dropout: train without the dropout of the checkpoint; dropout of ``lora`` stays. Default: true in
            preference learning and reinforcement learning, false in supervised fine-tuning.
        layout: ``auto`` computes each prompt once for its responses where that pays and the model supports it;
            ``padded`` computes one padded row per response.
        scoring_batch_tokens: tokens per forward pass when log-probabilities are computed without gradient, >= 1.
        use_vllm: sample responses with vLLM (extra ``vllm``); for samplers that need the policy alone.
        trust_remote_code: run code that comes with the checkpoint.
        quantization: settings of transformers' ``BitsAndBytesConfig`` by which the frozen weights of the policy are
            stored (QLoRA), e.g. ``{load_in_4bit: true}``; needs ``lora`` and bitsandbytes. Default: none.
    """

    dtype: str = "float32"
    attn_implementation: str | None = None
    gradient_checkpointing: bool = False
    chat_template: str | None = None
    disable_dropout: bool | None = None
    layout: Layout = "auto"
    scoring_batch_tokens: int = 4096
    use_vllm: bool = False
    trust_remote_code: bool = False
    quantization: dict[str, QuantizationValue] | None = None

    def __post_init__(self) -> None:
        if self.scoring_batch_tokens < 1:
            raise ValueError(f"model.options.scoring_batch_tokens must be at least 1; got {self.scoring_batch_tokens}")

    def load_arguments(self) -> LoadArguments:
        """The options of loading a checkpoint."""
        return {
            "dtype": self.dtype,
            "attn_implementation": self.attn_implementation,
            "gradient_checkpointing": self.gradient_checkpointing,
            "trust_remote_code": self.trust_remote_code,
        }


DEFAULT_OPTIONS = ModelOptions()
