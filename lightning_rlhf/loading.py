"""Which pairs make a step, and in how many passes: pure functions of seed, epoch and lengths; and a resumable loader.

The batches of the loader are optimizer steps. What does not fit into one forward and backward pass is cut here into
several, so that steps, checkpoints, schedules and logs never see it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler

from lightning_rlhf.randomness import Key


@dataclass(frozen=True)
class Step:
    """The part of one rank in one optimizer step.

    Args:
        indices: pairs of this rank, pass after pass.
        passes: number of pairs in each forward and backward pass; every rank has as many passes.
        num_idle: pairs at the end that count for nothing, each a pass of its own: a rank that has fewer pairs than
            others have passes must still run as many.
        num_global: pairs of the step on all ranks divided by the ranks. The loss of a rank is its sum over pairs
            divided by that number: the average over ranks, which DDP takes, is the mean over pairs.
        everyone: pairs of the step on all ranks.
    """

    indices: list[int]
    passes: tuple[int, ...]
    num_idle: int
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
    min_passes: int = 1,
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
        min_passes: cut the share of a rank into as many passes at least, as far as it has pairs.
    """
    steps = []
    for start in range(0, len(order), pairs_per_step):
        pairs = sorted(order[start : start + pairs_per_step], key=lambda i: (-lengths[i], i))
        shares = [_cut(share, lengths, tokens_per_pass) for share in _deal(pairs, lengths, world)]
        shares = [_split(share, lengths, min_passes) for share in shares]
        num_passes = max(map(len, shares))
        mine = _split(shares[rank], lengths, num_passes)
        num_idle = num_passes - len(mine)
        mine += [[pairs[-1]]] * num_idle
        indices = [index for indices in mine for index in indices]
        steps.append(Step(indices, tuple(map(len, mine)), num_idle, len(pairs) / world, tuple(pairs)))
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


def forget_finished_epoch(checkpoint: dict[str, Any]) -> None:
    """Mend, before it is restored, a Lightning checkpoint that was saved when the batches of an epoch were done.

    Lightning 2.6 takes up such an epoch once more: it asks for its loader again, with ``max_steps`` it runs an empty
    epoch and counts it, and it compares the batches done with the length of the *next* epoch, so that it skips as many
    batches of a next round that is longer. From then on it counts fewer epochs started than processed, and so would
    later checkpoints. Here such a checkpoint becomes one of the epoch's end.
    """
    if "loops" not in checkpoint:  # saved with weights only
        return
    fit_loop = checkpoint["loops"]["fit_loop"]
    epochs, batches = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    if epochs["total"]["processed"] != epochs["total"]["started"]:
        if not batches["is_last_batch"]:  # saved in the middle of the epoch
            return
        # saved at the end of its last batch, before it was counted
        for count in (epochs["total"], epochs["current"]):
            count["processed"] = count["started"]
        if batches["total"]["completed"] < batches["total"]["processed"]:
            batches["total"]["completed"] = batches["total"]["processed"]
            fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
    for count in (epochs["total"], epochs["current"]):
        count["completed"] = count["processed"]
    batches["current"] = dict.fromkeys(batches["current"], 0)
    batches["is_last_batch"] = False
    fit_loop["state_dict"].pop("combined_loader", None)


class RankSampler(DistributedSampler[Any]):
    """Yields the given indices.

    It is a `DistributedSampler` only so that Lightning, which deals items to ranks itself, sees that this is done.
    """

    def __init__(self, indices: list[int], rank: int = 0, world: int = 1) -> None:
        super().__init__(indices, num_replicas=world, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.indices = indices

    def __iter__(self) -> Iterator[int]:
        """Yield the indices in order."""
        return iter(self.indices)

    def __len__(self) -> int:
        """Number of items of this rank."""
        return len(self.indices)


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that continues in the middle of an epoch; Lightning stores and restores its state."""

    yielded = 0
    skip = 0

    def state_dict(self) -> dict[str, int]:
        """Number of batches that were handed out."""
        return {"yielded": self.yielded}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Skip the batches that were handed out before, once."""
        self.skip = state["yielded"]

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Iterate from the restored position."""
        skip, self.skip = self.skip, 0
        self.yielded = skip
        for i, batch in enumerate(super().__iter__()):
            if i >= skip:
                self.yielded = i + 1
                yield batch
        self.yielded = 0
