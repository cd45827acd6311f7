"""The command ``plan``: memory and time of a run on paper, before any GPU is rented.

Counts memory and operations of a decoder in the style of Llama; `docs/scaling.md` compares it with measured runs. It
loads no weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal


Strategy = Literal["ddp", "fsdp"]

GIB = 2**30
SINGLE = 4
"""Bytes of a float32 number."""
TILE_BYTES = 256 << 20
"""Room for logits, which the head computes in tiles, and for the workspace of kernels."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder.

    Args:
        layers: number of layers.
        hidden: width of the residual stream.
        intermediate: width of the gated feed-forward network.
        heads: attention heads.
        kv_heads: key and value heads.
        head_dim: width of a head.
        vocabulary: number of tokens.
        tied: whether embedding and head are one matrix.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False

    @property
    def matrices(self) -> int:
        """Parameters of the matrices of all layers."""
        # q, o: hidden x heads head_dim; k, v: hidden x kv_heads head_dim; then gate, up and down
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def parameters(self) -> int:
        """All parameters."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        # two norms per layer and a last one, each of width hidden
        return self.matrices + embeddings + self.hidden * (2 * self.layers + 1)

    def adapters(self, rank: int) -> int:
        """Parameters of LoRA adapters on all matrices of the layers."""
        heads, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        # a matrix [out, in] has an adapter of rank (in + out) parameters: q, o; k, v; gate, up, down
        sides = 2 * (self.hidden + heads) + 2 * (self.hidden + kv) + 3 * (self.hidden + self.intermediate)
        return self.layers * rank * sides

    def activations(self, checkpointing: bool) -> int:
        """Numbers per token position that the forward pass keeps for the backward pass."""
        heads, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        # norms keep their input and its normalized form, attention its inputs before and after rotation and its
        # output, the network gate, up, silu(gate) and their product
        layer = 6 * self.hidden + 3 * heads + 4 * kv + 4 * self.intermediate
        # with checkpointing: the input of every layer, and all activations of the layer that is recomputed
        return self.layers * self.hidden + layer if checkpointing else self.layers * layer


SHAPES = {
    "1B": Shape(16, 2048, 8192, 32, 8, 64, 128256, tied=True),
    "8B": Shape(32, 4096, 14336, 32, 8, 128, 128256),
    "70B": Shape(80, 8192, 28672, 64, 8, 128, 128256),
}
"""Shapes of Llama 3 by their names."""


@dataclass(frozen=True)
class Device:
    """Memory and measured speed of a device.

    Args:
        memory: GiB.
        tflops: floating-point operations per second that matrix products reach, in 10^12.
        bandwidth: GB per second that reading weights reaches.
    """

    memory: float
    tflops: float
    bandwidth: float


@dataclass(frozen=True)
class Load:
    """The work of a round.

    Args:
        pairs: pairs of an optimizer step.
        prompt: tokens of a prompt.
        response: tokens of a response.
        rows: responses decoded together on a device.
        tokens_per_pass: token positions of a training pass on a device.
    """

    pairs: int
    prompt: int
    response: int
    rows: int
    tokens_per_pass: int


@dataclass(frozen=True)
class Estimate:
    """Memory of a device in bytes by part, and seconds of an online step by part."""

    training: dict[str, float]
    decoding: dict[str, float]
    seconds: dict[str, float]


def estimate(
    shape: Shape,
    load: Load,
    device: Device,
    gpus: int,
    strategy: Strategy = "ddp",
    lora: int | None = None,
    weight_bytes: int = 2,
    checkpointing: bool = False,
) -> Estimate:
    """Count memory and time of an online DPO step: sample, score under the reference, train.

    Args:
        shape: the model.
        load: the work.
        device: one of the devices.
        gpus: how many.
        strategy: ``fsdp`` shards policy and reference; ``ddp`` has them whole on every device.
        lora: rank of the adapters; default: the whole model is trained.
        weight_bytes: bytes per weight of the model: 4 for float32, 2 for bfloat16, where AdamW also keeps a float32
            copy of trained weights. AdamW's moments and adapters are float32 in either case.
        checkpointing: recompute activations.
    """
    shards = gpus if strategy == "fsdp" else 1
    trained = shape.parameters if lora is None else shape.adapters(lora)
    trained_bytes = weight_bytes if lora is None else SINGLE
    whole = float(shape.parameters * weight_bytes)
    kept = {
        "weights": (whole + (0 if lora is None else trained * SINGLE)) / shards,
        "AdamW": 2.0 * trained * SINGLE / shards,
        "float32 copies": float(trained * SINGLE if trained_bytes < SINGLE else 0) / shards,
        # with LoRA it is the model itself
        "reference": 0.0 if lora is not None else whole / shards,
    }
    # a pass holds one pair at least: the prompt once, and two responses
    passes = max(load.tokens_per_pass, load.prompt + 2 * load.response)
    buckets = trained * trained_bytes if strategy == "ddp" and gpus > 1 else 0
    # sharded layers are gathered one by one, two at a time
    gathered = 2 * whole / shape.layers if shards > 1 else 0.0
    activations = float(passes * shape.activations(checkpointing) * weight_bytes)
    training = {
        **kept,
        "gradients": trained * trained_bytes / shards + buckets,
        "activations": activations,
        # a step turns gradients into float32, once the activations are gone
        "float32 gradients": max(0.0, trained * (SINGLE - trained_bytes) / shards - activations),
        "gathered layers and logits": gathered + TILE_BYTES,
    }
    length = load.prompt + load.response
    # bytes of keys and values per token
    cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * weight_bytes
    decoding = {
        **kept,
        "gathered policy and reference": (1 if lora is not None else 2) * (whole - whole / shards),
        # every response is also decoded under the reference, for PILAF in half of the pairs
        "caches": 1.5 * load.rows * length * cache,
        "logits": 3.0 * 4 * load.rows * shape.vocabulary,
    }
    speed = device.tflops * 1e12 * gpus
    # FLOPs per token: one multiplication and one addition per parameter
    forward = 2.0 * shape.matrices
    attention = 2.0 * shape.layers * shape.heads * shape.head_dim * length  # half of the square, twice over
    head = 2.0 * shape.hidden * shape.vocabulary
    sampled, positions = 2 * load.pairs * load.response, load.pairs * (load.prompt + 2 * load.response)
    once = positions * (forward + attention) + sampled * head
    steps = load.response * ceil(2 * load.pairs / (load.rows * gpus))
    rows = min(load.rows, ceil(2 * load.pairs / gpus))
    # a step is bound by reading all weights, or by the arithmetic of its rows
    per_step = max(whole / (device.bandwidth * 1e9), rows * (forward + head) / (device.tflops * 1e12))
    seconds = {
        # PILAF: three forward passes per two responses
        "decoding": 1.5 * steps * per_step + load.pairs * load.prompt * (forward + attention) / speed,
        "reference": once / speed,
        # backward is twice forward; with LoRA the frozen weights have no gradient of their own
        "training": once * (3.0 if lora is None else 2.0) * (4 / 3 if checkpointing else 1.0) / speed,
    }
    return Estimate(training, decoding, seconds)


def shape_of(model: str, trust_remote_code: bool = False) -> Shape:
    """Shape of a model by its size (``8B``), folder or Hub id; reads its config only.

    Raises:
        ValueError: if its config does not look like that of a Llama.
    """
    # no file is read for these
    if model in SHAPES:
        return SHAPES[model]
    from lightning_rlhf.models.load import resolve_checkpoint
    from lightning_rlhf.models.pretrained import required_config

    loaded = required_config(resolve_checkpoint(model), model, trust_remote_code)
    config = loaded.get_text_config()
    try:
        heads = config.num_attention_heads
        return Shape(
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
            heads,
            # without grouped queries, every head has its own keys and values
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            config.vocab_size,
            bool(config.tie_word_embeddings),
        )
    except AttributeError as error:
        raise ValueError(
            f"the config of {model} lacks {error.name}; plan counts decoders like Llama, Qwen and Mistral: name one of "
            f"{', '.join(SHAPES)} of about the size instead"
        ) from None


def plan_run(
    model: str,
    gpus: int = 1,
    memory: float = 80.0,
    tflops: float = 400.0,
    bandwidth: float = 2500.0,
    pairs: int = 64,
    prompt_tokens: int = 512,
    response_tokens: int = 512,
    rows: int = 32,
    tokens_per_pass: int = 8192,
    lora: int = 16,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
) -> str:
    """Estimate memory and time of online DPO under each strategy; a table.

    Args:
        model: 1B, 8B or 70B (Llama 3), a folder, or a Hub id; its config is read, no weights.
        gpus: devices.
        memory: GiB of each.
        tflops: floating-point operations per second of matrix products on each, in 10^12; 400 is usual for bfloat16 on
            an H100.
        bandwidth: GB per second that reading weights reaches on each; 2500 is usual on an H100.
        pairs: pairs of an optimizer step on all devices.
        prompt_tokens: tokens of a prompt.
        response_tokens: tokens of a response.
        rows: responses decoded together on each, ``data.decoding.rows``.
        tokens_per_pass: positions of a training pass on each, ``data.batching.max_tokens_per_micro_batch``.
        lora: rank of the adapters in the rows that have some.
        dtype: type of the weights, ``model.options.dtype``.
    """
    shape, device = shape_of(model), Device(memory, tflops, bandwidth)
    load = Load(pairs, prompt_tokens, response_tokens, rows, tokens_per_pass)
    # zero tokens or devices divide by zero
    if min(gpus, pairs, prompt_tokens, response_tokens, rows, tokens_per_pass, lora) < 1:
        raise ValueError("gpus, pairs, prompt_tokens, response_tokens, rows, tokens_per_pass and lora must be >= 1")
    lines = [
        f"{model}: {shape.parameters / 1e9:.2f} billion parameters, {gpus} x {memory:g} GiB, {pairs} pairs of "
        f"{prompt_tokens} + 2 x {response_tokens} tokens, {dtype}",
        "| strategy | training GiB | decoding GiB | fits | sample s | reference s | train s | step s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    strategies: list[tuple[str, Strategy, int | None, bool]] = [
        ("ddp", "ddp", None, False),
        ("ddp, checkpointing", "ddp", None, True),
        ("fsdp", "fsdp", None, False),
        ("fsdp, checkpointing", "fsdp", None, True),
        (f"ddp, LoRA {lora}", "ddp", lora, False),
        (f"ddp, LoRA {lora}, checkpointing", "ddp", lora, True),
        (f"fsdp, LoRA {lora}, checkpointing", "fsdp", lora, True),
    ]
    for name, strategy, rank, checkpointing in strategies:
        # nothing to shard
        if strategy == "fsdp" and gpus == 1:
            continue
        found = estimate(
            shape, load, device, gpus, strategy, rank, 4 if dtype == "float32" else 2, checkpointing=checkpointing
        )
        sizes = [sum(part.values()) / GIB for part in (found.training, found.decoding)]
        # allocators lose a tenth to fragments
        fits = "yes" if max(sizes) * 1.1 <= memory else "no"
        cells = [name, *(f"{size:.1f}" for size in sizes), fits]
        cells += [f"{found.seconds[part]:.1f}" for part in ("decoding", "reference", "training")]
        lines.append("| " + " | ".join([*cells, f"{sum(found.seconds.values()):.1f}"]) + " |")
    return "\n".join(lines)
