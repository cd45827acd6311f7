"""Collectives on Python objects, for rounds; without a process group they do nothing.

They run in a process group of their own: on the CPU, and without a time limit, because ranks wait here while rank zero
asks a judge, which may take hours. An error of one rank is raised on all, so that none waits for one that is gone.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Literal, TypeAlias, TypeVar, cast

import torch
import torch.distributed as dist

from lightning_rlhf.runtime.preemption import Stopped, Waiting


T = TypeVar("T")

PATIENCE = timedelta(days=365)
"""Time limit of a collective. A process that dies closes its connections, which ends the wait at once."""


class RankError(RuntimeError):
    """The error that stopped another rank, and with it this one."""


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def interleave(sample: Callable[[], list[T]]) -> list[T]:
    """Gather the shards ``items[rank::world]`` of all ranks and put them back in order, on every rank.

    Args:
        sample: makes the shard of this rank.

    Raises:
        RankError: if another rank could not make its own.
    """
    if world_size() == 1:
        return sample()
    outcomes: list[_Outcome] = [("value", None)] * world_size()
    # a rank that fails takes part all the same: the others would wait for it in the collective
    mine = _outcome(sample)
    dist.all_gather_object(outcomes, _sendable(mine), group=_group())
    _raise_first(outcomes, mine)
    shards = [cast(list[T], value) for _, value in outcomes]
    # item i of rank r is item i * world_size + r of the whole
    result: list[T] = []
    for i in range(max(map(len, shards))):
        result.extend(shard[i] for shard in shards if i < len(shard))
    return result


def from_rank_zero(compute: Callable[[], T]) -> T:
    """Run a function on rank zero and give every rank its result; the others wait as long as it takes.

    Args:
        compute: called on rank zero only.

    Raises:
        RankError: on the other ranks, if it raised on rank zero, where the error itself is raised.
    """
    if world_size() == 1:
        return compute()
    mine = _outcome(compute) if rank() == 0 else None
    box: list[_Outcome] = [("value", None) if mine is None else _sendable(mine)]
    dist.broadcast_object_list(box, src=0, group=_group())
    _raise_first(box, mine)
    return cast(T, box[0][1])


def any_rank(flag: bool) -> bool:
    """Whether a flag is up on some rank; every rank must ask."""
    return bool(largest(int(flag)))


def largest(number: int) -> int:
    """The largest of the numbers of all ranks; every rank must ask."""
    if world_size() == 1:
        return number
    # on the CPU, since gloo is the backend of the group
    most = torch.tensor([number])
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=_group())
    return int(most.item())


def leave_at_exit() -> None:
    """End the process groups, where there are any, when the interpreter ends; Lightning does it for NCCL."""
    if dist.is_available() and dist.is_initialized():
        atexit.register(leave)


def end_with(status: int) -> None:
    """End this process with a status once its exit handlers have run, where there is a process group.

    Threads of gloo that still run, or groups that some object still holds, may abort the process while Python clears
    its modules, and a launcher then takes a finished run for a failed one. So that last part is left out.

    Args:
        status: exit status of the process.
    """
    global _status
    if dist.is_available() and dist.is_initialized():
        _status = status


_status: int | None = None


def leave() -> None:
    """End the process groups, where there are any."""
    global _own
    _own = None
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@atexit.register  # by importing this module: exit handlers run last in, first out, and this one after those of a run
def _end() -> None:
    if _status is not None:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_status)


_Outcome: TypeAlias = tuple[Literal["value", "stopped", "error"], object]
"""Result of a rank: a value, or the error; other ranks get the number of the signal, or the text."""


def _outcome(compute: Callable[[], object]) -> _Outcome:
    try:
        return "value", compute()
    # a SystemExit, which is no Exception
    except Stopped as stopped:
        return "stopped", stopped
    except Exception as error:
        return "error", error


def _sendable(outcome: _Outcome) -> _Outcome:
    kind, value = outcome
    if isinstance(value, Waiting):
        return kind, value.text
    if isinstance(value, Stopped) and kind == "stopped":
        return kind, value.signal
    # not the error itself, which may not pickle
    return outcome if kind == "value" else (kind, f"{type(value).__name__}: {value}")


def _raise_first(outcomes: list[_Outcome], mine: _Outcome | None) -> None:
    """Raise the error of this rank, else that of the first rank that has one."""
    # the error of this rank still has its traceback; those of others are text
    if mine is not None and mine[0] != "value":
        raise cast(BaseException, mine[1])
    for number, (kind, value) in enumerate(outcomes):
        if kind == "stopped":
            raise Waiting(value) if isinstance(value, str) else Stopped(cast(int, value))
        if kind == "error":
            raise RankError(f"process {number} of {world_size()} stopped with {value}")


_own: tuple[object, dist.ProcessGroup] | None = None


def _group() -> dist.ProcessGroup:
    """The process group of this module; every rank makes it at its first collective here."""
    global _own
    world = dist.group.WORLD
    # the group of an earlier Trainer in this process ended with its world
    if _own is None or _own[0] is not world:
        _own = (world, cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE)))
    return _own[1]
