"""Log-probabilities of responses under a causal language model: exact, without padding or repeated prompts.

Three optimizations: no padding (`attention`), one computation of a prompt for all its responses (`shared_prefix`), and
the output head only at positions that predict response tokens (`head`). Each model is probed on its first use: an
optimization whose result differs from the plain forward pass (recurrent layers, custom attention, an unusual head) is
switched off for that model.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Literal, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from lightning_rlhf.logprobs.attention import attending_in_segments, segments
from lightning_rlhf.logprobs.eval_mode import evaluating
from lightning_rlhf.logprobs.exactness import ProbeCache, largest_difference, reason_against, rounding_tolerance
from lightning_rlhf.logprobs.head import LogitRule, TokenScores, score_tokens
from lightning_rlhf.logprobs.packing import (
    Group,
    PackedResponses,
    RowLayout,
    attention_mask,
    longest_text,
    pack,
    sharing_gain,
    split_by_tokens,
)
from lightning_rlhf.models.rotary import depends_on_length, rotary_window


Layout = Literal["auto", "packed", "shared", "padded"]

MIN_SHARING_GAIN = 1.05
"""Smallest `sharing_gain` at which rows with a dense mask share prompts; below, the mask costs more than it saves."""


def response_logps(
    model: nn.Module,
    groups: Sequence[Group],
    *,
    layout: Layout = "auto",
    tokens_per_batch: int | None = None,
    tile: int | None = None,
    temperature: float = 1.0,
) -> list[Tensor]:
    """Compute log p(token | prompt, earlier tokens) of every response token, nats.

    Args:
        model: a causal language model of transformers, or a PeftModel of one; carries gradient if enabled.
        groups: prompts with their responses, as token ids; neither may be empty.
        layout: ``"packed"`` computes a prompt once per group, without padding. ``"shared"`` computes a prompt once per
            group, in padded rows. ``"padded"`` computes it once per response. ``"auto"`` packs if the model supports
            it, else shares if the model supports it and `sharing_gain` is at least 1.05.
        tokens_per_batch: maximum number of positions per forward pass. Default: one forward pass for all. Under FSDP
            leave it None, since all ranks must run the same number of forward passes.
        tile: tokens whose logits are in memory at a time, >= 1. Default: as many as fit into 256 MiB.
        temperature: divides the logits, > 0.

    Returns:
        One tensor [length] per response, group by group, in the given order; float32, or float64 for float64 models.

    Raises:
        ValueError: if a prompt or a response is empty, or the model does not support the layout.
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
        for index in batch:
            by_group[index] = list(islice(pieces, len(groups[index][1])))
    # batches are sorted by length: back to the order of the groups
    return list(chain.from_iterable(by_group[index] for index in range(len(groups))))


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
        packed: a batch made by `pack`.
        tile: tokens whose logits are in memory at a time, >= 1. Default: as many as fit into 256 MiB.
        temperature: divides the logits, > 0.
        statistics: also return entropy and greedy match of each target.

    Raises:
        ValueError: if temperature or tile is out of range, or the model does not support the layout of the batch.
    """
    if temperature <= 0 or (tile is not None and tile < 1):
        raise ValueError(f"temperature must be > 0 and tile at least 1; got {temperature} and {tile}")
    base = base_model(model)
    support = _support(model)
    # the backward pass runs the layers again, when `attending` has already restored the attention function
    if packed.spans and checkpoints_layers(base):
        raise ValueError("gradient checkpointing recomputes layers outside of the packed layout; use 'shared' with it")
    obstacle = support.packed if packed.spans else support.shared
    # the window first: reading a number from a GPU waits for it, which no other model needs
    windowed = packed.shares_prompt and rotary_window(base) is not None
    if windowed and depends_on_length(base, int(packed.position_ids.max()) + 1):
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
    """Choose the fastest layout that a model computes exactly.

    Args:
        model: as in `response_logps`.
        groups: prompts with their responses, as token ids.
    """
    base, support = base_model(model), _support(model)
    # beyond the window, each length has rotary frequencies of its own
    if depends_on_length(base, longest_text(groups)):
        return "padded"
    if computes_packed_rows(model):
        return "packed"
    if support.shared is not None and any(len(responses) > 1 for _, responses in groups):
        support.warn_once(
            "shared", f"{_name(base)} computes prompts once per response (layout 'padded'), since {support.shared}"
        )
    return "shared" if support.shared is None and sharing_pays(base, groups) else "padded"


def sharing_pays(base: PreTrainedModel, groups: Sequence[Group]) -> bool:
    """Whether rows that share prompts, with a dense mask, cost less than padded rows without a mask."""
    hidden_size = getattr(base.config.get_text_config(), "hidden_size", None)
    return sharing_gain(groups, hidden_size) >= MIN_SHARING_GAIN


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
    """Run one forward pass and score the targets; the arguments are those of `packed_scores`.

    Args:
        model: as in `response_logps`.
        packed: the batch.
        mode: ``"full"`` computes logits at every position, ``"gathered"`` at the predictors, ``"fused"`` at the
            predictors in tiles.
        tile: see `packed_scores`.
        temperature: see `packed_scores`.
        statistics: see `packed_scores`.
    """
    base = base_model(model)
    packed = packed.to(embedding(base).device)
    head = _head(base)

    def run() -> Tensor:
        with attending(base, packed):
            return cast(Tensor, model(**model_inputs(base, packed), use_cache=False).logits)

    def choose(hidden: Tensor) -> Tensor:
        # [rows, length, width] -> [tokens, width], the positions that predict response tokens
        return hidden.flatten(0, 1).index_select(0, packed.predictors)

    if mode == "full":
        return _plain_scores(choose(run()), packed.targets, temperature, statistics)
    if mode == "gathered":
        with before_head(head, choose):
            return _plain_scores(run(), packed.targets, temperature, statistics)
    # a subclass may compute something else than W h + b, which `score_tokens` computes from the weights; PEFT's wrapper
    # of a head that is trained whole (original_module) gives those in use
    if type(getattr(head, "original_module", head)) is not nn.Linear:
        raise ValueError(f"its head is a {type(head).__name__}")
    linear = cast(nn.Linear, head)

    scored: list[TokenScores] = []

    def score(hidden: Tensor) -> Tensor:
        rule = logit_rule(base, temperature)
        scored.append(
            score_tokens(
                choose(hidden),
                linear.weight,
                packed.targets,
                bias=linear.bias,
                rule=rule,
                tile=tile,
                statistics=statistics,
            )
        )
        # the scores are computed: let the model's own head run on a single position
        return hidden[:1, :1]

    with before_head(head, score):
        logits = run()
    (scores,) = scored
    if logits.requires_grad and isinstance(base, FSDPModule):
        # FSDP registers its backward hooks on the outputs of the model, so that they must be in the graph
        return replace(scores, logps=scores.logps + 0.0 * logits.sum())
    return scores


def _plain_scores(logits: Tensor, targets: Tensor, temperature: float, statistics: bool) -> TokenScores:
    """Scores from the full logits, [tokens, vocabulary]; the fused head computes the same in tiles."""
    logits = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    # log p(y) = z_y - logsumexp(z)
    logps = -F.cross_entropy(logits, targets, reduction="none")
    if not statistics:
        return TokenScores(logps)
    # metrics without a gradient: autograd would keep the softmax, [tokens, vocabulary], for the backward pass
    with torch.no_grad():
        # H = -sum_v p_v log p_v
        entropy: Tensor = torch.special.entr(logits.softmax(-1)).sum(-1)
        return TokenScores(logps, entropy, logits.argmax(-1) == targets)


@contextmanager
def before_head(head: nn.Module | None, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change the input of the head, for one forward pass.

    A hook rather than separate calls of trunk and head: wrappers of the model (FSDP, PEFT) and changes of the logits
    after the head (scales, soft caps) remain active.

    Args:
        head: the output head.
        change: maps the hidden states to those that enter the head.
    """

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        del module
        return (change(args[0]), *args[1:])

    assert head is not None, "_probe finds models without a head"
    handle = head.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def attending(base: PreTrainedModel, packed: PackedResponses) -> AbstractContextManager[None]:
    """Set the attention function that a batch needs, for one forward pass."""
    return attending_in_segments(base) if packed.spans else nullcontext()


def model_inputs(base: PreTrainedModel, packed: PackedResponses) -> dict[str, Tensor | dict[str, Tensor]]:
    """Arguments of a forward pass over a packed batch."""
    if not packed.shares_prompt and rotary_window(base) is not None:
        # each row's own length
        return {"input_ids": packed.input_ids, "position_ids": packed.position_ids}
    if not packed.shares_prompt:
        # causal attention never sees padding on the right: without a mask, the fast kernels apply
        return {"input_ids": packed.input_ids}
    dtype = embedding(base).dtype

    def mask(window: int | None) -> Tensor:
        if packed.spans:
            return segments(packed.spans, packed.input_ids.device, window)
        return attention_mask(packed, dtype, window)

    masks = masks_by_layer(base, mask)
    return {"input_ids": packed.input_ids, "position_ids": packed.position_ids, "attention_mask": masks}


def masks_by_layer(base: PreTrainedModel, mask: Callable[[int | None], Tensor]) -> Tensor | dict[str, Tensor]:
    """Make the attention masks of all layers of a model.

    Args:
        base: the model.
        mask: makes the mask of a sliding window in tokens; None is full attention.
    """
    config = base.config.get_text_config()
    window, layer_types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None) or ()
    if "sliding_attention" in layer_types:
        return {"full_attention": mask(None), "sliding_attention": mask(window)}
    # with layer types, none of them sliding, the window is unused (Qwen); without, it holds for all layers (Mistral)
    return mask(None if layer_types else window)


def logit_rule(base: PreTrainedModel, temperature: float) -> LogitRule:
    """Scale and soft cap of a model's logits, from its config, with a temperature; `_probe` verifies them."""
    config = base.config.get_text_config()
    # Cohere multiplies, Granite divides, Gemma caps
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return LogitRule(scale, getattr(config, "final_logit_softcapping", None), temperature)


def checkpoints_layers(base: PreTrainedModel) -> bool:
    """Whether the layers run again in the backward pass (gradient checkpointing)."""
    # not the property of transformers: is_gradient_checkpointing up to 5.x, is_activation_checkpointing later
    return base.training and any(getattr(module, "gradient_checkpointing", False) for module in base.modules())


def computes_packed_rows(model: nn.Module, longest: int = 0) -> bool:
    """Whether a model computes packed rows, of ``longest`` tokens at most, exactly with `attending_in_segments`."""
    if depends_on_length(base_model(model), longest):
        return False
    return _support(model).packed is None and not checkpoints_layers(base_model(model))


def head_on_chosen_positions(model: nn.Module) -> nn.Module | None:
    """The head of a model, if it can run on selected positions only; else None."""
    return _head(base_model(model)) if _support(model).gathered is None else None


def logits_at(model: nn.Module, head: nn.Module | None, places: Tensor, **inputs: object) -> Tensor:
    """Logits at selected positions of flattened rows, [places, vocabulary].

    Args:
        model: a causal language model.
        head: result of `head_on_chosen_positions`, called before the attention function of the model is changed. With
            None, the model computes logits at all positions.
        places: flat indices into [rows * length].
        inputs: arguments of the forward pass.
    """

    def choose(hidden: Tensor) -> Tensor:
        # [rows, length, width] -> [1, places, width]
        return hidden.flatten(0, 1).index_select(0, places)[None]

    if head is None:
        return choose(model(**inputs).logits)[0]
    with before_head(head, choose):
        return cast(Tensor, model(**inputs).logits)[0]


def packed_logits(model: nn.Module, packed: PackedResponses) -> Tensor:
    """Logits of every response token's distribution, [tokens, vocabulary]; float32, or float64 for float64 models.

    Memory grows with the vocabulary: `packed_scores` needs less where the log-probabilities of the tokens suffice.

    Args:
        model: a causal language model of transformers, or a PeftModel of one; carries gradient if enabled.
        packed: a batch made by `pack`, in a layout that `choose_layout` returns or ``"padded"``.
    """
    base = base_model(model)
    packed = packed.to(embedding(base).device)
    # before `attending`, since it probes the model at its first use
    head = head_on_chosen_positions(model)
    with attending(base, packed):
        logits = logits_at(model, head, packed.predictors, **model_inputs(base, packed), use_cache=False)
    return logits if logits.dtype == torch.float64 else logits.float()


# ---- optimizations that a model supports ---------------------------------------------------------------------------


@dataclass
class _Support:
    """Reasons against each optimization; None where it is exact.

    Args:
        gathered: against the head on selected positions.
        fused: against the fused head of `score_tokens`.
        shared: against the layout ``"shared"``.
        packed: against the layout ``"packed"``.
        warned: optimizations that the user was warned about.
    """

    gathered: str | None
    fused: str | None
    shared: str | None
    packed: str | None
    warned: set[str] = field(default_factory=set)

    def warn_once(self, optimization: str, message: str) -> None:
        """Warn about a missing optimization, once per model."""
        if optimization not in self.warned:
            self.warned.add(optimization)
            warnings.warn(message, stacklevel=3)


def _support(model: nn.Module) -> _Support:
    """Optimizations that a model supports; see `ProbeCache` for when it is probed."""
    base = base_model(model)
    # on its first use this changes the rotary embeddings, so that each row depends on its own length alone
    rotary_window(base)
    return _SUPPORT(model, base)


def _probe(model: nn.Module) -> _Support:
    """Compare every optimization with the plain forward pass of the model on five random responses.

    All ranks run the same forward passes, independent of their data, so that sharded models do not hang.
    """
    base = base_model(model)
    weight = embedding(base)
    groups = probe_groups(base.config.get_text_config().vocab_size)
    padded = pack(groups, "padded")
    # three tiles, so that the probe compares the fused head across tiles, too
    tile = len(padded.targets) // 3
    # dropout would make two equal computations differ; under autocast the tolerance, which is that of the
    # data type of the weights, would be too small
    with evaluating(model.modules()), torch.autocast(weight.device.type, enabled=False):
        rows: list[PackedResponses] = []
        for prompt, responses in groups:
            rows.extend(pack([(prompt, [response])], "padded") for response in responses)
        # the ground truth: each response in a forward pass of its own
        alone = torch.cat([_forward(model, row, "full").logps for row in rows])
        full = _forward(model, padded, "full").logps
        # TF32 and sharded mixed precision round more than the data type of the weights: the effect of padding alone
        # shows how much
        tolerance = max(rounding_tolerance(weight.dtype), min(4 * largest_difference(full, alone), 0.1))

        def compare(packed: PackedResponses, mode: HeadMode, expected: Tensor) -> str | None:
            found = _forward(model, packed, mode, tile).logps
            if found.shape != expected.shape:
                return f"its logits do not follow the positions given to the head ({tuple(found.shape)})"
            difference = largest_difference(found, expected)
            return None if difference <= tolerance else f"log-probabilities are off by {difference:.2g} nats"

        def obstacle(packed: PackedResponses, mode: HeadMode, expected: Tensor) -> str | None:
            return reason_against(lambda: compare(packed, mode, expected))

        gathered = obstacle(padded, "gathered", full) if _head(base) is not None else "it names no head"
        # the fused head runs on gathered positions: where gathering fails, it fails for the same reason
        fused = gathered or obstacle(padded, "fused", full)
        reason = cannot_share(base)
        mode: HeadMode = "gathered" if gathered is None else "full"
        shared = reason or takes_no_mask(base) or obstacle(pack(groups, "shared"), mode, alone)
        one_row = reason or obstacle(pack(groups, "packed"), mode, alone)
    return _Support(gathered, fused, shared, one_row)


_SUPPORT = ProbeCache(_probe)


def cannot_share(base: PreTrainedModel) -> str | None:
    """Reason against shared prompts that needs no forward pass, or None.

    A probe in half precision could miss these on an untrained model.
    """
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
    """Reason against dense attention masks, or None."""
    kernel = base.config.get_text_config()._attn_implementation
    if kernel in ("eager", "sdpa"):
        return None
    return f"its attention {kernel!r} takes no dense mask; load it with attn_implementation='sdpa'"


def probe_groups(vocab_size: int) -> list[Group]:
    """Two prompts with three and two random responses, the same at every call."""
    generator = torch.Generator().manual_seed(0)  # the global random state does not change

    def ids(length: int) -> list[int]:
        return cast(list[int], torch.randint(vocab_size, (length,), generator=generator).tolist())

    return [(ids(16), [ids(6), ids(8), ids(3)]), (ids(11), [ids(4), ids(9)])]


def base_model(model: nn.Module) -> PreTrainedModel:
    """The model of transformers below a PEFT wrapper, or the model itself.

    Raises:
        ValueError: if the adapter is a prompt-learning one.
    """
    if isinstance(model, PreTrainedModel):
        return model
    # or a trunk with adapters, which has the same two attributes
    peft_model = cast(PeftModel, model)
    if peft_model.active_peft_config.is_prompt_learning:
        raise ValueError(
            "prompt-learning adapters put virtual tokens before the prompt and are not supported; use LoRA or another "
            "adapter that leaves the sequence alone"
        )
    return cast(PreTrainedModel, peft_model.get_base_model())


def embedding(base: PreTrainedModel) -> Tensor:
    """Input embedding, [vocabulary, width]; its device and data type are those of the model."""
    return cast(Tensor, base.get_input_embeddings().weight)


def _head(base: PreTrainedModel) -> nn.Module | None:
    """Output head of a model, if it names one."""
    return cast("nn.Module | None", base.get_output_embeddings())  # type: ignore[no-untyped-call]


def _name(base: PreTrainedModel) -> str:
    """Class and model type, for messages."""
    return f"{type(base).__name__} (model type {base.config.model_type!r})"
