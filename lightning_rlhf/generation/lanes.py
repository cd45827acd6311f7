"""Lanes: a lane is one sequence under one model. A PILAF response has two lanes, a vanilla response has one.

Lanes with the same weights run in one batch. This includes policy and reference if they differ by a LoRA adapter only:
a gate per row then switches the adapter on or off.
"""

from __future__ import annotations

import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal, cast
from weakref import WeakSet

import torch
import torch._dynamo
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_rlhf.generation.base import Request
from lightning_rlhf.generation.slots import SlotCache
from lightning_rlhf.logprobs.compute import (
    base_model,
    cannot_share,
    embedding,
    head_on_chosen_positions,
    logits_at,
    masks_by_layer,
)
from lightning_rlhf.logprobs.eval_mode import evaluating
from lightning_rlhf.logprobs.exactness import ProbeCache, largest_difference, nearly_equal, reason_against
from lightning_rlhf.models.rotary import changes_while_decoding, rotary_window
from lightning_rlhf.randomness import Key
from lightning_rlhf.types import Prompt


Name = Literal["policy", "reference"]

MAX_GRAPHS = 256
"""Maximum number of compiled shapes, over all models."""

SMALL_PADDING = 16
"""Padding tokens that are always acceptable in a prefill batch, however short the prompt."""


@dataclass(eq=False)
class Row:
    """One response that is being decoded.

    Args:
        request: its request.
        uniforms: one random number in [0, 1) per token.
        done: whether it has ended, by EOS or at the length limit.
        ids: tokens so far.
        logps: log-probabilities of these tokens under each model that the row runs, nats.
    """

    request: Request
    uniforms: list[float]
    done: bool = False
    ids: list[int] = field(default_factory=list)
    logps: dict[Name, list[float]] = field(default_factory=lambda: {"policy": [], "reference": []})

    @property
    def names(self) -> tuple[Name, ...]:
        """Models that this row needs."""
        # (1 + mix) h_theta - mix h_ref: at 0 and -1 one of the two coefficients vanishes
        mix = self.request.mix
        return ("policy",) if mix == 0 else ("reference",) if mix == -1 else ("policy", "reference")


@dataclass(eq=False)
class Lane:
    """A row under one of the two models."""

    row: Row
    name: Name

    @property
    def prompt(self) -> tuple[int, ...]:
        """Token ids of the prompt."""
        return self.row.request.prompt.ids

    @property
    def length(self) -> int:
        """Tokens so far."""
        return len(self.prompt) + len(self.row.ids)


class AbstractLanes(ABC):
    """A batch of sequences under the same weights, with the logits of their next tokens.

    Args:
        use: context manager that returns the model for a forward pass.
        gate: switches the adapter per row: true is the policy, false the reference. None if all lanes are of one model.
        tokens_per_batch: token positions per forward pass over prompts.
        compiled: compile decoding steps; only for lanes with a cache and without a gate.
    """

    def __init__(
        self,
        use: Callable[[], AbstractContextManager[PreTrainedModel]],
        gate: Callable[[Tensor], None] | None = None,
        tokens_per_batch: int = 4096,
        compiled: bool = False,
    ) -> None:
        self.use, self.gate, self.tokens_per_batch, self.compiled = use, gate, tokens_per_batch, compiled
        self.lanes: list[Lane] = []
        self.logits: Tensor = torch.empty(0)
        """Next-token logits in float32 or better, [lanes, vocabulary]."""

    @abstractmethod
    def admit(self, lanes: Sequence[Lane]) -> None:
        """Add lanes that have no token beyond their prompt yet."""

    @abstractmethod
    def advance(self) -> None:
        """Run one decoding step: feed each lane the newest token of its row."""

    @abstractmethod
    def release(self) -> None:
        """Remove the lanes of finished rows; the order of the others may change."""

    def record(self) -> None:
        """Append the log-probability of each row's newest token, at temperature 1."""
        # log p(token) = logit - logsumexp(logits)
        tokens = torch.tensor([lane.row.ids[-1] for lane in self.lanes], device=self.logits.device)
        # logits [lanes, vocabulary], tokens [lanes, 1] -> [lanes]
        logps = self.logits.gather(-1, tokens[:, None]).squeeze(-1) - self.logits.logsumexp(-1)
        for lane, logp in zip(self.lanes, logps.tolist(), strict=True):
            lane.row.logps[lane.name].append(logp)

    def _open_gate(self, names: Sequence[Name], device: torch.device) -> None:
        if self.gate is not None:
            self.gate(torch.tensor([name == "policy" for name in names], device=device))


class SlotLanes(AbstractLanes):
    """Lanes with a KV cache: a step computes one position per lane, and equal prompts are prefilled once."""

    def __init__(
        self,
        use: Callable[[], AbstractContextManager[PreTrainedModel]],
        gate: Callable[[Tensor], None] | None = None,
        tokens_per_batch: int = 4096,
        compiled: bool = False,
    ) -> None:
        super().__init__(use, gate, tokens_per_batch, compiled)
        self.cache: SlotCache | None = None

    def admit(self, lanes: Sequence[Lane]) -> None:
        distinct = list(dict.fromkeys((lane.prompt, lane.name) for lane in lanes))
        while distinct:
            width = len(distinct[0][0])
            count = max(1, self.tokens_per_batch // width)
            # prompts are sorted, longest first; one that would be padded by more than a quarter starts a new batch
            similar = [width - len(prompt) <= max(width // 4, SMALL_PADDING) for prompt, _ in distinct[:count]]
            count = similar.index(False) if False in similar else count
            chosen, distinct = distinct[:count], distinct[count:]
            place = {key: i for i, key in enumerate(chosen)}
            self._prefill([lane for lane in lanes if (lane.prompt, lane.name) in place], place)

    def _prefill(self, lanes: Sequence[Lane], place: dict[tuple[tuple[int, ...], Name], int]) -> None:
        """Run the prompts in one forward pass and copy their keys and values into the slots of the lanes.

        Args:
            lanes: new lanes.
            place: row of each distinct prompt and model in the forward pass.
        """
        prompts = [prompt for prompt, _ in place]
        with self.use() as model:
            device = embedding(base_model(model)).device
            # padding on the right, which causal attention never sees: no mask is needed
            ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.long)
            for i, prompt in enumerate(prompts):
                ids[i, : len(prompt)] = torch.tensor(prompt)
            last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
            if self.cache is None:
                self.cache = SlotCache(base_model(model).config.get_text_config().num_hidden_layers)
            # keys and values stay aside until `take` below assigns slots
            self.cache.prefilling()
            self._open_gate([name for _, name in place], device)
            inputs: dict[str, Tensor] = {}
            if rotary_window(base_model(model)) is not None:
                # rotary frequencies depend on the length of a row; padding at position 0 adds nothing to it
                columns = torch.arange(ids.shape[1], device=device).expand(len(prompts), -1)
                inputs["position_ids"] = columns.masked_fill(columns > last[:, None], 0)
            logits = last_logits(model, ids.to(device), last, past_key_values=self.cache, use_cache=True, **inputs)
        first = len(self.lanes)
        # lanes of equal prompts copy the same row of the prefill
        sources = torch.tensor([place[lane.prompt, lane.name] for lane in lanes], device=device)
        self.lanes += lanes
        # one position more than the longest prompt: the first decoding step writes there
        self.cache.reserve(len(self.lanes), ids.shape[1] + 1)
        self.cache.take(torch.arange(first, len(self.lanes), device=device), sources)
        # [prompts, vocabulary] -> [new lanes, vocabulary]; self.logits is a placeholder before the first lane
        self.logits = torch.cat([self.logits, logits[sources]]) if first else logits[sources]

    def advance(self) -> None:
        assert self.cache is not None
        lengths = [lane.length for lane in self.lanes]
        tokens = [lane.row.ids[-1] for lane in self.lanes]
        # few compiled shapes: pad the batch to a power of two with rows that write one token into unused slots
        padding = (1 << (len(lengths) - 1).bit_length()) - len(lengths) if self.compiled else 0
        self.cache.reserve(len(lengths) + padding, max(lengths))
        # compiled steps attend to the whole capacity, whose few values keep the compiled shapes few; the mask
        # hides the positions that a row has not written
        longest = self.cache.capacity if self.compiled else max(lengths)
        with self.use() as model:
            base = base_model(model)
            device = embedding(base).device
            ids = torch.tensor(tokens + [0] * padding, device=device)[:, None]
            # position of the newest token = length - 1; rows of the padding have position 0
            positions = torch.tensor(lengths + [1] * padding, device=device) - 1
            self.cache.decoding(positions, longest)
            self._open_gate([lane.name for lane in self.lanes], device)
            step = compiled_step if self.compiled else decoding_step
            logits = step(model, ids, positions, _masks(base, positions, longest), self.cache)
        # without the rows of the padding
        self.logits = _at_least_float32(logits[: len(lengths)])

    def release(self) -> None:
        assert self.cache is not None
        kept = [i for i, lane in enumerate(self.lanes) if not lane.row.done]
        if len(kept) == len(self.lanes):
            return
        # compact the slots: lanes from the end move into the slots of finished lanes
        order = list(range(len(kept)))
        movers = [i for i in kept if i >= len(kept)]
        gaps = [i for i in order if self.lanes[i].row.done]
        for gap, mover in zip(gaps, movers, strict=True):
            order[gap] = mover
        if movers:
            # later positions of the movers are unwritten: copy these alone, not the whole capacity
            length = max(self.lanes[i].length for i in movers)
            device = self.logits.device
            self.cache.move(torch.tensor(gaps, device=device), torch.tensor(movers, device=device), length)
        self.lanes = [self.lanes[i] for i in order]
        self.logits = self.logits[torch.tensor(order, device=self.logits.device, dtype=torch.long)]


class RecomputedLanes(AbstractLanes):
    """Lanes of a model that does not support the slot cache: every step recomputes the whole sequence. Exact, slow."""

    def admit(self, lanes: Sequence[Lane]) -> None:
        self.lanes += lanes
        self.advance()

    def advance(self) -> None:
        pieces = []
        with self.use() as model:
            device = embedding(base_model(model)).device
            for lane in self.lanes:
                # one sequence at a time: no padding, which such models may not ignore
                ids = torch.tensor([[*lane.prompt, *lane.row.ids]], device=device)
                self._open_gate([lane.name], device)
                pieces.append(_at_least_float32(model(input_ids=ids, use_cache=False).logits[:, -1]))
        self.logits = torch.cat(pieces)

    def release(self) -> None:
        kept = [i for i, lane in enumerate(self.lanes) if not lane.row.done]
        self.lanes = [self.lanes[i] for i in kept]
        self.logits = self.logits[torch.tensor(kept, device=self.logits.device, dtype=torch.long)]


def decoding_step(
    model: PreTrainedModel, ids: Tensor, positions: Tensor, mask: Tensor | dict[str, Tensor], cache: SlotCache
) -> Tensor:
    """Logits of the next token of each row, [rows, vocabulary]."""
    output = model(
        input_ids=ids, position_ids=positions[:, None], attention_mask=mask, past_key_values=cache, use_cache=True
    )
    return cast(Tensor, output.logits[:, -1])


def compiled_step(
    model: PreTrainedModel, ids: Tensor, positions: Tensor, mask: Tensor | dict[str, Tensor], cache: SlotCache
) -> Tensor:
    """Run `decoding_step` compiled, once per model and shape; on a GPU with one CUDA graph per shape."""
    if ids.is_cuda:
        cache.fix_addresses()
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
    # one graph per batch size and length; beyond torch's default limit, it would run without compilation
    with torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS):
        logits = _compiled(ids.device.type)(model, ids, positions, mask, cache)
    # clone, since the next run of a CUDA graph overwrites its output
    return logits.clone() if ids.is_cuda else logits


@functools.cache
def _compiled(device_type: str) -> Callable[..., Tensor]:
    mode = "reduce-overhead" if device_type == "cuda" else "default"
    return cast(Callable[..., Tensor], torch.compile(decoding_step, dynamic=False, mode=mode))


def lanes_for(model: PreTrainedModel, prompts: Sequence[int] = (), new_tokens: int = 0) -> type[AbstractLanes]:
    """Type of lanes that a model computes exactly.

    Checked at the first use of the model by comparison with plain forward passes, and again after its attention
    implementation, data type or device has changed.

    Args:
        model: the model.
        prompts: tokens of each prompt.
        new_tokens: tokens that are sampled at most.
    """
    base = base_model(model)
    if changes_while_decoding(base, prompts, new_tokens):
        if base not in _WARNED:
            _WARNED.add(base)
            warnings.warn(
                f"{type(base).__name__} decodes without a cache, every token from the start: its rotary embeddings "
                f"depend on the length of a text beyond {rotary_window(base)} tokens. Lower "
                f"data.prompt_options.max_prompt_tokens and data.decoding.max_new_tokens to stay within them",
                stacklevel=2,
            )
        return RecomputedLanes
    return _KINDS(model, base)


_WARNED: WeakSet[PreTrainedModel] = WeakSet()


def _probe(model: nn.Module) -> type[AbstractLanes]:
    """Type of lanes that a model computes exactly, with a warning if it is the slow one."""
    obstacle = _obstacle(cast(PreTrainedModel, model))
    if obstacle is None:
        return SlotLanes
    base = base_model(model)
    warnings.warn(
        f"{type(base).__name__} (model type {base.config.model_type!r}) decodes without a cache, so that "
        f"every step recomputes the whole sequence, since {obstacle}",
        stacklevel=4,
    )
    return RecomputedLanes


_KINDS = ProbeCache(_probe)


def _obstacle(model: PreTrainedModel) -> str | None:
    """Reason why a model cannot use the slot cache, or None.

    Decodes three tokens for three prompts of different lengths with both types of lanes. One row ends early, so that
    the compaction of slots is checked, too.
    """
    base = base_model(model)
    reason = cannot_share(base)
    if reason is not None:
        return reason
    if base.config._attn_implementation not in ("eager", "sdpa"):
        return f"its attention {base.config._attn_implementation!r} takes no dense mask; load it with 'sdpa'"
    vocabulary = base.config.get_text_config().vocab_size
    rows = []
    for length in (9, 2, 5):
        prompt = tuple(j * 7 % vocabulary for j in range(length))
        rows.append(Row(Request(Prompt(0, prompt, ""), Key(())), []))
    weight = embedding(base)

    class Same(AbstractContextManager[PreTrainedModel]):
        def __enter__(self) -> PreTrainedModel:
            return model

        def __exit__(self, *_: object) -> None:
            return None

    def compare() -> str | None:
        fast, slow = SlotLanes(Same), RecomputedLanes(Same)
        for kind in (fast, slow):
            kind.admit([Lane(row, "policy") for row in rows])
        for step in range(3):
            # slot lanes change their order when a row ends
            slow_index = {id(lane.row): i for i, lane in enumerate(slow.lanes)}
            order = [slow_index[id(lane.row)] for lane in fast.lanes]
            expected = slow.logits[order]
            if not nearly_equal(fast.logits, expected, weight.dtype):
                return f"its logits with the slot cache are off by {largest_difference(fast.logits, expected):.2g}"
            for row in rows:
                row.ids.append((step + len(row.ids)) % vocabulary)
            rows[0].done = step == 1
            for kind in (fast, slow):
                kind.release()
                kind.advance()
        return None

    # the tolerance is that of the data type of the weights, so autocast must not compute in another one
    with evaluating(model.modules()), torch.autocast(weight.device.type, enabled=False):
        return reason_against(compare)


def last_logits(model: PreTrainedModel, ids: Tensor, last: Tensor, **options: object) -> Tensor:
    """Logits at one position per row, [rows, vocabulary]; the head runs on these positions only, if it can.

    Args:
        model: a causal language model.
        ids: token ids, padded on the right; [rows, length].
        last: position of the last token of each row; [rows].
        options: further arguments of the forward pass.
    """
    # flat index row * length + position
    places = torch.arange(len(last), device=last.device) * ids.shape[1] + last
    return _at_least_float32(logits_at(model, head_on_chosen_positions(model), places, input_ids=ids, **options))


def _masks(base: PreTrainedModel, positions: Tensor, length: int) -> Tensor | dict[str, Tensor]:
    """Additive masks [rows, 1, 1, length] of one decoding step: a row attends to its past and itself."""
    dtype = embedding(base).dtype
    # distance = position of the query - position of the key, [rows, length]
    distance = positions[:, None] - torch.arange(length, device=positions.device)

    def mask(window: int | None) -> Tensor:
        # visible: 0 <= distance < window
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        zeros = torch.zeros(hidden.shape, dtype=dtype, device=positions.device)
        # [rows, length] -> [rows, 1, 1, length], broadcast over heads and the one query of a step
        return zeros.masked_fill_(hidden, torch.finfo(dtype).min)[:, None, None]

    return masks_by_layer(base, mask)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
