"""Scores of responses by reward and value models, with each prompt computed once for all responses.

A score is a linear function of the hidden state of one token: w^T h. The layouts of `lightning_rlhf.logprobs.compute`
apply, and the head runs on the chosen tokens only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from lightning_rlhf.logprobs.compute import (
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
from lightning_rlhf.logprobs.eval_mode import evaluating
from lightning_rlhf.logprobs.exactness import ProbeCache, nearly_equal, reason_against
from lightning_rlhf.logprobs.packing import Group, PackedResponses, RowLayout, longest_text, pack, split_by_tokens
from lightning_rlhf.models.rotary import depends_on_length


Pooling: TypeAlias = Literal["last", "mean", "sum", "middle"]


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
        groups: prompts with their responses, as token ids; neither may be empty. The last token of a response counts,
            whether or not it is EOS.
        layout: as in `lightning_rlhf.logprobs.compute.response_logps`.
        tokens_per_batch: maximum number of positions per forward pass. Default: one forward pass for all.

    Returns:
        Outputs of the head, group by group in the given order, [responses, k]; float32, or float64 for float64 models.
        Without groups there is one column.

    Raises:
        ValueError: if a prompt or a response is empty, or the model does not support the layout.
    """
    by_group: dict[int, Tensor] = {}
    for batch, packed in _batches(trunk, groups, layout, tokens_per_batch):
        scores = _at_least_float32(head(_states(trunk, packed, packed.ends)))
        num_responses = [len(groups[index][1]) for index in batch]
        by_group |= dict(zip(batch, torch.split(scores, num_responses), strict=True))
    # batches are sorted by length: back to the order of the groups
    return torch.cat([by_group[index] for index in range(len(groups))]) if groups else torch.zeros(0, 1)


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
        trunk: see `head_outputs`.
        head: maps [tokens, width] to [tokens, 1].
        groups: see `head_outputs`.
        layout: see `head_outputs`.
        tokens_per_batch: see `head_outputs`.

    Returns:
        One tensor [length] per response, group by group, in the given order; float32, or float64 for float64 models.
    """
    by_group: dict[int, list[Tensor]] = {}
    for batch, packed in _batches(trunk, groups, layout, tokens_per_batch):
        # V(s_t) reads the hidden state at the token before t
        values = _at_least_float32(head(_states(trunk, packed, packed.predictors)))
        # [tokens, 1] -> [tokens] -> one tensor per response
        pieces = iter(packed.split(values.view(-1)))
        for index in batch:
            by_group[index] = list(islice(pieces, len(groups[index][1])))
    return list(chain.from_iterable(by_group[index] for index in range(len(groups))))


def pooled_states(
    trunk: nn.Module,
    groups: Sequence[Group],
    pooling: Pooling,
    *,
    layout: Layout = "auto",
    tokens_per_batch: int | None = None,
) -> Tensor:
    """One vector per response, of the hidden states of its tokens.

    Args:
        trunk: see `head_outputs`.
        groups: see `head_outputs`.
        pooling: ``last`` takes the last token; ``mean`` and ``sum`` are over the tokens of the response; ``middle`` is
            the sum over tokens at the layer in the middle.
        layout: see `head_outputs`.
        tokens_per_batch: see `head_outputs`.

    Returns:
        Vectors, group by group in the given order, [responses, width]; float32, or float64 for float64 models; carries
        gradient if enabled.
    """
    by_group: dict[int, Tensor] = {}
    for batch, packed in _batches(trunk, groups, layout, tokens_per_batch):
        pooled = _at_least_float32(_pooled(trunk, packed, pooling))
        num_responses = [len(groups[index][1]) for index in batch]
        by_group |= dict(zip(batch, torch.split(pooled, num_responses), strict=True))
    width = embedding(base_model(trunk)).shape[1]
    return torch.cat([by_group[index] for index in range(len(groups))]) if groups else torch.zeros(0, width)


def _pooled(trunk: nn.Module, packed: PackedResponses, pooling: Pooling) -> Tensor:
    """One vector per response of a packed batch, [responses, width]."""
    if pooling == "last":
        return _states(trunk, packed, packed.ends)
    lengths, owners = packed.response_lengths, packed.owners
    # the tokens of a response lie in a row in all layouts: from end - length + 1 to end
    first_rows = lengths.cumsum(0) - lengths
    within = torch.arange(len(owners)) - first_rows[owners]
    places = packed.ends[owners] - lengths[owners] + 1 + within
    layers = base_model(trunk).config.get_text_config().num_hidden_layers
    # hidden_states[0] is the embedding, hidden_states[layers] the last layer
    states = _states(trunk, packed, places, max(1, layers // 2) if pooling == "middle" else None)
    sums = torch.stack([tokens.sum(0) for tokens in packed.split(states)])
    return sums / lengths.to(sums)[:, None] if pooling == "mean" else sums


def _batches(
    trunk: nn.Module, groups: Sequence[Group], layout: Layout, tokens_per_batch: int | None
) -> Iterator[tuple[list[int], PackedResponses]]:
    """Indices of the groups of each forward pass, and the groups in the fastest layout that the trunk supports."""
    if not groups:
        return
    layouts = _layouts(trunk)
    # beyond the window, each length has rotary frequencies of its own
    if depends_on_length(base_model(trunk), longest_text(groups)):
        layouts = frozenset({"padded"})
    # fastest first: no padding, then one computation per prompt, then one per response
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


def _at_least_float32(outputs: Tensor) -> Tensor:
    return outputs if outputs.dtype == torch.float64 else outputs.float()


def _states(trunk: nn.Module, packed: PackedResponses, places: Tensor, layer: int | None = None) -> Tensor:
    """Hidden states of a layer, by default the last, at flat indices into the rows, [places, width]."""
    base = base_model(trunk)
    packed = packed.to(embedding(base).device)
    # asked for where needed only, since some classes do not take the argument
    wanted = {} if layer is None else {"output_hidden_states": True}
    with attending(base, packed):
        out = trunk(**model_inputs(base, packed), use_cache=False, **wanted)
    hidden = out.last_hidden_state if layer is None else out.hidden_states[layer]
    # [rows, length, width] -> [places, width]
    return cast(Tensor, hidden.flatten(0, 1).index_select(0, places.to(hidden.device)))


def _layouts(trunk: nn.Module) -> frozenset[RowLayout]:
    """Layouts that a trunk computes exactly; see `ProbeCache` for when it is probed."""
    base = base_model(trunk)
    layouts = _LAYOUTS(trunk, base)
    # the backward pass runs the layers again, when `attending` has already restored the attention function
    return layouts - {"packed"} if checkpoints_layers(base) else layouts


def _probe(trunk: nn.Module) -> frozenset[RowLayout]:
    """Compare the layouts with rows of their own for each response."""
    base = base_model(trunk)
    weight = embedding(base)
    groups = probe_groups(base.config.get_text_config().vocab_size)
    # "padded" needs no probe: causal attention never sees padding on the right
    found: set[RowLayout] = {"padded"}
    candidates: list[RowLayout] = []
    if cannot_share(base) is None:
        # "shared" passes a dense mask, which not all attention kernels take
        candidates = ["packed"] if takes_no_mask(base) else ["packed", "shared"]
    # dropout and the lower precision of autocast would make equal computations differ
    with evaluating(trunk.modules()), torch.autocast(weight.device.type, enabled=False):
        rows: list[PackedResponses] = []
        for prompt, responses in groups:
            rows.extend(pack([(prompt, [response])], "padded") for response in responses)
        # the ground truth: each response in a forward pass of its own
        alone = torch.cat([_states(trunk, row, row.ends) for row in rows])

        def compare(layout: RowLayout) -> str | None:
            packed = pack(groups, layout)
            states = _states(trunk, packed, packed.ends)
            return None if nearly_equal(states, alone, weight.dtype) else "its hidden states differ"

        for layout in candidates:
            if reason_against(functools.partial(compare, layout)) is None:
                found.add(layout)
    return frozenset(found)


_LAYOUTS = ProbeCache(_probe)
