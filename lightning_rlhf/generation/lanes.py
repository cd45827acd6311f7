"""Lanes: one sequence under one model. A PILAF row is two of them, a vanilla row is one.

Lanes of the same weights run in one batch, also the policy's and the reference's when they differ by a LoRA adapter
only: a gate per row switches the adapter on or off.
"""

from __future__ import annotations

import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch._dynamo
from torch import Tensor
from transformers import PreTrainedModel

from lightning_rlhf.generation.base import Request
from lightning_rlhf.generation.slots import SlotCache
from lightning_rlhf.models.logprobs import (
    base_model,
    cannot_share,
    embedding,
    head_on_chosen_positions,
    logits_at,
    masks_by_layer,
)
from lightning_rlhf.models.modes import evaluating
from lightning_rlhf.models.rotary import changes_while_decoding, rotary_window


Name = Literal["policy", "reference"]

MOST_GRAPHS = 256
"""Compiled shapes at most, of all models together."""

SMALL_FILLING = 16
"""Tokens that a prompt may be filled up by, however short it is, before it gets a prefill of its own."""


@dataclass(eq=False)
class Row:
    """One response while it is decoded."""

    request: Request
    uniforms: list[float]
    done: bool = False
    ids: list[int] = field(default_factory=list)
    logps: dict[Name, list[float]] = field(default_factory=lambda: {"policy": [], "reference": []})

    @property
    def names(self) -> tuple[Name, ...]:
        """Models that this row needs."""
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
    """Sequences under the same weights, with the logits of their next tokens.

    Args:
        use: gives the model for a forward pass.
        gate: switches the adapter per row: true is the policy, false the reference; None where all lanes are alike.
        tokens_per_batch: token positions of one forward pass over prompts.
        compiled: compile decoding steps; lanes without a gate, on a cache, only.
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
        """Next-token logits in float32 at least, [lanes, vocabulary]."""

    @abstractmethod
    def admit(self, lanes: Sequence[Lane]) -> None:
        """Add lanes that have no token beyond their prompt yet."""

    @abstractmethod
    def advance(self) -> None:
        """Feed each lane the newest token of its row."""

    @abstractmethod
    def release(self) -> None:
        """Drop the lanes of rows that are done; the order of the others may change."""

    def record(self) -> None:
        """Note the log-probability of each row's newest token, untempered."""
        tokens = torch.tensor([lane.row.ids[-1] for lane in self.lanes], device=self.logits.device)
        logps = self.logits.gather(-1, tokens[:, None]).squeeze(-1) - self.logits.logsumexp(-1)
        for lane, logp in zip(self.lanes, logps.tolist(), strict=True):
            lane.row.logps[lane.name].append(logp)

    def _open_gate(self, names: Sequence[Name], device: torch.device) -> None:
        if self.gate is not None:
            self.gate(torch.tensor([name == "policy" for name in names], device=device))


class SlotLanes(AbstractLanes):
    """Lanes with a KV cache: a token costs one position, and equal prompts are computed once."""

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
            # longest first: those that would be filled up by more than a quarter make a pass of their own
            alike = [width - len(prompt) <= max(width // 4, SMALL_FILLING) for prompt, _ in distinct[:count]]
            count = alike.index(False) if False in alike else count
            chosen, distinct = distinct[:count], distinct[count:]
            place = {key: i for i, key in enumerate(chosen)}
            self._prefill([lane for lane in lanes if (lane.prompt, lane.name) in place], place)

    def _prefill(self, lanes: Sequence[Lane], place: dict[tuple[tuple[int, ...], Name], int]) -> None:
        prompts = [prompt for prompt, _ in place]
        with self.use() as model:
            device = embedding(base_model(model)).device
            # filled up at the right, where nothing looks, so that no mask is needed
            ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.long)
            for i, prompt in enumerate(prompts):
                ids[i, : len(prompt)] = torch.tensor(prompt)
            last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
            if self.cache is None:
                self.cache = SlotCache(base_model(model).config.get_text_config().num_hidden_layers)
            self.cache.prefilling()
            self._open_gate([name for _, name in place], device)
            inputs: dict[str, Tensor] = {}
            if rotary_window(base_model(model)) is not None:
                columns = torch.arange(ids.shape[1], device=device).expand(len(prompts), -1)
                inputs["position_ids"] = columns.masked_fill(columns > last[:, None], 0)
            logits = last_logits(model, ids.to(device), last, past_key_values=self.cache, use_cache=True, **inputs)
        first = len(self.lanes)
        sources = torch.tensor([place[lane.prompt, lane.name] for lane in lanes], device=device)
        self.lanes += lanes
        self.cache.reserve(len(self.lanes), ids.shape[1] + 1)
        self.cache.take(torch.arange(first, len(self.lanes), device=device), sources)
        self.logits = torch.cat([self.logits, logits[sources]]) if first else logits[sources]

    def advance(self) -> None:
        assert self.cache is not None
        lengths = [lane.length for lane in self.lanes]
        tokens = [lane.row.ids[-1] for lane in self.lanes]
        # compiled shapes must repeat: idle rows up to a power of two write one token into slots that nobody reads
        filling = (1 << (len(lengths) - 1).bit_length()) - len(lengths) if self.compiled else 0
        self.cache.reserve(len(lengths) + filling, max(lengths))
        longest = self.cache.capacity if self.compiled else max(lengths)
        with self.use() as model:
            base = base_model(model)
            device = embedding(base).device
            ids = torch.tensor(tokens + [0] * filling, device=device)[:, None]
            positions = torch.tensor(lengths + [1] * filling, device=device) - 1
            self.cache.decoding(positions, longest)
            self._open_gate([lane.name for lane in self.lanes], device)
            step = compiled_step if self.compiled else decoding_step
            logits = step(model, ids, positions, _masks(base, positions, longest), self.cache)
        self.logits = _at_least_float32(logits[: len(lengths)])

    def release(self) -> None:
        assert self.cache is not None
        kept = [i for i, lane in enumerate(self.lanes) if not lane.row.done]
        if len(kept) == len(self.lanes):
            return
        # the last lanes move into the gaps that others left
        order = list(range(len(kept)))
        movers = [i for i in kept if i >= len(kept)]
        gaps = [i for i in order if self.lanes[i].row.done]
        for gap, mover in zip(gaps, movers, strict=True):
            order[gap] = mover
        if movers:
            length = max(self.lanes[i].length for i in movers)
            device = self.logits.device
            self.cache.move(torch.tensor(gaps, device=device), torch.tensor(movers, device=device), length)
        self.lanes = [self.lanes[i] for i in order]
        self.logits = self.logits[torch.tensor(order, device=self.logits.device, dtype=torch.long)]


class RecomputedLanes(AbstractLanes):
    """Lanes of a model that no cache of ours fits: every token computes its whole sequence again. Exact, and slow."""

    def admit(self, lanes: Sequence[Lane]) -> None:
        self.lanes += lanes
        self.advance()

    def advance(self) -> None:
        pieces = []
        with self.use() as model:
            device = embedding(base_model(model)).device
            for lane in self.lanes:
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
    """`decoding_step`, compiled once per model and shape; on a GPU one CUDA graph each."""
    if ids.is_cuda:
        cache.fix_addresses()
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
    # one graph per number of rows and length; past the limit torch would go on without compiling
    with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS):
        logits = _compiled(ids.device.type)(model, ids, positions, mask, cache)
    # the next run of a CUDA graph overwrites its output
    return logits.clone() if ids.is_cuda else logits


@functools.cache
def _compiled(device_type: str) -> Callable[..., Tensor]:
    mode = "reduce-overhead" if device_type == "cuda" else "default"
    return cast(Callable[..., Tensor], torch.compile(decoding_step, dynamic=False, mode=mode))


def lanes_for(model: PreTrainedModel, prompts: Sequence[int] = (), new_tokens: int = 0) -> type[AbstractLanes]:
    """Kind of lanes that a model computes exactly; found out on its first use, by comparison with plain forwards.

    Args:
        model: the model.
        prompts: tokens of each prompt.
        new_tokens: tokens that are drawn at most.
    """
    base = base_model(model)
    if changes_while_decoding(base, prompts, new_tokens):
        if base not in _WARNED:
            _WARNED.add(base)
            warnings.warn(
                f"{type(base).__name__} decodes without a cache, every token from the start: its rotary embeddings "
                f"depend on the length of a text beyond {rotary_window(base)} tokens. Lower data.max_prompt_tokens and "
                f"data.decoding.max_new_tokens to stay within them",
                stacklevel=2,
            )
        return RecomputedLanes
    circumstances = (base.config._attn_implementation, embedding(base).dtype, embedding(base).device.type)
    known = _KINDS.get(base)
    if known is None or known[0] != circumstances:
        obstacle = _obstacle(model)
        if obstacle is not None:
            warnings.warn(
                f"{type(base).__name__} (model type {base.config.model_type!r}) decodes without a cache, every token "
                f"from the start, since {obstacle}",
                stacklevel=2,
            )
        known = _KINDS[base] = (circumstances, SlotLanes if obstacle is None else RecomputedLanes)
    return known[1]


_WARNED: WeakSet[PreTrainedModel] = WeakSet()

_KINDS: WeakKeyDictionary[PreTrainedModel, tuple[object, type[AbstractLanes]]] = WeakKeyDictionary()


def _obstacle(model: PreTrainedModel) -> str | None:
    """Decode three tokens for three ragged prompts both ways; one row leaves and its gap is filled on the way."""
    from lightning_rlhf.randomness import Key
    from lightning_rlhf.types import Prompt

    base = base_model(model)
    reason = cannot_share(base)
    if reason is not None:
        return reason
    if base.config._attn_implementation not in ("eager", "sdpa"):
        return f"its attention {base.config._attn_implementation!r} takes no dense mask; load it with 'sdpa'"
    vocabulary = base.config.get_text_config().vocab_size
    rows = [Row(Request(Prompt(0, tuple(j * 7 % vocabulary for j in range(n)), ""), Key(())), []) for n in (9, 2, 5)]
    weight = embedding(base)

    class Same(AbstractContextManager[PreTrainedModel]):
        def __enter__(self) -> PreTrainedModel:
            return model

        def __exit__(self, *_: object) -> None:
            return None

    with evaluating(model.modules()), torch.autocast(weight.device.type, enabled=False):
        try:
            fast, slow = SlotLanes(Same), RecomputedLanes(Same)
            for kind in (fast, slow):
                kind.admit([Lane(row, "policy") for row in rows])
            for step in range(3):
                order = [slow.lanes.index(next(s for s in slow.lanes if s.row is f.row)) for f in fast.lanes]
                difference = (fast.logits.double() - slow.logits[order].double()).abs().max().item()
                scale = max(1.0, slow.logits.abs().max().item())
                if not difference <= 3 * torch.finfo(weight.dtype).eps ** 0.5 * scale:
                    return f"its logits with a cache of ours are off by {difference:.2g}"
                for row in rows:
                    row.ids.append((step + len(row.ids)) % vocabulary)
                rows[0].done = step == 1
                for kind in (fast, slow):
                    kind.release()
                    kind.advance()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever third-party model code raises: reported in the warning
            return f"its forward pass raised {type(error).__name__}: {error}"
    return None


def last_logits(model: PreTrainedModel, ids: Tensor, last: Tensor, **options: object) -> Tensor:
    """Logits at one position per row, [rows, vocabulary]; the head sees no other where the model allows it."""
    places = torch.arange(len(last), device=last.device) * ids.shape[1] + last
    return _at_least_float32(logits_at(model, head_on_chosen_positions(model), places, input_ids=ids, **options))


def _masks(base: PreTrainedModel, positions: Tensor, length: int) -> Tensor | dict[str, Tensor]:
    """Additive masks [rows, 1, 1, length] of one decoding step: a row sees its own past and itself."""
    dtype = embedding(base).dtype
    distance = positions[:, None] - torch.arange(length, device=positions.device)

    def mask(window: int | None) -> Tensor:
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        zeros = torch.zeros(hidden.shape, dtype=dtype, device=positions.device)
        return zeros.masked_fill_(hidden, torch.finfo(dtype).min)[:, None, None]

    return masks_by_layer(base, mask)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
