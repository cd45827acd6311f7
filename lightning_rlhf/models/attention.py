"""Attention without padding: every response of a packed row attends to its own prompt and to itself, nothing else.

A packed row holds the groups of a batch one behind the other, ``[p1 | r11 | r12 | p2 | r21 | ...]``. The layers around
attention see one long row with no filling; attention runs the kernel of torch once per response, on exactly the keys
that the response may see, so that neither a mask over the whole row nor a padded square is ever computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel


NAME = "lightning_rlhf_segments"

Span = tuple[int, tuple[int, ...]]
"""Tokens of a prompt, and of each of the responses that follow it in the row."""


Node = tuple[int, int]
"""Tokens of a piece of text, and the number of the piece it continues; -1 where it begins a text."""


def segments(
    spans: Sequence[Span], device: torch.device, window: int | None = None, nodes: Sequence[Node] = ()
) -> Tensor:
    """Make the attention mask argument that carries ``spans`` through a transformers model to `segment_attention`.

    A tensor of four dimensions reaches the attention function as it is; its values mean nothing.

    Args:
        spans: the segments of the row.
        device: device of the model's inputs.
        window: sliding window in tokens, the query's own included; None for full attention. Models do not all hand
            theirs to the attention function.
        nodes: instead of ``spans``, the pieces of a row that is a tree of texts, parents before their children.
    """
    carrier = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
    vars(carrier).update(spans=tuple(spans), window=window, nodes=tuple(nodes))
    return carrier


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend within the segments of one packed row; an attention function of transformers.

    Args:
        module: the attention layer.
        query: [1, heads, tokens, width].
        key: [1, key-value heads, tokens, width].
        value: [1, key-value heads, tokens, width of values].
        attention_mask: what `segments` made.
        scaling: factor on the scores; 1 / sqrt(width) when not given.
        dropout: share of attention weights dropped.
        options: whatever else the model passes.

    Returns:
        [1, tokens, heads, width of values], and None for the attention weights.

    Raises:
        ValueError: if the mask carries no segments, or the model asks for what this kernel has not: the caller's probe
            then takes another layout.
    """
    spans: Sequence[Span] | None = getattr(attention_mask, "spans", None)
    unknown = [name for name in ("softcap", "position_bias", "s_aux") if options.get(name) is not None]
    if spans is None or unknown:
        raise ValueError(f"segment attention cannot run this layer: {unknown or 'the segments did not reach it'}")
    grouped = query.shape[1] != key.shape[1]
    window: int | None = vars(attention_mask)["window"]

    def attend(q: Tensor, k: Tensor, v: Tensor, prompt: int) -> Tensor:
        """Attention of one response: the keys hold the prompt before it, unless the queries hold the prompt as well."""
        rows, columns = q.shape[2], k.shape[2]
        mask: Any = None
        if window is not None and columns > window:
            mask = _window(rows, columns, window, q.device)
        elif prompt and q.is_cuda:
            mask = causal_lower_right(rows, columns)  # the flash kernels know this one without a matrix
        elif prompt:
            mask = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(prompt)
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
        return attended.transpose(1, 2)

    nodes: Sequence[Node] = vars(attention_mask)["nodes"]
    if nodes:
        return torch.cat(_along_branches(nodes, query, key, value, attend), 1), None
    # the first response runs in one causal piece with its prompt. One split for all pieces: the gradient of a slice is
    # a row of zeros as long as the whole
    lengths = [n for prompt, (first, *others) in spans for n in (prompt + first, *others)]
    pieces = zip(*(torch.split(t, lengths, 2) for t in (query, key, value)), strict=True)
    outputs = []
    for prompt, (_, *others) in spans:
        q, k, v = next(pieces)
        outputs.append(attend(q, k, v, 0))
        prompt_key, prompt_value = k[:, :, :prompt], v[:, :, :prompt]
        for _ in others:
            q, k, v = next(pieces)
            outputs.append(attend(q, torch.cat([prompt_key, k], 2), torch.cat([prompt_value, v], 2), prompt))
    return torch.cat(outputs, 1), None


def _along_branches(
    nodes: Sequence[Node], query: Tensor, key: Tensor, value: Tensor, attend: Callable[..., Tensor]
) -> list[Tensor]:
    """Attention of a tree: the keys of a piece are those of all the pieces it continues, and its own."""
    lengths = [length for length, _ in nodes]
    before: list[tuple[Tensor, Tensor] | None] = []
    outputs = []
    pieces = zip(*(torch.split(t, lengths, 2) for t in (query, key, value)), strict=True)
    parents = {parent for _, parent in nodes}
    for number, ((_, parent), (q, k, v)) in enumerate(zip(nodes, pieces, strict=True)):
        past = before[parent] if parent >= 0 else None
        prompt = 0 if past is None else past[0].shape[2]
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        before.append((k, v) if number in parents else None)
        outputs.append(attend(q, k, v, prompt))
    return outputs


@contextmanager
def attending_in_segments(base: PreTrainedModel) -> Iterator[None]:
    """Let a model use `segment_attention` for one forward pass."""
    configs: list[PreTrainedConfig] = list({id(c): c for c in (base.config, base.config.get_text_config())}.values())
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name


def _window(rows: int, columns: int, window: int, device: torch.device) -> Tensor:
    """Causal mask [rows, columns] of the last ``rows`` positions, each of which sees ``window`` of them."""
    distance = torch.arange(columns - rows, columns, device=device)[:, None] - torch.arange(columns, device=device)
    return (distance >= 0) & (distance < window)


AttentionInterface.register(NAME, segment_attention)
