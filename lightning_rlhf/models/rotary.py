"""Rotary embeddings that depend on the length of a text: each row turned by its own length, not by its neighbours'.

``rope_type: longrope`` has one set of frequencies up to a window and another beyond, ``dynamic`` a set for each length.
transformers chooses by the longest row of a batch, and ``dynamic`` also by the longest of earlier batches, so that the
numbers of a row depend on what else is computed. Alone and in a fresh model, a row has the numbers that it has here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


_WINDOWS: WeakKeyDictionary[nn.Module, tuple[int, bool] | None] = WeakKeyDictionary()


def rotary_window(model: PreTrainedModel) -> int | None:
    """Tokens up to which the length of a row changes nothing; None where it never does.

    On its first use the rotary embeddings of the model are made to look at each row by itself.
    """
    found = _window_and_kind(model)
    return None if found is None else found[0]


def depends_on_length(model: PreTrainedModel, longest: int) -> bool:
    """Whether a row of so many tokens is beyond `rotary_window`: it then shares no prompt with other rows."""
    window = rotary_window(model)
    return window is not None and longest > window


def changes_while_decoding(model: PreTrainedModel, prompts: Sequence[int], new_tokens: int) -> bool:
    """Whether keys of earlier tokens, as a cache holds them, become wrong on the way.

    Args:
        model: the model.
        prompts: tokens of each prompt.
        new_tokens: tokens that are drawn at most.
    """
    found = _window_and_kind(model)
    if found is None:
        return False
    window, two_sets = found
    # with two sets of frequencies, only a text that begins within the window and ends beyond changes them
    return any(n + new_tokens > window and not (two_sets and n > window) for n in prompts)


def _window_and_kind(model: PreTrainedModel) -> tuple[int, bool] | None:
    """The window, and whether there is one set of frequencies for all that is longer."""
    if model not in _WINDOWS:
        modules = [m for m in model.modules() if _kinds(m)]
        for module in modules:
            if not isinstance(module, _OwnLength):
                # a class, and no closure: a copy of the model must not compute with this module
                kind = type(module)
                module.__class__ = type(kind.__name__, (_OwnLength, kind), {"__module__": kind.__module__})
        windows = [_window(m, layer, kind) for m in modules for layer, kind in _kinds(m).items()]
        two_sets = all(kind == "longrope" for m in modules for kind in _kinds(m).values())
        _WINDOWS[model] = (min(windows), two_sets) if windows else None
    return _WINDOWS[model]


class _OwnLength(nn.Module):
    """Put before the class of a rotary embedding: computes rows of different lengths one length at a time."""

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        kinds = _kinds(self)
        layer = options.get("layer_type", args[0] if args else None)
        layer = layer if layer in kinds else None
        if layer not in kinds or position_ids.dim() != 2:
            return cast(tuple[Tensor, Tensor], super().forward(x, position_ids, *args, **options))
        window = _window(self, layer, kinds[layer])
        lengths = [length + 1 for length in position_ids.amax(-1).tolist()]
        # what decides on the frequencies
        deciding = [length > window if kinds[layer] == "longrope" else max(length, window) for length in lengths]

        def turned(positions: Tensor) -> tuple[Tensor, Tensor]:
            self._forget()
            return cast(tuple[Tensor, Tensor], super(_OwnLength, self).forward(x, positions, *args, **options))

        if len(set(deciding)) <= 1:
            return turned(position_ids)
        cos: list[Tensor] = [x] * len(lengths)
        sin = list(cos)
        for value in dict.fromkeys(deciding):
            rows = [row for row, other in enumerate(deciding) if other == value]
            for row, c, s in zip(rows, *turned(position_ids[rows]), strict=True):
                cos[row], sin[row] = c, s
        return torch.stack(cos), torch.stack(sin)

    def _forget(self) -> None:
        """Undo what a longer text has changed."""
        state = cast(Any, self)
        for name, original in list(self.named_buffers(recurse=False)):
            if not name.endswith("original_inv_freq"):
                continue
            prefix = name.removesuffix("original_inv_freq")
            cached = f"{prefix}max_seq_len_cached"
            if getattr(self, cached, state.max_seq_len_cached) != state.original_max_seq_len:
                setattr(self, f"{prefix}inv_freq", original.clone())
                setattr(self, cached, state.original_max_seq_len)


def _kinds(module: nn.Module) -> dict[str | None, str]:
    """Kinds of rotary embedding that depend on length, by type of layer; None where all layers have one."""
    declared = getattr(module, "rope_type", None)
    if not hasattr(module, "original_max_seq_len"):
        return {}
    by_layer: dict[str | None, Any] = dict(declared) if isinstance(declared, dict) else {None: declared}
    return {layer: kind for layer, kind in by_layer.items() if kind == "longrope" or "dynamic" in str(kind)}


def _window(module: nn.Module, layer: str | None, kind: str) -> int:
    known = cast(Any, module)
    if kind != "longrope":
        return int(known.original_max_seq_len)
    parameters = known.config.rope_parameters
    return int((parameters if layer is None else parameters[layer])["original_max_position_embeddings"])
