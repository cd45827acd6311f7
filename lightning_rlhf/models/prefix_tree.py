"""What a model expects next after each of many texts, with every beginning that texts share computed once.

Judges read the same instructions before every sample, and the same sample in two orders. Texts are laid out as a tree
in one row: a piece of text continues another, and attends to all that it continues.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from lightning_rlhf.models.attention import Node, attending_in_segments, segments
from lightning_rlhf.models.logprobs import (
    base_model,
    computes_packed_rows,
    embedding,
    head_on_chosen_positions,
    logits_at,
    masks_by_layer,
)
from lightning_rlhf.models.modes import evaluating
from lightning_rlhf.models.rotary import rotary_window


WORTH_SHARING = 16
"""Tokens that texts must have in common beyond a piece, to make a piece of their own."""


@dataclass(frozen=True)
class Tree:
    """Texts in one row, their common beginnings once.

    Args:
        ids: token ids, piece by piece.
        positions: position of each token in its text.
        nodes: the pieces, parents before their children.
        ends: index in the row of the last token of each text, in the order given.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    nodes: tuple[Node, ...]
    ends: tuple[int, ...]


def grow(texts: Sequence[Sequence[int]]) -> Tree:
    """Lay texts out as a tree.

    Args:
        texts: token ids, none empty; equal texts end at the same place.
    """
    rows = sorted(set(map(tuple, texts)))
    common = [common_length(left, right) for left, right in pairwise(rows)]
    ids: list[int] = []
    positions: list[int] = []
    nodes: list[Node] = []
    ends: dict[tuple[int, ...], int] = {}
    # ranges of sorted texts, with the number of tokens and the piece before what is still to be laid out
    waiting = [(0, len(rows), 0, -1)]
    while waiting:
        start, stop, depth, parent = waiting.pop()
        shared = min(common[start : stop - 1], default=len(rows[start]))
        if stop - start == 1 or shared - depth >= WORTH_SHARING:
            # one piece for all of them, up to where the first two differ
            nodes.append((shared - depth, parent))
            ids += rows[start][depth:shared]
            positions += range(depth, shared)
            if len(rows[start]) == shared:
                ends[rows[start]] = len(ids) - 1
                start += 1
            if start < stop:
                waiting.append((start, stop, shared, len(nodes) - 1))
        else:
            borders = [i + 1 for i in range(start, stop - 1) if common[i] == shared]
            parts = zip([start, *borders], [*borders, stop], strict=True)
            waiting += reversed([(left, right, depth, parent) for left, right in parts])
    return Tree(tuple(ids), tuple(positions), tuple(nodes), tuple(ends[tuple(text)] for text in texts))


def split_texts(texts: Sequence[Sequence[int]], tokens_per_batch: int) -> list[list[int]]:
    """Divide texts into batches of at most so many tokens, common beginnings counted once; indices, each exactly once.

    Texts that begin alike are side by side; a longer text makes its own batch.
    """
    if tokens_per_batch < 1:
        raise ValueError(f"tokens_per_batch must be at least 1; got {tokens_per_batch}")
    batches: list[list[int]] = []
    used = 0
    for index in sorted(range(len(texts)), key=lambda i: tuple(texts[i])):
        cost = len(texts[index])
        if batches:
            common = common_length(texts[batches[-1][-1]], texts[index])
            cost -= common if common >= WORTH_SHARING else 0
        if not batches or used + cost > tokens_per_batch:
            batches.append([])
            used, cost = 0, len(texts[index])
        batches[-1].append(index)
        used += cost
    return batches


def next_token_logps(
    model: nn.Module, texts: Sequence[Sequence[int]], targets: Sequence[int], *, tokens_per_batch: int = 8192
) -> Tensor:
    """Compute log p(target | text) for every text and every target, nats; [texts, targets], float32, on the CPU.

    Without gradient and in eval mode. A model that cannot compute such rows exactly (see
    `lightning_rlhf.models.logprobs`) computes each text in a row of its own.

    Args:
        model: a causal language model of transformers, or a PeftModel of one.
        texts: token ids, none empty.
        targets: token ids.
        tokens_per_batch: tokens of one forward pass at most.

    Raises:
        ValueError: if a text is empty.
    """
    if not all(map(len, texts)):
        raise ValueError("a text has no tokens, so nothing predicts the next: give the tokenizer a BOS token")
    wanted = torch.tensor(list(targets), dtype=torch.long)
    found = torch.zeros(len(texts), len(targets))
    with evaluating(model.modules()):
        tree = computes_packed_rows(model, max(map(len, texts), default=0))
        head = head_on_chosen_positions(model)
        compute = _last_logits_in_tree if tree else _last_logits_in_rows
        for batch in split_texts(texts, tokens_per_batch) if tree else _rows(texts, tokens_per_batch):
            logits = compute(model, head, [texts[i] for i in batch])
            logits = logits if logits.dtype == torch.float64 else logits.float()
            chosen_logits = logits[:, wanted.to(logits.device)] - logits.logsumexp(-1, keepdim=True)
            found[torch.tensor(batch)] = chosen_logits.cpu().float()
    return found


def _last_logits_in_tree(model: nn.Module, head: nn.Module | None, texts: Sequence[Sequence[int]]) -> Tensor:
    tree, base = grow(texts), base_model(model)
    device = embedding(base).device
    ids, positions, ends = (torch.tensor(x, device=device) for x in (tree.ids, tree.positions, tree.ends))
    mask = masks_by_layer(base, lambda window: segments((), device, window, tree.nodes))
    with attending_in_segments(base):
        inputs = {"input_ids": ids[None], "position_ids": positions[None], "attention_mask": mask}
        return logits_at(model, head, ends, **inputs, use_cache=False)


def _last_logits_in_rows(model: nn.Module, head: nn.Module | None, texts: Sequence[Sequence[int]]) -> Tensor:
    device = embedding(base_model(model)).device
    length = max(map(len, texts))
    # nothing sees the filling at the right of a causal row
    ids = torch.tensor([[*text, *[0] * (length - len(text))] for text in texts], device=device)
    ends = torch.tensor([row * length + len(text) - 1 for row, text in enumerate(texts)], device=device)
    inputs = {"input_ids": ids}
    if rotary_window(base_model(model)) is not None:
        rows = [[*range(len(text)), *[0] * (length - len(text))] for text in texts]
        inputs["position_ids"] = torch.tensor(rows, device=device)
    return logits_at(model, head, ends, **inputs, use_cache=False)


def _rows(texts: Sequence[Sequence[int]], tokens_per_batch: int) -> list[list[int]]:
    """Batches of rows of like length, longest first."""
    batches: list[list[int]] = []
    for index in sorted(range(len(texts)), key=lambda i: -len(texts[i])):
        if not batches or (len(batches[-1]) + 1) * len(texts[batches[-1][0]]) > tokens_per_batch:
            batches.append([])
        batches[-1].append(index)
    return batches


def common_length(left: Sequence[int], right: Sequence[int]) -> int:
    """Number of tokens that two texts begin with alike."""
    shorter = min(len(left), len(right))
    return next((i for i in range(shorter) if left[i] != right[i]), shorter)
