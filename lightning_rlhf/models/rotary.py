"""Rotary embeddings that depend on the length of a text: each row gets the frequencies of its own length.

``rope_type: longrope`` has one set of frequencies up to a window and another beyond, ``dynamic`` a set for each length.
transformers chooses by the longest row of a batch, and ``dynamic`` also by the longest of earlier batches, so that the
result of a row depends on the other rows. Here it does not: it equals that of the row alone in a fresh model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


_WINDOWS: WeakKeyDictionary[nn.Module, tuple[int, bool] | None] = WeakKeyDictionary()


def rotary_window(model: PreTrainedModel) -> int | None:
    """Number of tokens up to which the length of a row does not matter; None where it never does.

    The first call changes the rotary embeddings of the model, so that each row depends on its own length alone.
    """
    found = _window_and_kind(model)
    return None if found is None else found[0]


def depends_on_length(model: PreTrainedModel, longest: int) -> bool:
    """Whether a row of ``longest`` tokens is beyond `rotary_window`: it then shares no prompt with other rows."""
    window = rotary_window(model)
    return window is not None and longest > window


def changes_while_decoding(model: PreTrainedModel, prompts: Sequence[int], new_tokens: int) -> bool:
    """Whether the cached keys of earlier tokens become wrong while a response is sampled.

    Args:
        model: the model.
        prompts: tokens of each prompt.
        new_tokens: maximum number of sampled tokens.
    """
    found = _window_and_kind(model)
    if found is None:
        return False
    window, two_sets = found
    # with two sets of frequencies, only a text that begins within the window and ends beyond changes them
    return any(n + new_tokens > window and not (two_sets and n > window) for n in prompts)


def _window_and_kind(model: PreTrainedModel) -> tuple[int, bool] | None:
    """The window, and whether all longer texts have the same frequencies."""
    if model not in _WINDOWS:
        modules = [m for m in model.modules() if _kinds(m)]
        for module in modules:
            if not isinstance(module, _OwnLength):
                # a class, and no closure: a copy of the model must not compute with this module
                cls = type(module)
                module.__class__ = type(cls.__name__, (_OwnLength, cls), {"__module__": cls.__module__})
        windows: list[int] = []
        two_sets = True
        for module in modules:
            for layer, kind in _kinds(module).items():
                windows.append(_window(module, layer, kind))
                two_sets &= kind == "longrope"
        # beyond the smallest window some layer depends on the length
        _WINDOWS[model] = (min(windows), two_sets) if windows else None
    return _WINDOWS[model]


class _RotaryConfig(Protocol):
    rope_parameters: dict[str, object]


class _LengthState(Protocol):
    """Attributes of a rotary embedding of transformers that depends on length."""

    original_max_seq_len: int
    max_seq_len_cached: int
    config: _RotaryConfig


class _OwnLength(nn.Module):
    """Put before the class of a rotary embedding: computes rows of different lengths one length at a time."""

    def forward(self, x: Tensor, position_ids: Tensor, *args: object, **options: object) -> tuple[Tensor, Tensor]:
        kinds = _kinds(self)
        asked = cast("str | None", options.get("layer_type", args[0] if args else None))
        layer = asked if asked in kinds else None
        if layer not in kinds or position_ids.dim() != 2:
            return cast(tuple[Tensor, Tensor], super().forward(x, position_ids, *args, **options))
        window = _window(self, layer, kinds[layer])
        # length of a row = its largest position + 1; position_ids: [rows, tokens]
        lengths = [length + 1 for length in position_ids.amax(-1).tolist()]
        # rows with equal values here have equal frequencies
        deciding = [length > window if kinds[layer] == "longrope" else max(length, window) for length in lengths]

        def turned(positions: Tensor) -> tuple[Tensor, Tensor]:
            self._forget()
            return cast(tuple[Tensor, Tensor], super(_OwnLength, self).forward(x, positions, *args, **options))

        if len(set(deciding)) <= 1:
            return turned(position_ids)
        # filled below, row by row: [tokens, size of a head] each
        cos: list[Tensor] = [x] * len(lengths)
        sin = list(cos)
        for value in dict.fromkeys(deciding):
            rows = [row for row, other in enumerate(deciding) if other == value]
            for row, c, s in zip(rows, *turned(position_ids[rows]), strict=True):
                cos[row], sin[row] = c, s
        return torch.stack(cos), torch.stack(sin)

    def _forget(self) -> None:
        """Reset the frequencies, which an earlier, longer text has changed."""
        state = cast(_LengthState, self)
        for name, original in list(self.named_buffers(recurse=False)):
            if not name.endswith("original_inv_freq"):
                continue
            prefix = name.removesuffix("original_inv_freq")
            cached = f"{prefix}max_seq_len_cached"
            if getattr(self, cached, state.max_seq_len_cached) != state.original_max_seq_len:
                # a clone, since transformers may write to inv_freq in place
                setattr(self, f"{prefix}inv_freq", original.clone())
                setattr(self, cached, state.original_max_seq_len)


def _kinds(module: nn.Module) -> dict[str | None, str]:
    """Kinds of rotary embedding that depend on length, by type of layer; None where all layers have one."""
    declared = getattr(module, "rope_type", None)
    if not hasattr(module, "original_max_seq_len"):
        return {}
    by_layer: dict[str | None, object] = dict(declared) if isinstance(declared, dict) else {None: declared}
    return {layer: str(kind) for layer, kind in by_layer.items() if kind == "longrope" or "dynamic" in str(kind)}


def _window(module: nn.Module, layer: str | None, kind: str) -> int:
    state = cast(_LengthState, module)
    if kind != "longrope":
        return int(state.original_max_seq_len)
    parameters = state.config.rope_parameters
    # by type of layer, or one for all
    own = parameters if layer is None else cast(dict[str, object], parameters[layer])
    return cast(int, own["original_max_position_embeddings"])
