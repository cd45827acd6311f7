"""An exponential moving average of the weights, which is evaluated and exported in their place."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_rlhf.types import State


class WeightAverage(Callback):
    """Averages the trained weights over optimizer steps (Polyak averaging), for validation and export.

    After step t the average moves towards the weights, ``w_avg <- d w_avg + (1 - d) w`` with
    ``d = min(decay, (1 + t) / (10 + t))``. Validations during training and `HFExport` use the average; training and
    the samples of rounds use the weights themselves, and so does a run that is continued. In Python, the module has the
    averaged weights when ``trainer.fit`` returns. ``lightning-rlhf validate --ckpt_path`` evaluates the weights of the
    checkpoint; evaluate the exported model for the average.

    Unlike Lightning's ``EMAWeightAveraging`` it copies trained weights only, not the whole module with its reference.
    Sharded models are refused.

    Args:
        decay: weight of the old average, in [0, 1); 0.97 averages over about 33 steps.
    """

    def __init__(self, decay: float = 0.97) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"WeightAverage.decay must lie in [0, 1); got {decay}")
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        """Averaged weights by name, float32 or float64."""
        self._steps = 0
        self._weights: dict[str, Tensor] | None = None
        self._is_final = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the weights of the model, or go on with the average of the checkpoint.

        Raises:
            ValueError: if the model is sharded.
        """
        if getattr(pl_module, "device_mesh", None) is not None:
            raise ValueError("WeightAverage does not average sharded models; use DDP, or leave the callback out")
        self._is_final = False
        own = _trained(pl_module)
        if not self.average:
            self.average = {name: _wide(parameter).clone() for name, parameter in own.items()}
        self.average = {name: value.to(own[name].device) for name, value in self.average.items()}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Move the average."""
        # a batch is an optimizer step, unless a guard dropped the step
        if trainer.global_step <= self._steps:
            return
        self._steps = trainer.global_step
        decay = min(self.decay, (1 + self._steps) / (10 + self._steps))
        for name, parameter in _trained(pl_module).items():
            # w_avg += (1 - d) (w - w_avg)
            self.average[name].lerp_(_wide(parameter), 1 - decay)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average into the model."""
        if self.average and self._weights is None:
            self._weights = self._exchange(pl_module, self.average)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the weights back."""
        self._restore(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the weights back: a checkpoint may be written now."""
        self._restore(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the model."""
        self.finish(pl_module)

    def finish(self, pl_module: LightningModule) -> None:
        """Put the average into the model for good, after the last checkpoint; `HFExport` asks for it."""
        if self.average and not self._is_final:
            self._exchange(pl_module, self.average)
            self._is_final = True

    def state_dict(self) -> State:
        """The average and its number of steps."""
        return {"steps": self._steps, "average": {name: value.cpu() for name, value in self.average.items()}}

    def load_state_dict(self, state_dict: State) -> None:
        """Restore the state of `state_dict`."""
        self._steps = state_dict["steps"]
        self.average = {name: value.clone() for name, value in state_dict["average"].items()}

    def _restore(self, pl_module: LightningModule) -> None:
        if self._weights is not None:
            self._exchange(pl_module, self._weights)
            self._weights = None

    @staticmethod
    @torch.no_grad()
    def _exchange(pl_module: LightningModule, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Set the trained weights; returns the old ones."""
        old = {}
        for name, parameter in _trained(pl_module).items():
            old[name] = parameter.detach().clone()
            parameter.copy_(values[name])
        return old


def _trained(pl_module: LightningModule) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in pl_module.named_parameters() if parameter.requires_grad}


def _wide(parameter: nn.Parameter) -> Tensor:
    # half precision would lose the small steps of the average
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
