"""Which pairs make a step, and in how many passes: pure functions of seed, epoch and lengths; and a resumable loader.

The batches of the loader are optimizer steps. What does not fit into one forward and backward pass is cut here into
several, so that steps, checkpoints, schedules and logs never see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lightning_rlhf.randomness import Key


@dataclass(frozen=True)
class Step:
    """The part of one rank in one optimizer step.

    Args:
        indices: pairs of this rank, pass after pass.
        micro_batches: number of pairs in each forward and backward pass; every rank has as many passes.
        num_padding: pairs at the end that count for nothing, each a pass of its own: a rank that has fewer pairs than
            others have passes must still run as many.
        num_global: pairs of the step on all ranks divided by the ranks. The loss of a rank is its sum over pairs
            divided by that number: the average over ranks, which DDP takes, is the mean over pairs.
        everyone: pairs of the step on all ranks.
    """

    indices: list[int]
    micro_batches: tuple[int, ...]
    num_padding: int
    num_global: float
    everyone: tuple[int, ...] = field(default=(), compare=False)


def epoch_order(count: int, key: Key) -> list[int]:
    """Permutation of ``range(count)`` that the key alone decides."""
    return torch.randperm(count, generator=key.generator()).tolist()


def group_by_length(order: list[int], lengths: Sequence[int], pairs_per_step: int, window: int, key: Key) -> list[int]:
    """Reorder pairs so that those of a step are about as long, within windows of ``window`` steps.

    A window is sorted by length, cut into steps, and its steps are shuffled. Pairs at the end that fill no step stay
    where they are, so that the short last step holds no special lengths.
    """
    full = len(order) // pairs_per_step * pairs_per_step if window > 1 else 0
    grouped: list[int] = []
    for number, start in enumerate(range(0, full, window * pairs_per_step)):
        # a stable sort: pairs of one length keep their random order
        by_length = sorted(order[start : min(start + window * pairs_per_step, full)], key=lambda i: lengths[i])
        for step in epoch_order(len(by_length) // pairs_per_step, key.fold(number)):
            grouped += by_length[step * pairs_per_step : (step + 1) * pairs_per_step]
    return grouped + order[full:]


def plan(
    order: list[int],
    lengths: Sequence[int],
    pairs_per_step: int,
    tokens_per_pass: int | None,
    rank: int = 0,
    world: int = 1,
    min_micro_batches: int = 1,
) -> list[Step]:
    """Deal an order of pairs to the ranks, step by step, and cut the share of each rank into passes.

    The pairs of a step are those of one process whatever ``world`` is, and every pair comes exactly once. Within a step
    they go, longest first, to the rank with the fewest tokens so far.

    Args:
        order: the pairs of the epoch.
        lengths: token positions of each pair, by its index.
        pairs_per_step: pairs of an optimizer step on all ranks; the last step takes what is left.
        tokens_per_pass: most token positions of a pass; a longer pair is a pass of its own. No limit when None.
        rank: whose steps to return.
        world: number of ranks.
        min_micro_batches: cut the share of a rank into as many passes at least, as far as it has pairs.
    """
    steps = []
    for start in range(0, len(order), pairs_per_step):
        pairs = sorted(order[start : start + pairs_per_step], key=lambda i: (-lengths[i], i))
        shares = [_cut(share, lengths, tokens_per_pass) for share in _deal(pairs, lengths, world)]
        shares = [_split(share, lengths, min_micro_batches) for share in shares]
        num_passes = max(map(len, shares))
        mine = _split(shares[rank], lengths, num_passes)
        num_padding = num_passes - len(mine)
        mine += [[pairs[-1]]] * num_padding
        indices = [index for indices in mine for index in indices]
        steps.append(Step(indices, tuple(map(len, mine)), num_padding, len(pairs) / world, tuple(pairs)))
    return steps


def _deal(pairs: list[int], lengths: Sequence[int], world: int) -> list[list[int]]:
    """Give each pair to the rank with the fewest tokens, the first of several."""
    shares: list[list[int]] = [[] for _ in range(world)]
    tokens = [0] * world
    for index in pairs:
        rank = tokens.index(min(tokens))
        shares[rank].append(index)
        tokens[rank] += lengths[index]
    return shares


def _cut(pairs: list[int], lengths: Sequence[int], limit: int | None) -> list[list[int]]:
    """Cut pairs into passes of neighbours that keep the limit."""
    passes: list[list[int]] = []
    tokens = 0
    for index in pairs:
        if not passes or (limit is not None and tokens + lengths[index] > limit):
            passes.append([])
            tokens = 0
        passes[-1].append(index)
        tokens += lengths[index]
    return passes


def _split(passes: list[list[int]], lengths: Sequence[int], count: int) -> list[list[int]]:
    """Halve the pass with the most tokens until there are ``count``, or one for each pair."""
    passes = list(passes)
    while len(passes) < count and any(len(part) > 1 for part in passes):
        place = max(
            (i for i, part in enumerate(passes) if len(part) > 1), key=lambda i: sum(lengths[j] for j in passes[i])
        )
        part = passes[place]
        passes[place : place + 1] = [part[: len(part) // 2], part[len(part) // 2 :]]
    return passes
