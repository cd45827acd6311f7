"""FSDP2: load a model sharded over processes, and gather it once for a whole round of decoding.

Rank zero alone reads weights, into its main memory; no device holds more than its shards and one tensor meanwhile.

Decoding runs a different number of forward passes on each rank, and a sharded forward pass is a collective: outside of
`gathered` the ranks would wait for each other forever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from lightning_rlhf.runtime import distributed


Model = TypeVar("Model", bound=nn.Module)

_gathered: WeakKeyDictionary[nn.Module, list[FSDPModule]] = WeakKeyDictionary()


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a causal LM in place, layer by layer and then as a whole.

    Args:
        model: a model of transformers, or a PeftModel of one.
        mesh: the data-parallel processes.
    """
    # the root must be the model that is called first, which is not the adapter's wrapper
    root = model.get_base_model() if isinstance(model, PeftModel) else model
    stacks = [module for module in root.modules() if isinstance(module, nn.ModuleList)]
    # layers before the root: a unit takes the parameters below it that no other unit has taken yet
    for layer in max(stacks, key=len, default=nn.ModuleList()):
        fully_shard(layer, mesh=mesh)
    fully_shard(root, mesh=mesh)


def shard_scorer(model: PreTrainedModel, head: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a decoder with a head that is called apart from it, in place; the backbone may have adapters.

    Args:
        model: a model with a head, as ``AutoModelForSequenceClassification`` opens it.
        head: its head.
        mesh: the data-parallel processes.
    """
    shard(model.base_model, mesh)
    fully_shard(head, mesh=mesh)


def build_sharded(
    build: Callable[[bool], Model], cut: Callable[[Model, DeviceMesh], None], mesh: DeviceMesh, device: torch.device
) -> Model:
    """Build a sharded model that is complete in the main memory of rank zero only; every rank must call.

    Args:
        build: makes the model; given True without its weights, on the meta device.
        cut: shards it in place, as `shard` does.
        mesh: the data-parallel processes.
        device: device of the shards of this rank.

    Raises:
        RankError: on the other ranks, if rank zero could not build it.
    """
    with torch.random.fork_rng(devices=[]):  # the random weights of this model are not used
        model = build(True)
    cut(model, mesh)
    # tied weights count once in parameters(), and once per name otherwise
    tied = len(list(model.parameters())) < len(list(model.named_parameters(remove_duplicate=False)))
    model.to_empty(device=device)
    for unit in _units(model) if tied else []:
        # `to_empty` has made a new tensor for each occurrence of a tied weight; FSDP ties them again on unsharding
        unit.unshard()
        unit.reshard()
    fill(model, lambda: build(False))
    return model


def fill(model: Model, build: Callable[[], Model]) -> None:
    """Copy weights and buffers into a sharded model from one that rank zero alone builds; every rank must call.

    Args:
        model: the sharded model, on its device.
        build: makes the whole one, anywhere.

    Raises:
        RankError: on the other ranks, if rank zero could not build it.
    """
    built: list[Model] = []
    # append returns None, so that the other ranks receive the outcome alone and no weights
    distributed.from_rank_zero(lambda: built.append(build()))
    # empty on the other ranks, which get their shards from rank zero
    state = built[0].state_dict() if built else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, state, options=options)
    # also buffers outside of the state_dict, such as the frequencies of rotary embeddings
    buffers = dict(built[0].named_buffers()) if built else {}
    for name, buffer in model.named_buffers():
        if built:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, src=0)


@contextmanager
def gathered(model: nn.Module, *more: nn.Module) -> Iterator[None]:
    """Hold sharded models whole on every rank for a while, so that forward passes are no collectives; may nest.

    Entering and leaving are collectives: all ranks must do both. Models that are not sharded stay as they are.

    Args:
        model: the LightningModule with the models inside; the same object in nested calls.
        more: models beside it.
    """
    units = _units(model, *more)
    # an inner context must not free the weights that the outer one still needs
    if not units or model in _gathered:
        yield
        return
    _gathered[model] = units
    _unshard(units)
    try:
        yield
    finally:
        _reshard(units)
        del _gathered[model]


@contextmanager
def scattered(model: nn.Module) -> Iterator[None]:
    """Give back to every rank its shards alone, for a while within `gathered`, so that they can be changed.

    Args:
        model: the first argument of `gathered`; outside of it this context does nothing.
    """
    units = _gathered.get(model, [])
    _reshard(units)
    try:
        yield
    finally:
        _unshard(units)


def _units(*models: nn.Module) -> list[FSDPModule]:
    units: list[FSDPModule] = []
    for model in models:
        units.extend(module for module in model.modules() if isinstance(module, FSDPModule))
    return units


def _unshard(units: list[FSDPModule]) -> None:
    # validation runs in inference mode, and FSDP keeps the buffers that it makes here for training
    with torch.inference_mode(False), torch.no_grad():
        for unit in units:
            unit.unshard()
            # otherwise the first forward pass would free the weights again
            unit.set_reshard_after_forward(False, recurse=False)


def _reshard(units: list[FSDPModule]) -> None:
    for unit in units:
        unit.reshard()
        unit.set_reshard_after_forward(True, recurse=False)


def full_state_dict(model: nn.Module) -> dict[str, Tensor] | None:
    """Collect the weights of a sharded model, on the CPU of rank zero; every rank must call. None if not sharded."""
    if not _units(model):
        return None
    # with both options rank zero alone keeps the whole tensors, and the others get an empty dict
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))
