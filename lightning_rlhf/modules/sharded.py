"""Models that may be sharded (FSDP2): built where they are trained, and gathered where ranks do different work."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import TypeVar

import lightning as L
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_rlhf.models.sharding import build_sharded, gathered


Model = TypeVar("Model", bound=nn.Module)


class ShardedModule(L.LightningModule):
    """A LightningModule whose models are sharded under ModelParallelStrategy and whole under all other strategies."""

    def __init__(self) -> None:
        super().__init__()
        # entered in one hook and left in another, where a `with` block cannot reach
        self._gathered = ExitStack()

    def placed(self, build: Callable[[bool], Model], shard: Callable[[Model, DeviceMesh], None]) -> Model:
        """Build a model on the device of the run, in shards where models are sharded.

        Args:
            build: makes the model; given True, without its weights, on the meta device.
            shard: shards it in place, as `lightning_rlhf.models.sharding.shard` does.
        """
        # without a Trainer, as in `load_from_checkpoint`, the model is where this module is
        device = self.device if self._trainer is None else self.trainer.strategy.root_device
        if self.device_mesh is None:
            return build(False).to(device)
        return build_sharded(build, shard, self.device_mesh["data_parallel"], device)

    def frozen_models(self) -> list[nn.Module]:
        """Models beside the trained ones that are no submodules of this module and may be sharded; default: none."""
        return []

    def gathered(self) -> AbstractContextManager[None]:
        """Hold all sharded models whole for a while, as `lightning_rlhf.models.sharding.gathered` does."""
        return gathered(self, *self.frozen_models())

    def on_validation_epoch_start(self) -> None:
        """Gather sharded models: ranks validate on different numbers of prompts."""
        self._gathered.enter_context(self.gathered())

    def on_validation_epoch_end(self) -> None:
        """Shard them again."""
        self._gathered.close()
