"""Layout of prompts and responses in rows, so that a prompt is computed once for all its responses.

A row of the shared layout is ``[prompt | r1 | r2 | ... | rk]``. The positions of each response restart after the prompt
and no response attends to another, so that the result equals that of k separate rows. The packed layout concatenates
all such rows into one without padding; it needs the attention of `lightning_rlhf.logprobs.attention`. All functions
here are pure; `lightning_rlhf.logprobs.compute` runs models on the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor


Group = tuple[Sequence[int], Sequence[Sequence[int]]]
"""Token ids of a prompt, and of the responses to it."""

RowLayout = Literal["packed", "shared", "padded"]


@dataclass(frozen=True)
class PackedResponses:
    """Responses in rows, with the positions that predict their tokens.

    Responses are numbered group by group, in the given order; tokens are ordered by response. Rows are padded on the
    right with token 0, which no response token attends to.

    Args:
        input_ids: token ids, [rows, length].
        position_ids: positions, [rows, length]; each response restarts after the prompt; 0 in the padding.
        segments: 0 in the prompt, j >= 1 in the j-th response of the row, -1 in the padding; [rows, length].
        predictors: flat index into [rows * length] of the position that predicts each response token, [tokens].
        targets: the response tokens, [tokens].
        ends: flat index of the last token of each response, [responses].
        response_lengths: tokens of each response, [responses].
        shares_prompt: whether some row has more than one response and needs `attention_mask`.
        spans: for the packed layout, number of tokens of each prompt and of its responses, in the order of the row.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    predictors: Tensor
    targets: Tensor
    ends: Tensor
    response_lengths: Tensor
    shares_prompt: bool
    spans: tuple[tuple[int, tuple[int, ...]], ...] = ()

    @property
    def num_computed(self) -> int:
        """Positions that a model computes for this batch, padding included."""
        return self.input_ids.numel()

    @property
    def owners(self) -> Tensor:
        """Index of the response that each token belongs to, [tokens]."""
        numbers = torch.arange(len(self.response_lengths), device=self.response_lengths.device)
        # with output_size, a GPU need not report the sum of the lengths before the next operation
        return numbers.repeat_interleave(self.response_lengths, output_size=len(self.targets))

    def to(self, device: torch.device | str) -> PackedResponses:
        """Move to a device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            segments=self.segments.to(device, non_blocking=True),
            predictors=self.predictors.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            ends=self.ends.to(device, non_blocking=True),
            response_lengths=self.response_lengths.to(device, non_blocking=True),
        )

    def split(self, per_token: Tensor) -> list[Tensor]:
        """Split a [tokens] tensor into one tensor per response."""
        return list(torch.split(per_token, self.response_lengths.tolist()))

    def sum_by_response(self, per_token: Tensor) -> Tensor:
        """Sum a [tokens] tensor over the tokens of each response, [responses]; carries gradient."""
        # not index_add, whose order of summation on CUDA is not deterministic
        return torch.segment_reduce(per_token, "sum", lengths=self.response_lengths)


def pack(groups: Sequence[Group], layout: RowLayout) -> PackedResponses:
    """Lay responses out in rows.

    Args:
        groups: prompts with their responses; neither may be empty.
        layout: ``"packed"``, one row for all, ``"shared"``, one row per group, or ``"padded"``, one row per response.

    Raises:
        ValueError: if there is no group, or a prompt, a list of responses or a response is empty.
    """
    _check(groups)
    if layout == "packed":
        return _in_one_row(groups)
    rows = list(groups) if layout == "shared" else _one_response_per_row(groups)
    length = max(_row_length(row) for row in rows)
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    position_ids = torch.zeros_like(input_ids)
    segments = torch.full_like(input_ids, -1)
    predictors: list[int] = []
    targets: list[int] = []
    ends: list[int] = []
    # position t predicts token t + 1, so that the predictors of a response are shifted by one to the left
    for number, (prompt, responses) in enumerate(rows):
        ids, positions, owners = list(prompt), list(range(len(prompt))), [0] * len(prompt)
        for segment, response in enumerate(responses, start=1):
            start = number * length + len(ids)
            # the last prompt position predicts the first token of every response
            predictors += [number * length + len(prompt) - 1, *range(start, start + len(response) - 1)]
            targets += response
            ends.append(start + len(response) - 1)
            ids += response
            # every response restarts after the prompt
            positions += range(len(prompt), len(prompt) + len(response))
            owners += [segment] * len(response)
        input_ids[number, : len(ids)] = torch.tensor(ids)
        position_ids[number, : len(ids)] = torch.tensor(positions)
        segments[number, : len(ids)] = torch.tensor(owners)
    return PackedResponses(
        input_ids=input_ids,
        position_ids=position_ids,
        segments=segments,
        predictors=torch.tensor(predictors),
        targets=torch.tensor(targets),
        ends=torch.tensor(ends),
        response_lengths=torch.tensor([len(responses[0]) for _, responses in _one_response_per_row(groups)]),
        shares_prompt=any(len(responses) > 1 for _, responses in rows),
    )


def _one_response_per_row(groups: Sequence[Group]) -> list[Group]:
    """One group per response, in order."""
    rows: list[Group] = []
    for prompt, responses in groups:
        rows.extend((prompt, [response]) for response in responses)
    return rows


def _in_one_row(groups: Sequence[Group]) -> PackedResponses:
    """Lay out one row per group, and concatenate the rows."""
    rows = [pack([group], "shared") for group in groups]
    # flat indices of a row shift by the length of the rows before it
    starts = list(accumulate((row.num_computed for row in rows), initial=0))
    return PackedResponses(
        input_ids=torch.cat([row.input_ids for row in rows], 1),
        position_ids=torch.cat([row.position_ids for row in rows], 1),
        segments=torch.cat([row.segments for row in rows], 1),
        predictors=torch.cat([row.predictors + start for row, start in zip(rows, starts, strict=False)]),
        targets=torch.cat([row.targets for row in rows]),
        ends=torch.cat([row.ends + start for row, start in zip(rows, starts, strict=False)]),
        response_lengths=torch.cat([row.response_lengths for row in rows]),
        # also where each group has one response: the groups share a row and need positions and a mask
        shares_prompt=True,
        spans=tuple((len(prompt), tuple(map(len, responses))) for prompt, responses in groups),
    )


def attention_mask(packed: PackedResponses, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """Build the additive mask [rows, 1, length, length] that separates the responses of a row.

    It is 0 where a query attends and the most negative number of the data type elsewhere. A boolean mask is not used,
    since the eager attention of transformers silently computes wrong values with one. Every position attends at least
    to itself.

    Args:
        packed: the batch.
        dtype: floating data type of the model.
        window: sliding window in tokens, the query's own included, as in the configs of transformers. It is measured in
            positions, not in columns of the row. Default: full attention.
    """
    query, key = packed.segments[:, :, None], packed.segments[:, None, :]
    # visible: earlier columns of the prompt or of the same response
    length = packed.segments.shape[1]
    visible = ((key == 0) | (key == query)) & torch.ones(length, length, dtype=torch.bool, device=key.device).tril()
    if window is not None:
        visible &= packed.position_ids[:, :, None] - packed.position_ids[:, None, :] < window
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    # [rows, length, length] -> [rows, 1, length, length], the same for all heads
    return mask.masked_fill_(~visible, torch.finfo(dtype).min).unsqueeze(1)


def sharing_gain(groups: Sequence[Group], hidden_size: int | None = None) -> float:
    """Estimate the cost of the padded layout divided by the cost of the shared layout.

    Without ``hidden_size`` the cost is the number of tokens: the sum of (P + R) over responses, divided by the sum of
    (P + R1 + ... + Rk) over groups; for a pair 2 (P + R) / (P + 2 R). With it, attention is included, whose masked part
    is wasted in long rows of many responses.

    Args:
        groups: prompts with their responses.
        hidden_size: width of the model, >= 1. Default: count tokens only.
    """

    def cost(length: int, causal: bool) -> float:
        # FLOPs of a transformer layer per token: 24 h^2 outside of attention, and 4 h L in attention with a dense mask,
        # half of that with a causal kernel; their ratio is L / (6 h)
        attention = 0.0 if hidden_size is None else length / (6 * hidden_size) * (0.5 if causal else 1.0)
        return length * (1.0 + attention)

    padded = sum(cost(_row_length(row), causal=True) for row in _one_response_per_row(groups))
    return padded / sum(cost(_row_length(group), causal=False) for group in groups)


def split_by_tokens(groups: Sequence[Group], tokens_per_batch: int, layout: RowLayout = "shared") -> list[list[int]]:
    """Divide groups into batches of similar length, to reduce padding.

    Args:
        groups: prompts with their responses.
        tokens_per_batch: maximum number of positions per batch, padding included, >= 1; a longer group is a batch of
            its own.
        layout: layout of the batches; only ``"packed"`` has no padding.

    Returns:
        Indices into ``groups``, each exactly once, longest groups first: if memory does not suffice, the first batch
        shows it.

    Raises:
        ValueError: if tokens_per_batch is below 1, or a prompt or a response is empty.
    """
    if tokens_per_batch < 1:
        raise ValueError(f"tokens_per_batch must be at least 1; got {tokens_per_batch}")
    _check(groups)
    # length of the longest row of a group, and number of its rows
    longest = [
        len(group[0]) + max(map(len, group[1])) if layout == "padded" else _row_length(group) for group in groups
    ]
    rows = [len(responses) if layout == "padded" else 1 for _, responses in groups]
    batches: list[list[int]] = []
    used, width = 0, 0
    for index in sorted(range(len(groups)), key=lambda i: -longest[i]):
        # without padding a row costs its own length, with padding that of the first row, the longest of the batch
        cost = rows[index] * (longest[index] if layout == "packed" or not batches else width)
        if not batches or used + cost > tokens_per_batch:
            batches.append([])
            used, width = 0, longest[index]
            cost = rows[index] * width
        batches[-1].append(index)
        used += cost
    return batches


def longest_text(groups: Sequence[Group]) -> int:
    """Tokens of the longest prompt with one response."""
    return max(len(prompt) + max(map(len, responses), default=0) for prompt, responses in groups)


def _row_length(group: Group) -> int:
    """Tokens of a row of the shared layout."""
    prompt, responses = group
    return len(prompt) + sum(map(len, responses))


def _check(groups: Sequence[Group]) -> None:
    """Raise a ValueError if there is no group, or a prompt or a response is empty."""
    if not groups:
        raise ValueError("expected at least one prompt with responses; got none")
    for number, (prompt, responses) in enumerate(groups):
        if not prompt:
            raise ValueError(
                f"group {number} has an empty prompt, so nothing predicts the first token of its responses; "
                "give the tokenizer a BOS token, or a non-empty prompt"
            )
        if not responses or not all(map(len, responses)):
            raise ValueError(
                f"group {number} has response lengths {[len(r) for r in responses]}; "
                "expected one or more responses of at least one token: drop the others"
            )
