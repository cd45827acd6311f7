"""Log-probabilities of responses under a causal language model, exact, and without the work nobody asked for.

Two things are left out: the prompt is computed once for all its responses (`shared_prefix`), and the language-model
head sees only the positions that predict response tokens. A model that cannot share a prompt exactly (recurrent layers,
flash kernels without masks) is found out on its first use, by comparison with its own plain forward, and gets padded
rows.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lightning_rlhf.models.modes import evaluating
from lightning_rlhf.models.shared_prefix import (
    Group,
    PackedResponses,
    attention_mask,
    pack,
    sharing_gain,
    split_by_tokens,
)


Layout = Literal["auto", "shared", "padded"]

LOGIT_BYTES = 256 * 2**20
"""Logits of a batch that would take more than this in float32 are computed in tiles, and again in the backward pass."""

SHARING_PAYS_FROM = 1.05
"""`sharing_gain` from which ``layout="auto"`` shares prompts; below it a dense mask costs more than it saves."""


def response_logps(
    model: nn.Module,
    groups: Sequence[Group],
    *,
    layout: Layout = "auto",
    tokens_per_batch: int | None = None,
    tile: int | None = None,
    temperature: float = 1.0,
) -> list[Tensor]:
    """Compute log p(token | prompt, earlier tokens) for every response token, nats.

    Args:
        model: a causal language model of transformers, or a PeftModel of one; carries gradient if enabled.
        groups: prompts with their responses, as token ids; neither may be empty.
        layout: ``"shared"`` computes a prompt once per group, ``"padded"`` once per response; ``"auto"`` shares if the
            model can and `sharing_gain` is at least 1.05.
        tokens_per_batch: positions per forward pass at most; None puts everything in one. Under FSDP all ranks must
            make equally many forward passes, so leave it None there.
        tile: tokens whose logits are held at a time, >= 1; None takes as many as fit into 256 MiB.
        temperature: divides the logits, > 0.

    Returns:
        One tensor [length] per response, group by group, in the order given; float32, or float64 for float64 models.

    Raises:
        ValueError: if a prompt or a response is empty, or ``layout="shared"`` is asked of a model that cannot.
    """
    if not groups:
        return []
    if layout == "auto":
        layout = "shared" if _sharing_pays(model, groups) else "padded"
    if tokens_per_batch is None:
        batches = [list(range(len(groups)))]
    else:
        batches = split_by_tokens(groups, tokens_per_batch, layout)
    by_group: dict[int, list[Tensor]] = {}
    for batch in batches:
        packed = pack([groups[index] for index in batch], layout)
        pieces = iter(packed.split(packed_logps(model, packed, tile=tile, temperature=temperature)))
        by_group |= {index: [next(pieces) for _ in groups[index][1]] for index in batch}
    return [logps for index in range(len(groups)) for logps in by_group[index]]


def summed_logps(
    model: nn.Module,
    groups: Sequence[Group],
    *,
    layout: Layout = "auto",
    tokens_per_batch: int | None = None,
    tile: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Compute log p(response | prompt) in nats, [responses]; arguments as in `response_logps`."""
    logps = response_logps(
        model, groups, layout=layout, tokens_per_batch=tokens_per_batch, tile=tile, temperature=temperature
    )
    return torch.stack([tokens.sum() for tokens in logps]) if logps else torch.zeros(0)


def packed_logps(
    model: nn.Module, packed: PackedResponses, *, tile: int | None = None, temperature: float = 1.0
) -> Tensor:
    """Compute the log-probability of each target of a packed batch, [tokens]; arguments as in `response_logps`."""
    if temperature <= 0 or (tile is not None and tile < 1):
        raise ValueError(f"temperature must be > 0 and tile at least 1; got {temperature} and {tile}")
    base = _base(model)
    support = _support(model)
    if packed.shares_prompt and support.shared is not None:
        raise ValueError(
            f"{_name(base)} cannot share a prompt between responses: {support.shared}; pack with layout='padded'"
        )
    limit = tile or max(1, LOGIT_BYTES // (4 * base.config.get_text_config().vocab_size))
    mode: HeadMode = "gathered" if len(packed.targets) <= limit else "tiled"
    if support.gathered is not None:
        support.warn_once("gathered", f"{_name(base)}: computing logits at every position, since {support.gathered}")
        mode = "full"
    elif mode == "tiled" and support.tiled is not None:
        support.warn_once("tiled", f"{_name(base)}: computing all logits of a batch at once, since {support.tiled}")
        mode = "gathered"
    return _forward(model, packed, mode, limit, temperature)


def token_logps(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of the targets, [tokens], from logits [tokens, vocabulary]; in float32 at least."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return -F.cross_entropy(logits / temperature if temperature != 1.0 else logits, targets, reduction="none")


# ---- the forward pass ----------------------------------------------------------------------------------------------

HeadMode = Literal["full", "gathered", "tiled"]


def _forward(model: nn.Module, packed: PackedResponses, mode: HeadMode, tile: int, temperature: float) -> Tensor:
    base = _base(model)
    packed = packed.to(_embedding(base).device)
    inputs = _inputs(base, packed)
    head = _head(base)
    if mode == "full":
        logits = model(**inputs, use_cache=False).logits.flatten(0, 1)
        return token_logps(logits.index_select(0, packed.predictors), packed.targets, temperature)
    assert head is not None, "_probe finds models without a head"
    if mode == "gathered":
        with _before_head(head, lambda hidden: hidden.flatten(0, 1).index_select(0, packed.predictors)):
            logits = model(**inputs, use_cache=False).logits
        return token_logps(logits, packed.targets, temperature)

    adjust = _logit_adjustment(base)

    def score(hidden: Tensor, targets: Tensor) -> Tensor:
        return token_logps(adjust(head(hidden)), targets, temperature)

    logps: list[Tensor] = []

    def score_in_tiles(hidden: Tensor) -> Tensor:
        hidden = hidden.flatten(0, 1).index_select(0, packed.predictors)
        num_tiles = math.ceil(len(hidden) / tile)
        for part, targets in zip(hidden.tensor_split(num_tiles), packed.targets.tensor_split(num_tiles), strict=True):
            if torch.is_grad_enabled():
                logps.append(checkpoint(score, part, targets, use_reentrant=False))
            else:
                logps.append(score(part, targets))
        return hidden[:1]

    with _before_head(head, score_in_tiles):
        logits = model(**inputs, use_cache=False).logits
    # FSDP starts its backward pass at the outputs of the model, so they have to be in the graph
    return torch.cat(logps) + (0.0 * logits.sum() if logits.requires_grad else 0.0)


@contextmanager
def _before_head(head: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change what enters the head, for one forward pass.

    A hook, and not a call of trunk and head one by one: whatever wraps the model (FSDP, PEFT) and whatever it does to
    its logits (scales, soft caps) stays in force.
    """

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        del module
        handle.remove()  # `change` may call the head itself
        return (change(args[0]), *args[1:])

    handle = head.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _inputs(base: PreTrainedModel, packed: PackedResponses) -> dict[str, Any]:
    if not packed.shares_prompt:
        # nothing sees the filling at the right of a causal row, so that no mask is needed and the fast kernels apply
        return {"input_ids": packed.input_ids}
    config, dtype = base.config.get_text_config(), _embedding(base).dtype
    window, layer_types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None) or ()
    mask: Tensor | dict[str, Tensor]
    if "sliding_attention" in layer_types:
        mask = {
            "full_attention": attention_mask(packed, dtype),
            "sliding_attention": attention_mask(packed, dtype, window),
        }
    else:
        # layer types, none of them sliding: the window is not in use (Qwen); no layer types: it is everywhere (Mistral)
        mask = attention_mask(packed, dtype, None if layer_types else window)
    return {"input_ids": packed.input_ids, "position_ids": packed.position_ids, "attention_mask": mask}


def _logit_adjustment(base: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """What the model does to its logits behind the head; `_probe` verifies the guess."""
    config = base.config.get_text_config()
    # Cohere multiplies, Granite divides, Gemma caps
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)

    def adjust(logits: Tensor) -> Tensor:
        logits = logits * scale if scale != 1.0 else logits
        return cap * torch.tanh(logits / cap) if cap else logits

    return adjust


# ---- what a model can do -------------------------------------------------------------------------------------------


@dataclass
class _Support:
    """Obstacles, None where there are none: to the head on chosen positions, in tiles, and to shared prompts."""

    gathered: str | None
    tiled: str | None
    shared: str | None
    warned: set[str] = field(default_factory=set)

    def warn_once(self, what: str, message: str) -> None:
        if what not in self.warned:
            self.warned.add(what)
            warnings.warn(message, stacklevel=3)


_SUPPORT: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], _Support]] = WeakKeyDictionary()


def _support(model: nn.Module) -> _Support:
    """Probe a model on its first use; again when its attention kernel, dtype or device has changed."""
    base = _base(model)
    weight = _embedding(base)
    circumstances = (base.config._attn_implementation, weight.dtype, weight.device.type)
    known = _SUPPORT.get(base)
    if known is None or known[0] != circumstances:
        known = _SUPPORT[base] = (circumstances, _probe(model, weight.dtype, weight.device.type))
    return known[1]


def _probe(model: nn.Module, dtype: torch.dtype, device: str) -> _Support:
    """Compare every shortcut with the plain forward of the model on five random responses.

    All ranks run the same forward passes, whatever their data, so that sharded models do not hang.
    """
    base = _base(model)
    groups = _probe_groups(base.config.get_text_config().vocab_size)
    padded, shared = pack(groups, "padded"), pack(groups, "shared")
    tile = len(padded.targets) // 3
    with evaluating(model.modules()), torch.autocast(device, enabled=False):
        rows = [pack([(prompt, [r])], "padded") for prompt, responses in groups for r in responses]
        alone = torch.cat([_forward(model, row, "full", tile, 1.0) for row in rows])
        full = _forward(model, padded, "full", tile, 1.0)
        # sqrt(eps) is far above rounding and far below what a wrong mask does. TF32 and sharded mixed precision round
        # more than the dtype of the weights tells; the effect of mere padding shows how much
        floor = 3 * math.sqrt(torch.finfo(dtype).eps)
        tolerance = max(floor, min(4 * _distance(full, alone), 0.1))

        def obstacle(packed: PackedResponses, mode: HeadMode, expected: Tensor) -> str | None:
            try:
                found = _forward(model, packed, mode, tile, 1.0)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever third-party model code raises: reported in the warning
                return f"its forward pass raised {type(error).__name__}: {error}"
            if found.shape != expected.shape:
                return f"its logits do not follow the positions given to the head ({tuple(found.shape)})"
            difference = _distance(found, expected)
            return None if difference <= tolerance else f"log-probabilities are off by {difference:.2g} nats"

        gathered = obstacle(padded, "gathered", full) if _head(base) is not None else "it names no head"
        tiled = gathered or obstacle(padded, "tiled", full)
        reason = _cannot_share(base)
        if reason is None:
            reason = obstacle(shared, "gathered" if gathered is None else "full", alone)
    return _Support(gathered, tiled, reason)


def _cannot_share(base: PreTrainedModel) -> str | None:
    """Reasons that need no forward pass, and that a half-precision probe could overlook in an untrained model."""
    config = base.config.get_text_config()
    unknown = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if base._is_stateful:
        return "it has recurrent layers, which carry one response into the next"
    if unknown:
        return f"it has layers of type {', '.join(sorted(unknown))}"
    if config._attn_implementation not in ("eager", "sdpa"):
        kernel = config._attn_implementation
        return f"its attention {kernel!r} takes no dense mask; load it with attn_implementation='sdpa'"
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return "its forward pass takes no position_ids"
    return None


def _sharing_pays(model: nn.Module, groups: Sequence[Group]) -> bool:
    base = _base(model)
    support = _support(model)
    if support.shared is not None and any(len(responses) > 1 for _, responses in groups):
        support.warn_once(
            "shared", f"{_name(base)} computes prompts once per response (layout 'padded'), since {support.shared}"
        )
    hidden_size = getattr(base.config.get_text_config(), "hidden_size", None)
    return support.shared is None and sharing_gain(groups, hidden_size) >= SHARING_PAYS_FROM


def _probe_groups(vocab_size: int) -> list[Group]:
    generator = torch.Generator().manual_seed(0)  # leaves the global random state alone

    def ids(length: int) -> list[int]:
        return cast(list[int], torch.randint(vocab_size, (length,), generator=generator).tolist())

    return [(ids(16), [ids(6), ids(8), ids(3)]), (ids(11), [ids(4), ids(9)])]


def _distance(left: Tensor, right: Tensor) -> float:
    difference = (left.double() - right.double()).abs().max().item()
    return difference if math.isfinite(difference) else math.inf


def _base(model: nn.Module) -> PreTrainedModel:
    if isinstance(model, PreTrainedModel):
        return model
    peft_model = cast(Any, model)
    if peft_model.active_peft_config.is_prompt_learning:
        raise ValueError(
            "prompt-learning adapters put virtual tokens before the prompt and are not supported; use LoRA or another "
            "adapter that leaves the sequence alone"
        )
    return cast(PreTrainedModel, peft_model.get_base_model())


def _embedding(base: PreTrainedModel) -> Tensor:
    return cast(Tensor, base.get_input_embeddings().weight)


def _head(base: PreTrainedModel) -> nn.Module | None:
    return cast("nn.Module | None", base.get_output_embeddings())  # type: ignore[no-untyped-call]


def _name(base: PreTrainedModel) -> str:
    return f"{type(base).__name__} (model type {base.config.model_type!r})"
