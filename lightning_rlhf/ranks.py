"""The few collectives on plain Python objects that rounds need; without a process group they do nothing."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist


T = TypeVar("T")


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def interleave(mine: list[T]) -> list[T]:
    """Gather the shards ``items[rank::world]`` of all ranks and put them back in order, on every rank."""
    if world_size() == 1:
        return mine
    shards: list[list[T]] = [[] for _ in range(world_size())]
    dist.all_gather_object(shards, mine)
    result: list[T] = []
    for i in range(max(map(len, shards))):
        result.extend(shard[i] for shard in shards if i < len(shard))
    return result


def from_rank_zero(value: T | None) -> T:
    """Give every rank what rank zero holds."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]
