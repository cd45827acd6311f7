"""FSDP2: shard a causal LM over processes, and gather it once for a whole round of decoding.

Decoding makes a different number of forward passes on each rank, and a sharded forward pass is a collective: outside
`gathered` the ranks would wait for each other for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel


_gathered: WeakSet[nn.Module] = WeakSet()


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a causal LM in place, layer by layer and then as a whole.

    Args:
        model: a model of transformers, or a PeftModel of one.
        mesh: the data-parallel processes.
    """
    # the root must be the model that is called first, which is not the adapter's wrapper
    root = model.get_base_model() if isinstance(model, PeftModel) else model
    stacks = [module for module in root.modules() if isinstance(module, nn.ModuleList)]
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


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Hold sharded models on every rank whole for a while, so that forward passes are no collectives; may nest.

    Entering and leaving are collectives: all ranks must do both. Does nothing to what is not sharded.

    Args:
        model: what has them inside, the same object wherever it nests: the LightningModule.
    """
    units: list[Any] = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not units or model in _gathered:
        yield
        return
    _gathered.add(model)
    # validation runs in inference mode, and FSDP keeps the buffers that it makes here for training
    with torch.inference_mode(False), torch.no_grad():
        for unit in units:
            unit.unshard()
            unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(True, recurse=False)
        _gathered.discard(model)


def full_state_dict(model: nn.Module) -> dict[str, Tensor] | None:
    """Collect the weights of a sharded model, on the CPU of rank zero; every rank must call. None if not sharded."""
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        return None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    return state
