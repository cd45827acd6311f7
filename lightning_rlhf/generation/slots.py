"""A KV cache of slots for continuous batching: each row has its own length, and rows enter and leave at any step.

Keys and values are in preallocated buffers [slots, heads, capacity, width] that are written in place. The caches of
transformers grow by concatenation, which copies the whole cache at every token.
"""

from __future__ import annotations

from typing import cast

import torch
import torch._dynamo
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


GROWTH = 128
"""The capacity is a multiple of this many tokens."""


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, for all slots.

    The attributes ``keys`` and ``values``, [slots, heads, capacity, width], are those of transformers.
    """

    is_sliding = False  # windows are in the masks

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fresh: tuple[Tensor, Tensor] | None = None
        """Keys and values of the last prefill, not in slots yet; each [prompts, heads, tokens, width]."""
        self.positions: Tensor | None = None
        """Positions that the decoding step writes, [rows]; None during a prefill."""
        self.length = 0
        """Positions that the decoding step attends to."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: buffers are allocated by `grow`."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store the keys and values of a forward pass, and return those to attend to.

        A prefill is kept in ``fresh`` until `take` assigns slots. A decoding step writes one position per row.

        Args:
            key_states: [rows, heads, tokens, width].
            value_states: [rows, heads, tokens, width].
            args: ignored.
            kwargs: ignored.
        """
        if self.positions is None:
            self.fresh = key_states, value_states
            return self.fresh
        assert self.keys is not None and self.values is not None
        # keys[row, :, positions[row]] = new key; autocast may compute in another data type than the buffers
        # key_states [rows, heads, 1, width] -> [rows, heads, width]
        rows = len(key_states)
        index = torch.arange(rows, device=key_states.device)
        self.keys[index, :, self.positions] = key_states[:, :, 0].to(self.keys.dtype)
        self.values[index, :, self.positions] = value_states[:, :, 0].to(self.values.dtype)
        # views, no copies: [rows, heads, length, width]
        return self.keys[:rows, :, : self.length], self.values[:rows, :, : self.length]

    def take(self, slots: Tensor, sources: Tensor) -> None:
        """Copy prompts of the last prefill into slots, prompt ``sources[i]`` into slot ``slots[i]``."""
        assert self.fresh is not None and self.keys is not None and self.values is not None
        # padding of shorter prompts is copied, too; the next tokens of the slot overwrite it
        for buffer, fresh in zip((self.keys, self.values), self.fresh, strict=True):
            # fresh [prompts, heads, tokens, width] -> [slots, heads, tokens, width]
            buffer[slots, :, : fresh.shape[2]] = fresh[sources].to(buffer.dtype)
        self.fresh = None

    def move(self, targets: Tensor, sources: Tensor, length: int) -> None:
        """Copy the first ``length`` tokens of slots ``sources`` to slots ``targets``."""
        assert self.keys is not None and self.values is not None
        for buffer in (self.keys, self.values):
            buffer[targets, :, :length] = buffer[sources, :, :length]

    def grow(self, slots: int, capacity: int) -> None:
        """Enlarge the buffers to at least ``slots`` and ``capacity``; the content is kept."""
        if self.keys is None or self.values is None:
            assert self.fresh is not None
            grown = [f.new_empty(slots, f.shape[1], capacity, f.shape[3]) for f in self.fresh]
            # zeros, since masked positions must be finite: their weight is 0, and 0 * NaN is NaN
            self.keys, self.values = (buffer.zero_() for buffer in grown)
            return
        for name, old in (("keys", self.keys), ("values", self.values)):
            new = old.new_zeros(max(slots, old.shape[0]), old.shape[1], max(capacity, old.shape[2]), old.shape[3])
            new[: old.shape[0], :, : old.shape[2]] = old
            setattr(self, name, new)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys of a prefill, and the position of the first."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Tokens before a prefill: none. Decoding steps pass their own positions and masks."""
        return 0

    def get_max_length(self) -> int:
        """Maximum length: -1 means no limit."""
        return -1


class SlotCache(Cache):
    """The slot cache of a model.

    Args:
        num_layers: number of layers.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[SlotLayer() for _ in range(num_layers)])
        self.slots = 0
        self.capacity = 0

    def _written(self) -> list[SlotLayer]:
        """Layers with keys and values; layers that share the keys of another layer have none."""
        return [layer for layer in self._all() if layer.fresh is not None or layer.keys is not None]

    def _all(self) -> list[SlotLayer]:
        """All layers, typed."""
        return cast(list[SlotLayer], self.layers)

    def reserve(self, slots: int, capacity: int) -> None:
        """Make room for ``slots`` sequences of ``capacity`` tokens."""
        if slots > self.slots or capacity > self.capacity:
            self.slots = max(slots, self.slots)
            # rounded up, so that reallocation and new compiled shapes are rare
            # capacity = ceil(capacity / GROWTH) * GROWTH
            self.capacity = max(-(-capacity // GROWTH) * GROWTH, self.capacity)
            for layer in self._written():
                layer.grow(self.slots, self.capacity)

    def prefilling(self) -> None:
        """Prepare the next forward pass as a prefill."""
        for layer in self._all():
            layer.positions = None

    def decoding(self, positions: Tensor, length: int) -> None:
        """Prepare the next forward pass as a decoding step.

        Args:
            positions: position of the new token of each row; [rows].
            length: number of positions to attend to.
        """
        for layer in self._all():
            layer.positions, layer.length = positions, length

    def fix_addresses(self) -> None:
        """Mark the addresses of the buffers as static for torch.compile, a condition of CUDA graphs."""
        for layer in self._written():
            for buffer in (layer.keys, layer.values):
                torch._dynamo.mark_static_address(buffer)

    def take(self, slots: Tensor, sources: Tensor) -> None:
        """Copy prompts of the last prefill into slots, in every layer."""
        for layer in self._written():
            layer.take(slots, sources)

    def move(self, targets: Tensor, sources: Tensor, length: int) -> None:
        """Copy slots ``sources`` to slots ``targets``, in every layer."""
        for layer in self._written():
            layer.move(targets, sources, length)
