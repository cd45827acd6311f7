"""Next-token log-probabilities after each of many texts, with every common prefix computed once.

The prompts of a judge share their instructions, and often the sample, too. Texts are laid out as a prefix tree in one
row: a node is a piece of text that continues its parent, and attends to all its ancestors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from lightning_rlhf.logprobs.attention import Node, attending_in_segments, segments
from lightning_rlhf.logprobs.compute import (
    base_model,
    computes_packed_rows,
    embedding,
    head_on_chosen_positions,
    logits_at,
    masks_by_layer,
)
from lightning_rlhf.logprobs.eval_mode import evaluating
from lightning_rlhf.models.rotary import rotary_window


MIN_SHARED_TOKENS = 16
"""Smallest number of common tokens that become a node of their own; shorter prefixes are computed per text."""


@dataclass(frozen=True)
class Tree:
    """Texts in one row, with each common prefix once.

    Args:
        ids: token ids, node by node.
        positions: position of each token in its text.
        nodes: length and parent of each node, parents before their children.
        ends: index in the row of the last token of each text, in the given order.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    nodes: tuple[Node, ...]
    ends: tuple[int, ...]


def build_tree(texts: Sequence[Sequence[int]]) -> Tree:
    """Lay texts out as a prefix tree.

    Args:
        texts: token ids, none empty; equal texts end at the same index.
    """
    # sorted texts: those with a common prefix are adjacent, and the prefix of a range is the shortest of its neighbors'
    rows = sorted(set(map(tuple, texts)))
    common = [common_length(left, right) for left, right in pairwise(rows)]
    ids: list[int] = []
    positions: list[int] = []
    nodes: list[Node] = []
    ends: dict[tuple[int, ...], int] = {}
    # ranges of sorted texts that remain, with the number of tokens already laid out and the node they belong to
    waiting = [(0, len(rows), 0, -1)]
    while waiting:
        start, stop, depth, parent = waiting.pop()
        shared = min(common[start : stop - 1], default=len(rows[start]))
        if stop - start == 1 or shared - depth >= MIN_SHARED_TOKENS:
            # one node for the common prefix of the range
            nodes.append((shared - depth, parent))
            ids += rows[start][depth:shared]
            positions += range(depth, shared)
            # a text that equals the prefix ends here; being the shortest, it is the first of the range
            if len(rows[start]) == shared:
                ends[rows[start]] = len(ids) - 1
                start += 1
            if start < stop:
                waiting.append((start, stop, shared, len(nodes) - 1))
        else:
            # the common prefix is too short: split the range where neighbors have no more in common
            borders = [i + 1 for i in range(start, stop - 1) if common[i] == shared]
            parts = zip([start, *borders], [*borders, stop], strict=True)
            # reversed, since `waiting` is a stack: nodes then follow the order of the sorted texts
            waiting += reversed([(left, right, depth, parent) for left, right in parts])
    return Tree(tuple(ids), tuple(positions), tuple(nodes), tuple(ends[tuple(text)] for text in texts))


def split_texts(texts: Sequence[Sequence[int]], tokens_per_batch: int) -> list[list[int]]:
    """Divide texts into batches with a token limit, common prefixes counted once; indices, each exactly once.

    Args:
        texts: token ids.
        tokens_per_batch: maximum number of tokens per batch, >= 1; a longer text is a batch of its own.

    Raises:
        ValueError: if tokens_per_batch is below 1.
    """
    if tokens_per_batch < 1:
        raise ValueError(f"tokens_per_batch must be at least 1; got {tokens_per_batch}")
    batches: list[list[int]] = []
    used = 0
    # in sorted order, texts with a common prefix are adjacent
    for index in sorted(range(len(texts)), key=lambda i: tuple(texts[i])):
        cost = len(texts[index])
        if batches:
            common = common_length(texts[batches[-1][-1]], texts[index])
            cost -= common if common >= MIN_SHARED_TOKENS else 0
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

    Runs without gradient and in eval mode. A model that does not compute packed rows exactly (see
    `lightning_rlhf.logprobs.compute`) computes each text in a row of its own.

    Args:
        model: a causal language model of transformers, or a PeftModel of one.
        texts: token ids, none empty.
        targets: token ids.
        tokens_per_batch: maximum number of tokens per forward pass.

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
            # log p(target) = z_target - logsumexp(z)
            chosen_logits = logits[:, wanted.to(logits.device)] - logits.logsumexp(-1, keepdim=True)
            found[torch.tensor(batch)] = chosen_logits.cpu().float()
    return found


def _last_logits_in_tree(model: nn.Module, head: nn.Module | None, texts: Sequence[Sequence[int]]) -> Tensor:
    """Logits after each text, [texts, vocabulary], from one row with all texts as a tree."""
    tree, base = build_tree(texts), base_model(model)
    device = embedding(base).device
    ids, positions, ends = (torch.tensor(x, device=device) for x in (tree.ids, tree.positions, tree.ends))
    mask = masks_by_layer(base, lambda window: segments((), device, window, tree.nodes))
    with attending_in_segments(base):
        inputs = {"input_ids": ids[None], "position_ids": positions[None], "attention_mask": mask}
        return logits_at(model, head, ends, **inputs, use_cache=False)


def _last_logits_in_rows(model: nn.Module, head: nn.Module | None, texts: Sequence[Sequence[int]]) -> Tensor:
    """Logits after each text, [texts, vocabulary], from one row per text."""
    device = embedding(base_model(model)).device
    length = max(map(len, texts))
    # causal attention never sees padding on the right: no mask is needed
    ids = torch.tensor([[*text, *[0] * (length - len(text))] for text in texts], device=device)
    # flat index into [rows * length] of the last token of each text
    ends = torch.tensor([row * length + len(text) - 1 for row, text in enumerate(texts)], device=device)
    inputs = {"input_ids": ids}
    if rotary_window(base_model(model)) is not None:
        rows = [[*range(len(text)), *[0] * (length - len(text))] for text in texts]
        inputs["position_ids"] = torch.tensor(rows, device=device)
    return logits_at(model, head, ends, **inputs, use_cache=False)


def _rows(texts: Sequence[Sequence[int]], tokens_per_batch: int) -> list[list[int]]:
    """Divide texts into batches of rows of similar length, longest first; a row costs the longest length."""
    batches: list[list[int]] = []
    for index in sorted(range(len(texts)), key=lambda i: -len(texts[i])):
        if not batches or (len(batches[-1]) + 1) * len(texts[batches[-1][0]]) > tokens_per_batch:
            batches.append([])
        batches[-1].append(index)
    return batches


def common_length(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common prefix of two texts, tokens."""
    shorter = min(len(left), len(right))
    return next((i for i in range(shorter) if left[i] != right[i]), shorter)
