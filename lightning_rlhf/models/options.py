"""How checkpoints are loaded and run: the options that all modules share."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypedDict, get_args

from lightning_rlhf.logprobs.compute import Layout
from lightning_rlhf.models.quantization import QuantizationValue


Generation: TypeAlias = Literal["local", "vllm", "server"]
"""Where responses of the policy are decoded."""

ServedBy: TypeAlias = Literal["vllm", "sglang"]
"""Kinds of servers."""


class LoadArguments(TypedDict):
    """Keyword arguments of `load_policy`, `load_scorer` and `build_scorer`."""

    dtype: str
    attn_implementation: str | None
    gradient_checkpointing: bool
    trust_remote_code: bool


@dataclass(frozen=True)
class GenerationServer:
    """A server that decodes for the policy: ``vllm serve`` or SGLang with the flags of docs/scaling.md.

    Trainer and server read and write one folder, under the same path.

    Args:
        base_url: address of the API, e.g. ``http://127.0.0.1:8000/v1``.
        model: name under which the server has the policy's base model; SGLang ignores it.
        folder: where the weights for the server are written.
        engine: kind of the server, ``vllm`` or ``sglang``.
        api_key_env: environment variable with the API key; default: the server needs none.
        concurrency: requests at the same time, >= 1; one request is one response.
        timeout: seconds for one attempt at a response, > 0.
        retries: further attempts at a request that failed, >= 0.

    Raises:
        ValueError: if a setting is out of range.
    """

    base_url: str
    model: str
    folder: str
    engine: ServedBy = "vllm"
    api_key_env: str | None = None
    concurrency: int = 64
    timeout: float = 600.0
    retries: int = 5

    def __post_init__(self) -> None:
        name = "model.options.server"
        if not re.fullmatch(r"https?://[^/@?#\s]+(/[^@?#\s]*)?", self.base_url):
            raise ValueError(
                f"{name}.base_url must be like http://127.0.0.1:8000/v1, without user, password or query; got "
                f"{self.base_url!r}"
            )
        if not self.model or not self.folder:
            raise ValueError(f"{name}.model and {name}.folder must not be empty; got {self.model!r}, {self.folder!r}")
        if self.engine not in get_args(ServedBy):
            raise ValueError(f"{name}.engine must be one of {', '.join(get_args(ServedBy))}; got {self.engine!r}")
        # `not x > 0` also refuses NaN
        if self.concurrency < 1 or self.retries < 0 or not self.timeout > 0:
            raise ValueError(
                f"{name}.concurrency must be >= 1, {name}.retries >= 0 and {name}.timeout > 0; got "
                f"{self.concurrency}, {self.retries} and {self.timeout}"
            )


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
        generation: where responses are decoded: ``local`` by the built-in engine, ``vllm`` by vLLM in this process
            (extra ``vllm``), ``server`` by ``server``. The last two suit samplers of whole responses of the policy.
        server: the server of ``generation=server``.
        use_vllm: earlier name of ``generation=vllm``.
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
    generation: Generation = "local"
    server: GenerationServer | None = None
    use_vllm: bool = False
    trust_remote_code: bool = False
    quantization: dict[str, QuantizationValue] | None = None

    def __post_init__(self) -> None:
        if self.scoring_batch_tokens < 1:
            raise ValueError(f"model.options.scoring_batch_tokens must be at least 1; got {self.scoring_batch_tokens}")
        if self.generation not in get_args(Generation):
            names = ", ".join(get_args(Generation))
            raise ValueError(f"model.options.generation must be one of {names}; got {self.generation!r}")
        if self.use_vllm and self.generation == "server":
            raise ValueError("model.options.use_vllm is the earlier name of generation=vllm: leave it out")
        if self.use_vllm:
            # object.__setattr__: the dataclass is frozen
            object.__setattr__(self, "generation", "vllm")
        if (self.generation == "server") != (self.server is not None):
            raise ValueError(
                "model.options.generation=server and model.options.server (base_url, model, folder) go together; got "
                f"generation={self.generation} {'without' if self.server is None else 'with'} a server"
            )

    def load_arguments(self) -> LoadArguments:
        """The options of loading a checkpoint."""
        return {
            "dtype": self.dtype,
            "attn_implementation": self.attn_implementation,
            "gradient_checkpointing": self.gradient_checkpointing,
            "trust_remote_code": self.trust_remote_code,
        }


DEFAULT_OPTIONS = ModelOptions()
