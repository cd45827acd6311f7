"""Scalar scores of responses, as reward and value models give them, with each prompt computed once for all responses.

The score of a response is a linear function of the hidden state of its last token, so that the layouts of
`lightning_rlhf.models.logprobs` apply, and the only head is one product per response.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from lightning_rlhf.models.rotary import depends_on_length
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
    found: dict[int, Tensor] = {}
    for batch, packed in _batches(trunk, groups, layout, tokens_per_batch):
        scores = _single(head(_states(trunk, packed, packed.ends)))
        found |= dict(zip(batch, torch.split(scores, [len(groups[i][1]) for i in batch]), strict=True))
    return torch.cat([found[i] for i in range(len(groups))]) if groups else torch.zeros(0, 1)


def response_values(
    trunk: nn.Module,
    head: Callable[[Tensor], Tensor],
    groups: Sequence[Group],
    *,
    layout: Layout = "auto",
    tokens_per_batch: int | None = None,
) -> list[Tensor]:
    """Value of the state before each response token: a head on the hidden states that predict the tokens.

    Args:
        trunk: as in `head_outputs`, like the others.
        head: maps [tokens, width] to [tokens, 1].
        groups: prompts with their responses.
        layout: see there.
        tokens_per_batch: see there.

    Returns:
        One tensor [length] per response, group by group, in the order given; float32 at least.
    """
    found: dict[int, list[Tensor]] = {}
    for batch, packed in _batches(trunk, groups, layout, tokens_per_batch):
        pieces = iter(packed.split(_single(head(_states(trunk, packed, packed.predictors))).view(-1)))
        found |= {i: [next(pieces) for _ in groups[i][1]] for i in batch}
    return [values for i in range(len(groups)) for values in found[i]]


def _batches(
    trunk: nn.Module, groups: Sequence[Group], layout: Layout, tokens_per_batch: int | None
) -> Iterator[tuple[list[int], PackedResponses]]:
    """Numbers of the groups of each forward pass, and the groups in the layout that fits the trunk."""
    if not groups:
        return
    layouts = _layouts(trunk)
    if depends_on_length(base_model(trunk), max(len(p) + len(r) for p, responses in groups for r in responses)):
        layouts = frozenset({"padded"})
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
    for batch in batches:
        yield batch, pack([groups[i] for i in batch], rows)


def _single(outputs: Tensor) -> Tensor:
    """In float32, unless it is float64."""
    return outputs if outputs.dtype == torch.float64 else outputs.float()


def _states(trunk: nn.Module, packed: PackedResponses, places: Tensor) -> Tensor:
    """Hidden states at flat indices into the rows, [places, width]."""
    base = base_model(trunk)
    packed = packed.to(embedding(base).device)
    with attending(base, packed):
        hidden = trunk(**model_inputs(base, packed), use_cache=False).last_hidden_state
    return cast(Tensor, hidden.flatten(0, 1).index_select(0, places.to(hidden.device)))


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
        rows = [pack([(p, [r])], "padded") for p, rs in groups for r in rs]
        alone = torch.cat([_states(trunk, row, row.ends) for row in rows])
        size = alone.double().abs().max().item()
        for layout in candidates:
            try:
                packed = pack(groups, layout)
                states = _states(trunk, packed, packed.ends)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # whatever third-party model code raises: this layout is not for it
                continue
            distance = (states.double() - alone.double()).abs().max().item()
            if distance <= 3 * torch.finfo(weight.dtype).eps ** 0.5 * max(size, 1.0):
                found.add(layout)
    return frozenset(found)
