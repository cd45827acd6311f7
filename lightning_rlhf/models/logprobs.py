"""Log-probabilities of responses under a causal language model, exact, and without the work nobody asked for.

Three things are left out: filling (`attention`), all but one of the computations of a prompt that several responses
share (`shared_prefix`), and the head at positions that predict no response token (`head`). A model that cannot do one
of them exactly (recurrent layers, an attention of its own, an unusual head) is found out on its first use, by
comparison with its own plain forward, and does without.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from lightning_rlhf.models.attention import attending_in_segments, segments
from lightning_rlhf.models.head import LogitRule, TokenScores, score_tokens
from lightning_rlhf.models.modes import evaluating
from lightning_rlhf.models.rotary import depends_on_length, rotary_window
from lightning_rlhf.models.shared_prefix import (
    Group,
    PackedResponses,
    RowLayout,
    attention_mask,
    pack,
    sharing_gain,
    split_by_tokens,
)


Layout = Literal["auto", "packed", "shared", "padded"]

SHARING_PAYS_FROM = 1.05
"""`sharing_gain` from which rows with a mask share prompts; below it the dense mask costs more than it saves."""


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
        layout: ``"packed"`` computes a prompt once per group and fills nothing up, ``"shared"`` computes a prompt once
            per group, in rows of equal length, ``"padded"`` once per response; ``"auto"`` packs if the model can, else
            shares if it can and `sharing_gain` is at least 1.05.
        tokens_per_batch: positions per forward pass at most; None puts everything in one. Under FSDP all ranks must
            make equally many forward passes, so leave it None there.
        tile: tokens whose logits are held at a time, >= 1; None takes as many as fit into 256 MiB.
        temperature: divides the logits, > 0.

    Returns:
        One tensor [length] per response, group by group, in the order given; float32, or float64 for float64 models.

    Raises:
        ValueError: if a prompt or a response is empty, or a layout is asked of a model that cannot.
    """
    if not groups:
        return []
    rows = choose_layout(model, groups) if layout == "auto" else layout
    if tokens_per_batch is None:
        batches = [list(range(len(groups)))]
    else:
        batches = split_by_tokens(groups, tokens_per_batch, rows)
    by_group: dict[int, list[Tensor]] = {}
    for batch in batches:
        packed = pack([groups[index] for index in batch], rows)
        pieces = iter(packed.split(packed_scores(model, packed, tile=tile, temperature=temperature).logps))
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


def packed_scores(
    model: nn.Module,
    packed: PackedResponses,
    *,
    tile: int | None = None,
    temperature: float = 1.0,
    statistics: bool = False,
) -> TokenScores:
    """Score the targets of a packed batch in one forward pass.

    Args:
        model: as in `response_logps`.
        packed: what `pack` made.
        tile: tokens whose logits are held at a time, >= 1; None takes as many as fit into 256 MiB.
        temperature: divides the logits, > 0.
        statistics: also return entropy and greedy match of each target.
    """
    if temperature <= 0 or (tile is not None and tile < 1):
        raise ValueError(f"temperature must be > 0 and tile at least 1; got {temperature} and {tile}")
    base = base_model(model)
    support = _support(model)
    if packed.spans and checkpoints_layers(base):
        raise ValueError("gradient checkpointing recomputes layers outside of the packed layout; use 'shared' with it")
    obstacle = support.packed if packed.spans else support.shared
    if packed.shares_prompt and depends_on_length(base, int(packed.position_ids.max()) + 1):
        obstacle = "its rotary embeddings depend on the length of a text, which is above their window"
    if packed.shares_prompt and obstacle is not None:
        raise ValueError(
            f"{_name(base)} cannot share a prompt between responses: {obstacle}; pack with layout='padded'"
        )
    mode: HeadMode = "fused"
    if support.gathered is not None:
        support.warn_once("gathered", f"{_name(base)}: computing logits at every position, since {support.gathered}")
        mode = "full"
    elif support.fused is not None:
        support.warn_once("fused", f"{_name(base)}: computing all logits of a batch at once, since {support.fused}")
        mode = "gathered"
    return _forward(model, packed, mode, tile, temperature, statistics)


def choose_layout(model: nn.Module, groups: Sequence[Group]) -> RowLayout:
    """Choose the fastest layout that a model computes exactly."""
    base, support = base_model(model), _support(model)
    if depends_on_length(base, max(len(prompt) + len(r) for prompt, responses in groups for r in responses)):
        return "padded"
    if computes_packed_rows(model):
        return "packed"
    if support.shared is not None and any(len(responses) > 1 for _, responses in groups):
        support.warn_once(
            "shared", f"{_name(base)} computes prompts once per response (layout 'padded'), since {support.shared}"
        )
    return "shared" if support.shared is None and sharing_pays(base, groups) else "padded"


def sharing_pays(base: PreTrainedModel, groups: Sequence[Group]) -> bool:
    """Whether rows that share prompts, with a dense mask, cost less than padded rows without one."""
    hidden_size = getattr(base.config.get_text_config(), "hidden_size", None)
    return sharing_gain(groups, hidden_size) >= SHARING_PAYS_FROM


# ---- the forward pass ----------------------------------------------------------------------------------------------

HeadMode = Literal["full", "gathered", "fused"]


def _forward(
    model: nn.Module,
    packed: PackedResponses,
    mode: HeadMode,
    tile: int | None = None,
    temperature: float = 1.0,
    statistics: bool = False,
) -> TokenScores:
    base = base_model(model)
    packed = packed.to(embedding(base).device)
    head = _head(base)

    def run() -> Tensor:
        with attending(base, packed):
            return cast(Tensor, model(**model_inputs(base, packed), use_cache=False).logits)

    def choose(hidden: Tensor) -> Tensor:
        return hidden.flatten(0, 1).index_select(0, packed.predictors)

    if mode == "full":
        return _plain_scores(choose(run()), packed.targets, temperature, statistics)
    if mode == "gathered":
        with before_head(head, choose):
            return _plain_scores(run(), packed.targets, temperature, statistics)
    if type(head) is not nn.Linear:
        raise ValueError(f"its head is a {type(head).__name__}")

    scored: list[TokenScores] = []

    def score(hidden: Tensor) -> Tensor:
        rule = logit_rule(base, temperature)
        scored.append(
            score_tokens(
                choose(hidden), head.weight, packed.targets, bias=head.bias, rule=rule, tile=tile, statistics=statistics
            )
        )
        return hidden[:1, :1]

    with before_head(head, score):
        logits = run()
    (scores,) = scored
    if logits.requires_grad and isinstance(base, FSDPModule):
        # FSDP starts its backward pass at the outputs of the model, so they have to be in the graph
        return replace(scores, logps=scores.logps + 0.0 * logits.sum())
    return scores


def _plain_scores(logits: Tensor, targets: Tensor, temperature: float, statistics: bool) -> TokenScores:
    """Scores from logits that are there in full, [tokens, vocabulary]; what the fused head computes in tiles."""
    logits = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    logps = -F.cross_entropy(logits, targets, reduction="none")
    if not statistics:
        return TokenScores(logps)
    with torch.no_grad():
        entropy: Tensor = torch.special.entr(logits.softmax(-1)).sum(-1)
        return TokenScores(logps, entropy, logits.argmax(-1) == targets)


@contextmanager
def before_head(head: nn.Module | None, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change what enters the head, for one forward pass.

    A hook, and not a call of trunk and head one by one: whatever wraps the model (FSDP, PEFT) and whatever it does to
    its logits (scales, soft caps) stays in force.
    """

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        del module
        return (change(args[0]), *args[1:])

    assert head is not None, "_probe finds models without a head"
    handle = head.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def attending(base: PreTrainedModel, packed: PackedResponses) -> AbstractContextManager[None]:
    """Give a model the attention that a batch needs, for one forward pass."""
    return attending_in_segments(base) if packed.spans else nullcontext()


def model_inputs(base: PreTrainedModel, packed: PackedResponses) -> dict[str, Any]:
    """Arguments of a forward pass over a packed batch."""
    if not packed.shares_prompt and rotary_window(base) is not None:
        # each row's own length
        return {"input_ids": packed.input_ids, "position_ids": packed.position_ids}
    if not packed.shares_prompt:
        # nothing sees the filling at the right of a causal row, so that no mask is needed and the fast kernels apply
        return {"input_ids": packed.input_ids}
    dtype = embedding(base).dtype

    def mask(window: int | None) -> Tensor:
        if packed.spans:
            return segments(packed.spans, packed.input_ids.device, window)
        return attention_mask(packed, dtype, window)

    masks = masks_by_layer(base, mask)
    return {"input_ids": packed.input_ids, "position_ids": packed.position_ids, "attention_mask": masks}


def masks_by_layer(base: PreTrainedModel, mask: Callable[[int | None], Tensor]) -> Tensor | dict[str, Tensor]:
    """Make the masks that the layers of a model take; ``mask`` makes one for a window in tokens, None for no window."""
    config = base.config.get_text_config()
    window, layer_types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None) or ()
    if "sliding_attention" in layer_types:
        return {"full_attention": mask(None), "sliding_attention": mask(window)}
    # layer types, none of them sliding: the window is not in use (Qwen); no layer types: it is everywhere (Mistral)
    return mask(None if layer_types else window)


def logit_rule(base: PreTrainedModel, temperature: float) -> LogitRule:
    """What the model does to its logits behind the head; `_probe` verifies the guess."""
    config = base.config.get_text_config()
    # Cohere multiplies, Granite divides, Gemma caps
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return LogitRule(scale, getattr(config, "final_logit_softcapping", None), temperature)


def checkpoints_layers(base: PreTrainedModel) -> bool:
    """Whether layers run again in the backward pass, when `attending_in_segments` is over."""
    # what transformers calls is_gradient_checkpointing up to 5.x, and is_activation_checkpointing later
    return base.training and any(getattr(module, "gradient_checkpointing", False) for module in base.modules())


def computes_packed_rows(model: nn.Module, longest: int = 0) -> bool:
    """Whether a model computes rows of several texts, of ``longest`` tokens at most, by `attending_in_segments`."""
    if depends_on_length(base_model(model), longest):
        return False
    return _support(model).packed is None and not checkpoints_layers(base_model(model))


def head_on_chosen_positions(model: nn.Module) -> nn.Module | None:
    """The head of a model that computes logits for whatever positions it is given; None if it must see them all."""
    return _head(base_model(model)) if _support(model).gathered is None else None


def logits_at(model: nn.Module, head: nn.Module | None, places: Tensor, **inputs: object) -> Tensor:
    """Logits at chosen places of flattened rows, [places, vocabulary]; the head, if one is given, sees no other.

    Args:
        model: a causal language model.
        head: what `head_on_chosen_positions` found, asked for before the attention of the model is exchanged.
        places: flat indices into [rows * length].
        inputs: of the forward pass.
    """

    def choose(hidden: Tensor) -> Tensor:
        return hidden.flatten(0, 1).index_select(0, places)[None]

    if head is None:
        return choose(model(**inputs).logits)[0]
    with before_head(head, choose):
        return cast(Tensor, model(**inputs).logits)[0]


# ---- what a model can do -------------------------------------------------------------------------------------------


@dataclass
class _Support:
    """Obstacles, None where there are none: to the head on chosen positions, fused, and to prompts shared in rows."""

    gathered: str | None
    fused: str | None
    shared: str | None
    packed: str | None
    warned: set[str] = field(default_factory=set)

    def warn_once(self, what: str, message: str) -> None:
        if what not in self.warned:
            self.warned.add(what)
            warnings.warn(message, stacklevel=3)


_SUPPORT: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], _Support]] = WeakKeyDictionary()


def _support(model: nn.Module) -> _Support:
    """Probe a model on its first use; again when its attention kernel, dtype or device has changed."""
    base = base_model(model)
    weight = embedding(base)
    circumstances = (base.config._attn_implementation, weight.dtype, weight.device.type)
    known = _SUPPORT.get(base)
    rotary_window(base)
    if known is None or known[0] != circumstances:
        known = _SUPPORT[base] = (circumstances, _probe(model, weight.dtype, weight.device.type))
    return known[1]


def _probe(model: nn.Module, dtype: torch.dtype, device: str) -> _Support:
    """Compare every shortcut with the plain forward of the model on five random responses.

    All ranks run the same forward passes, whatever their data, so that sharded models do not hang.
    """
    base = base_model(model)
    groups = probe_groups(base.config.get_text_config().vocab_size)
    padded = pack(groups, "padded")
    tile = len(padded.targets) // 3
    with evaluating(model.modules()), torch.autocast(device, enabled=False):
        rows = [pack([(prompt, [r])], "padded") for prompt, responses in groups for r in responses]
        alone = torch.cat([_forward(model, row, "full").logps for row in rows])
        full = _forward(model, padded, "full").logps
        # sqrt(eps) is far above rounding and far below what a wrong mask does. TF32 and sharded mixed precision round
        # more than the dtype of the weights tells; the effect of mere padding shows how much
        floor = 3 * math.sqrt(torch.finfo(dtype).eps)
        tolerance = max(floor, min(4 * _distance(full, alone), 0.1))

        def obstacle(packed: PackedResponses, mode: HeadMode, expected: Tensor) -> str | None:
            try:
                found = _forward(model, packed, mode, tile).logps
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever third-party model code raises: reported in the warning
                return f"its forward pass raised {type(error).__name__}: {error}"
            if found.shape != expected.shape:
                return f"its logits do not follow the positions given to the head ({tuple(found.shape)})"
            difference = _distance(found, expected)
            return None if difference <= tolerance else f"log-probabilities are off by {difference:.2g} nats"

        gathered = obstacle(padded, "gathered", full) if _head(base) is not None else "it names no head"
        fused = gathered or obstacle(padded, "fused", full)
        reason = cannot_share(base)
        mode: HeadMode = "gathered" if gathered is None else "full"
        shared = reason or takes_no_mask(base) or obstacle(pack(groups, "shared"), mode, alone)
        one_row = reason or obstacle(pack(groups, "packed"), mode, alone)
    return _Support(gathered, fused, shared, one_row)


def cannot_share(base: PreTrainedModel) -> str | None:
    """Reasons that need no forward pass, and that a half-precision probe could overlook in an untrained model."""
    unknown = set(getattr(base.config.get_text_config(), "layer_types", None) or ())
    unknown -= {"full_attention", "sliding_attention"}
    if base._is_stateful:
        return "it has recurrent layers, which carry one response into the next"
    if unknown:
        return f"it has layers of type {', '.join(sorted(unknown))}"
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return "its forward pass takes no position_ids"
    return None


def takes_no_mask(base: PreTrainedModel) -> str | None:
    kernel = base.config.get_text_config()._attn_implementation
    if kernel in ("eager", "sdpa"):
        return None
    return f"its attention {kernel!r} takes no dense mask; load it with attn_implementation='sdpa'"


def probe_groups(vocab_size: int) -> list[Group]:
    generator = torch.Generator().manual_seed(0)  # leaves the global random state alone

    def ids(length: int) -> list[int]:
        return cast(list[int], torch.randint(vocab_size, (length,), generator=generator).tolist())

    return [(ids(16), [ids(6), ids(8), ids(3)]), (ids(11), [ids(4), ids(9)])]


def _distance(left: Tensor, right: Tensor) -> float:
    difference = (left.double() - right.double()).abs().max().item()
    return difference if math.isfinite(difference) else math.inf


def base_model(model: nn.Module) -> PreTrainedModel:
    if isinstance(model, PreTrainedModel):
        return model
    peft_model = cast(Any, model)
    if peft_model.active_peft_config.is_prompt_learning:
        raise ValueError(
            "prompt-learning adapters put virtual tokens before the prompt and are not supported; use LoRA or another "
            "adapter that leaves the sequence alone"
        )
    return cast(PreTrainedModel, peft_model.get_base_model())


def embedding(base: PreTrainedModel) -> Tensor:
    return cast(Tensor, base.get_input_embeddings().weight)


def _head(base: PreTrainedModel) -> nn.Module | None:
    return cast("nn.Module | None", base.get_output_embeddings())  # type: ignore[no-untyped-call]


def _name(base: PreTrainedModel) -> str:
    return f"{type(base).__name__} (model type {base.config.model_type!r})"
