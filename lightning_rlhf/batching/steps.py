"""The plan of an epoch: pairs to optimizer steps, steps to ranks, ranks to micro-batches.

Pure functions of seed, epoch and lengths. A batch of the loader is an optimizer step; a step that does not fit into
memory is cut into micro-batches here, so that steps, checkpoints, schedules and logs do not depend on memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch

from lightning_rlhf.randomness import Key
from lightning_rlhf.runtime.lazy import AbstractLazySequence


@dataclass(frozen=True)
class Step:
    """The part of one rank in one optimizer step.

    Args:
        indices: pairs of this rank, micro-batch after micro-batch.
        micro_batches: number of pairs in each micro-batch; every rank has as many micro-batches.
        num_padding: padding pairs at the end, each a micro-batch of its own: a rank with fewer pairs must run as many
            micro-batches as the others.
        num_global: pairs of the step on all ranks, divided by the number of ranks. The loss of a rank is its sum over
            pairs divided by this number, so that DDP's average over ranks is the mean over pairs.
        everyone: pairs of the step on all ranks.
    """

    indices: list[int]
    micro_batches: tuple[int, ...]
    num_padding: int
    num_global: float
    everyone: tuple[int, ...] = field(default=(), compare=False)


def epoch_order(count: int, key: Key) -> list[int]:
    """Permutation of ``range(count)`` that depends on the key only."""
    return torch.randperm(count, generator=key.generator()).tolist()


def group_by_length(order: list[int], lengths: Sequence[int], pairs_per_step: int, window: int, key: Key) -> list[int]:
    """Reorder pairs so that those of a step have similar lengths, within windows of ``window`` steps.

    A window is sorted by length, cut into steps, and its steps are shuffled. Pairs of an
    incomplete last step stay where they are, so that it holds no special lengths.
    """
    # pairs of complete steps: floor(pairs / pairs_per_step) * pairs_per_step
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
    max_tokens: int | None,
    rank: int = 0,
    world: int = 1,
    min_micro_batches: int = 1,
) -> list[Step]:
    """Assign pairs to steps and ranks, and cut the share of each rank into micro-batches.

    The pairs of a step do not depend on ``world``, and every pair comes exactly once. Within a step they go, longest
    first, to the rank with the fewest tokens so far.

    Args:
        order: the pairs of the epoch.
        lengths: token positions of each pair, by its index.
        pairs_per_step: pairs of an optimizer step on all ranks; the last step may have fewer.
        max_tokens: most token positions of a micro-batch; a longer pair is a micro-batch of its own. None: no limit.
        rank: the rank whose steps are returned.
        world: number of ranks.
        min_micro_batches: micro-batches per rank, at least, if it has as many pairs.
    """
    steps = []
    for start in range(0, len(order), pairs_per_step):
        # ties by index: every rank must come to the same plan
        pairs = sorted(order[start : start + pairs_per_step], key=lambda i: (-lengths[i], i))
        shares = [_cut(share, lengths, max_tokens) for share in _deal(pairs, lengths, world)]
        shares = [_split(share, lengths, min_micro_batches) for share in shares]
        # n = max_r n_r on every rank: the forward pass of a sharded model is a collective
        num_micro_batches = max(map(len, shares))
        mine = _split(shares[rank], lengths, num_micro_batches)
        num_padding = num_micro_batches - len(mine)
        # the shortest pair of the step, as padding
        mine += [[pairs[-1]]] * num_padding
        indices = list(chain.from_iterable(mine))
        # L_r = sum_{i in r} w_i l_i / (pairs / world): the average over ranks is the mean over pairs
        steps.append(Step(indices, tuple(map(len, mine)), num_padding, len(pairs) / world, tuple(pairs)))
    return steps


class EpochPlan(AbstractLazySequence[Step]):
    """The steps of `plan`, each made when it is asked for: a step depends on its own pairs alone.

    Args:
        order: the pairs of the epoch.
        pairs_per_step: pairs of an optimizer step on all ranks.
        one_step: `plan` of the pairs of one step.
    """

    def __init__(self, order: list[int], pairs_per_step: int, one_step: Callable[[list[int]], list[Step]]) -> None:
        self.order, self.pairs_per_step = order, pairs_per_step
        self._one_step = one_step

    def __len__(self) -> int:
        return -(-len(self.order) // self.pairs_per_step)

    def make(self, place: int) -> Step:
        """Plan a step."""
        (step,) = self._one_step(self.pairs(place))
        return step

    def pairs(self, number: int, steps: int = 1) -> list[int]:
        """Pairs on all ranks of so many steps, from step ``number`` on."""
        return self.order[number * self.pairs_per_step : (number + steps) * self.pairs_per_step]


def _deal(pairs: list[int], lengths: Sequence[int], world: int) -> list[list[int]]:
    """Give each pair to the rank with the fewest tokens, on a tie to the first."""
    shares: list[list[int]] = [[] for _ in range(world)]
    tokens = [0] * world
    for index in pairs:
        # rank = argmin_r tokens_r, where tokens_r = sum of the lengths of its pairs so far
        rank = tokens.index(min(tokens))
        shares[rank].append(index)
        tokens[rank] += lengths[index]
    return shares


def _cut(pairs: list[int], lengths: Sequence[int], limit: int | None) -> list[list[int]]:
    """Cut pairs into micro-batches of neighbors within the limit."""
    parts: list[list[int]] = []
    tokens = 0
    for index in pairs:
        # sum of lengths <= limit; the first pair always fits, also one that is longer than the limit
        if not parts or (limit is not None and tokens + lengths[index] > limit):
            parts.append([])
            tokens = 0
        parts[-1].append(index)
        tokens += lengths[index]
    return parts


def _split(parts: list[list[int]], lengths: Sequence[int], count: int) -> list[list[int]]:
    """Halve the micro-batch with the most tokens until there are ``count``, or one for each pair."""
    parts = list(parts)

    def tokens(place: int) -> int:
        return sum(lengths[index] for index in parts[place])

    while len(parts) < count and any(len(part) > 1 for part in parts):
        # single pairs cannot be halved, even if they have the most tokens
        place = max((i for i, part in enumerate(parts) if len(part) > 1), key=tokens)
        part = parts[place]
        parts[place : place + 1] = [part[: len(part) // 2], part[len(part) // 2 :]]
    return parts
