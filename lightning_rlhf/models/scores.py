"""Scalar scores of responses, as reward and value models give them, with each prompt computed once for all responses.

The score of a response is a linear function of the hidden state of its last token, so that the layouts of
`lightning_rlhf.models.logprobs` apply, and the only head is one product per response.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_rlhf.models.logprobs import (
    Layout,
    attending,
    base_model,
    cannot_share,
    checkpoints_layers,
    embedding,
    model_inputs,
    probe_groups,
    sharing_pays,
    takes_no_mask,
)
from lightning_rlhf.models.modes import evaluating
from lightning_rlhf.models.shared_prefix import Group, PackedResponses, RowLayout, pack, split_by_tokens


def response_scores(
    trunk: nn.Module,
    head: Callable[[Tensor], Tensor],
    groups: Sequence[Group],
    *,
    layout: Layout = "auto",
    tokens_per_batch: int | None = None,
) -> Tensor:
    """Score each response by a head with one output; [responses]. See `head_outputs`."""
    return head_outputs(trunk, head, groups, layout=layout, tokens_per_batch=tokens_per_batch).view(-1)


def head_outputs(
    trunk: nn.Module,
    head: Callable[[Tensor], Tensor],
    groups: Sequence[Group],
    *,
    layout: Layout = "auto",
    tokens_per_batch: int | None = None,
) -> Tensor:
    """Apply a head to the hidden state of the last token of each response.

    Args:
        trunk: a decoder of transformers without its head (``AutoModel``, or ``base_model`` of a causal LM or a sequence
            classifier), or a PeftModel of one; carries gradient if enabled.
        head: maps [responses, width] to [responses, k].
        groups: prompts with their responses, as token ids; neither may be empty. Responses end as they are: no EOS is
            looked for.
        layout: as in `lightning_rlhf.models.logprobs.response_logps`.
        tokens_per_batch: positions per forward pass at most; None puts everything in one.

    Returns:
        What the head says, group by group in the order given, [responses, k]; float32 at least. Without any groups
        there is one column.

    Raises:
        ValueError: if a prompt or a response is empty, or a layout is asked of a model that cannot.
    """
    if not groups:
        return torch.zeros(0, 1)
    layouts = _layouts(trunk)
    if layout == "auto":
        rows: RowLayout = "padded"
        if "packed" in layouts:
            rows = "packed"
        elif "shared" in layouts and sharing_pays(base_model(trunk), groups):
            rows = "shared"
    elif layout not in layouts:
        raise ValueError(f"{type(base_model(trunk)).__name__} cannot compute layout {layout!r} exactly; use 'auto'")
    else:
        rows = layout
    batches = [list(range(len(groups)))]
    if tokens_per_batch is not None:
        batches = split_by_tokens(groups, tokens_per_batch, rows)
    by_group: dict[int, Tensor] = {}
    for batch in batches:
        packed = pack([groups[i] for i in batch], rows)
        scores: Tensor = head(_last_states(trunk, packed))
        scores = scores if scores.dtype == torch.float64 else scores.float()
        by_group |= dict(zip(batch, torch.split(scores, [len(groups[i][1]) for i in batch]), strict=True))
    return torch.cat([by_group[i] for i in range(len(groups))])


def _last_states(trunk: nn.Module, packed: PackedResponses) -> Tensor:
    """Hidden state of the last token of each response, [responses, width]."""
    base = base_model(trunk)
    packed = packed.to(embedding(base).device)
    with attending(base, packed):
        hidden = trunk(**model_inputs(base, packed), use_cache=False).last_hidden_state
    return cast(Tensor, hidden.flatten(0, 1).index_select(0, packed.ends))


_LAYOUTS: WeakKeyDictionary[nn.Module, tuple[object, frozenset[RowLayout]]] = WeakKeyDictionary()


def _layouts(trunk: nn.Module) -> frozenset[RowLayout]:
    """Layouts that a trunk computes exactly, found out on its first use by comparison with single rows."""
    base = base_model(trunk)
    weight = embedding(base)
    circumstances = (base.config._attn_implementation, weight.dtype, weight.device.type)
    known = _LAYOUTS.get(base)
    if known is None or known[0] != circumstances:
        known = _LAYOUTS[base] = (circumstances, _probe(trunk, weight))
    return known[1] - {"packed"} if checkpoints_layers(base) else known[1]


def _probe(trunk: nn.Module, weight: Tensor) -> frozenset[RowLayout]:
    base = base_model(trunk)
    groups = probe_groups(base.config.get_text_config().vocab_size)
    found: set[RowLayout] = {"padded"}
    candidates: list[RowLayout] = []
    if cannot_share(base) is None:
        candidates = ["packed"] if takes_no_mask(base) else ["packed", "shared"]
    with evaluating(trunk.modules()), torch.autocast(weight.device.type, enabled=False):
        alone = torch.cat([_last_states(trunk, pack([(p, [r])], "padded")) for p, rs in groups for r in rs])
        size = alone.double().abs().max().item()
        for layout in candidates:
            try:
                states = _last_states(trunk, pack(groups, layout))
            except torch.OutOfMemoryError:
                raise
            except Exception:  # whatever third-party model code raises: this layout is not for it
                continue
            distance = (states.double() - alone.double()).abs().max().item()
            if distance <= 3 * torch.finfo(weight.dtype).eps ** 0.5 * max(size, 1.0):
                found.add(layout)
    return frozenset(found)
