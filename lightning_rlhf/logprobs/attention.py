"""Attention without padding: every response of a packed row attends to its own prompt and to itself only.

A packed row concatenates the groups of a batch, ``[p1 | r11 | r12 | p2 | r21 | ...]``. The other layers process one
long row without padding. Attention runs the kernel of torch once per response, on exactly the keys that the response
attends to, so that no mask over the whole row is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel


NAME = "lightning_rlhf_segments"

Span = tuple[int, tuple[int, ...]]
"""Length of a prompt, and lengths of the responses that follow it in the row, tokens."""


Node = tuple[int, int]
"""Length of a node of a prefix tree, tokens, and index of its parent; -1 for the beginning of a text."""


def segments(
    spans: Sequence[Span], device: torch.device, window: int | None = None, nodes: Sequence[Node] = ()
) -> Tensor:
    """Make an attention mask that carries ``spans`` through a transformers model to `segment_attention`.

    Args:
        spans: the segments of the row.
        device: device of the model's inputs.
        window: sliding window in tokens, the query's own included; not all models pass theirs to the attention
            function. Default: full attention.
        nodes: instead of ``spans``, the nodes of a row that is a prefix tree, parents before their children.
    """
    # transformers passes a mask of four dimensions on unchanged; its value is not used
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
    **options: object,
) -> tuple[Tensor, None]:
    """Attend within the segments of one packed row; an attention function for transformers.

    Args:
        module: the attention layer.
        query: [1, heads, tokens, width].
        key: [1, key-value heads, tokens, width].
        value: [1, key-value heads, tokens, width of values].
        attention_mask: a mask made by `segments`.
        scaling: factor on the scores. Default: 1 / sqrt(width).
        dropout: dropout probability of attention weights.
        options: further arguments of the model.

    Returns:
        [1, tokens, heads, width of values], and None for the attention weights.

    Raises:
        ValueError: if the mask carries no segments, or the model uses an unsupported option. The probe of the caller
            then chooses another layout.
    """
    spans: Sequence[Span] | None = getattr(attention_mask, "spans", None)
    # these are not applied below: the attention of such a model would be wrong without them
    unknown = [name for name in ("softcap", "position_bias", "s_aux") if options.get(name) is not None]
    if spans is None or unknown:
        raise ValueError(f"segment attention cannot run this layer: {unknown or 'the segments did not reach it'}")
    grouped = query.shape[1] != key.shape[1]
    window: int | None = vars(attention_mask)["window"]

    def attend(q: Tensor, k: Tensor, v: Tensor, prompt: int) -> Tensor:
        """Attention of one piece; its keys start with ``prompt`` tokens that its queries do not have."""
        # query i attends to keys 0 .. prompt + i: causal, aligned at the lower right corner
        rows, columns = q.shape[2], k.shape[2]
        mask: Tensor | None = None
        # a window of at least all keys hides none of them: no dense mask is needed
        if window is not None and columns > window:
            mask = _window(rows, columns, window, q.device)
        elif prompt and q.is_cuda:
            mask = causal_lower_right(rows, columns)  # flash kernels support it without a dense matrix
        elif prompt:
            mask = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(prompt)
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
        return attended.transpose(1, 2)

    nodes: Sequence[Node] = vars(attention_mask)["nodes"]
    if nodes:
        return torch.cat(_along_branches(nodes, query, key, value, attend), 1), None
    # the first response runs in one causal piece with its prompt
    # lengths of the pieces: [prompt + r1, r2, ..., rk] per group
    lengths: list[int] = []
    for prompt, (first, *others) in spans:
        lengths += [prompt + first, *others]
    # one split, not a slice per piece: the gradient of every slice would be as long as the whole row
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
    """Attention of a prefix tree: the keys of a node are those of all its ancestors, and its own."""
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
        # leaves need not keep their keys
        before.append((k, v) if number in parents else None)
        outputs.append(attend(q, k, v, prompt))
    return outputs


@contextmanager
def attending_in_segments(base: PreTrainedModel) -> Iterator[None]:
    """Switch a model to `segment_attention` for one forward pass."""
    # layers may read the text config or the outer one, which can be the same object
    configs: list[PreTrainedConfig] = list({id(c): c for c in (base.config, base.config.get_text_config())}.values())
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        yield
    finally:
        # also after an error: a probe catches it and goes on with other layouts
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name


def _window(rows: int, columns: int, window: int, device: torch.device) -> Tensor:
    """Causal mask [rows, columns] of the last ``rows`` positions with a sliding window; true is visible."""
    # 0 <= query position - key position < window
    distance = torch.arange(columns - rows, columns, device=device)[:, None] - torch.arange(columns, device=device)
    return (distance >= 0) & (distance < window)


AttentionInterface.register(NAME, segment_attention)
