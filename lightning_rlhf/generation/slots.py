"""A KV cache of slots: each row of a batch has its own length, and rows come and go while the others go on.

Keys and values lie in buffers [slots, heads, capacity, width] that are written in place; growing by concatenation, as
caches of transformers do, copies everything at every token.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch._dynamo
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


GROWTH = 128
"""Capacity grows in steps of this many tokens."""


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, for all slots."""

    is_sliding = False  # windows are in the masks

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fresh: tuple[Tensor, Tensor] | None = None
        self.positions: Tensor | None = None
        """Where the decoding step writes, [rows]; None while prompts are prefilled."""
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: buffers are made when prompts are taken in."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep those of prompts aside, or write those of one token per row; return what is attended to."""
        if self.positions is None:
            self.fresh = key_states, value_states
            return self.fresh
        assert self.keys is not None and self.values is not None
        rows = len(key_states)
        index = torch.arange(rows, device=key_states.device)
        self.keys[index, :, self.positions] = key_states[:, :, 0].to(self.keys.dtype)
        self.values[index, :, self.positions] = value_states[:, :, 0].to(self.values.dtype)
        return self.keys[:rows, :, : self.length], self.values[:rows, :, : self.length]

    def take(self, slots: Tensor, sources: Tensor) -> None:
        """Put the prompts kept aside into slots, prompt ``sources[i]`` into slot ``slots[i]``."""
        assert self.fresh is not None and self.keys is not None and self.values is not None
        for buffer, fresh in zip((self.keys, self.values), self.fresh, strict=True):
            buffer[slots, :, : fresh.shape[2]] = fresh[sources].to(buffer.dtype)
        self.fresh = None

    def move(self, targets: Tensor, sources: Tensor, length: int) -> None:
        """Copy the first tokens of some slots to other slots."""
        assert self.keys is not None and self.values is not None
        for buffer in (self.keys, self.values):
            buffer[targets, :, :length] = buffer[sources, :, :length]

    def grow(self, slots: int, capacity: int) -> None:
        """Make room, keeping what is there."""
        if self.keys is None or self.values is None:
            assert self.fresh is not None
            grown = [f.new_empty(slots, f.shape[1], capacity, f.shape[3]) for f in self.fresh]
            # what was never written is masked, and must be finite all the same: 0 times NaN is NaN
            self.keys, self.values = (buffer.zero_() for buffer in grown)
            return
        for name, old in (("keys", self.keys), ("values", self.values)):
            new = old.new_zeros(max(slots, old.shape[0]), old.shape[1], max(capacity, old.shape[2]), old.shape[3])
            new[: old.shape[0], :, : old.shape[2]] = old
            setattr(self, name, new)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a prefill sees, and where they start."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Tokens before a prefill: none. Decoding steps bring their own positions and masks."""
        return 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1


class SlotCache(Cache):
    """The slots of a whole model.

    Args:
        num_layers: layers that keep keys and values.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[SlotLayer() for _ in range(num_layers)])
        self.slots = 0
        self.capacity = 0

    def _written(self) -> list[SlotLayer]:
        """Layers that have seen a prompt; layers that share the keys of others never do."""
        return [layer for layer in self._all() if layer.fresh is not None or layer.keys is not None]

    def _all(self) -> list[SlotLayer]:
        return cast(list[SlotLayer], self.layers)

    def reserve(self, slots: int, capacity: int) -> None:
        """Make room for slots of some tokens each."""
        if slots > self.slots or capacity > self.capacity:
            self.slots = max(slots, self.slots)
            self.capacity = max(-(-capacity // GROWTH) * GROWTH, self.capacity)
            for layer in self._written():
                layer.grow(self.slots, self.capacity)

    def prefilling(self) -> None:
        """The next forward pass is over prompts."""
        for layer in self._all():
            layer.positions = None

    def decoding(self, positions: Tensor, length: int) -> None:
        """The next forward pass writes one token per row at ``positions`` and attends to the first ``length``."""
        for layer in self._all():
            layer.positions, layer.length = positions, length

    def fix_addresses(self) -> None:
        """Promise the compiler that the buffers stay where they are; only then does it record CUDA graphs."""
        for layer in self._written():
            for buffer in (layer.keys, layer.values):
                torch._dynamo.mark_static_address(buffer)

    def take(self, slots: Tensor, sources: Tensor) -> None:
        """Put the prompts of the last prefill into slots."""
        for layer in self._written():
            layer.take(slots, sources)

    def move(self, targets: Tensor, sources: Tensor, length: int) -> None:
        """Copy slots over others."""
        for layer in self._written():
            layer.move(targets, sources, length)
