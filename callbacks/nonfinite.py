"""Keep NaN and infinite losses and gradients from the weights, and log the norm of the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from lightning_rlhf.batching.batches import StepBatch
from lightning_rlhf.protocols import TrainedModule, module_of
from lightning_rlhf.runtime import distributed
from lightning_rlhf.runtime.metric_sums import logs_now
from lightning_rlhf.types import State


class NonFiniteGuard(Callback):
    """Checks every optimizer step, before it is taken, for a loss or gradient that is NaN or infinite.

    The message names the pairs (rollouts, rows) whose metrics are not finite, by round and prompt; if all metrics are
    finite, it names all of the step. The weights and the state of the optimizer stay as they were. On a
    GPU the check waits for the backward pass, once per step. Under ``trainer.precision=16-mixed`` a gradient overflows
    now and then because the loss is scaled up: as long as the loss itself is finite, such a step is dropped and the
    scale lowered, whatever ``action`` says, up to ``most_in_a_row`` times.

    On logged steps ``train/grad_norm`` is the Euclidean norm of the gradient of all trained weights, before clipping.

    Args:
        action: ``stop`` ends the run with an error, ``skip`` drops the step, warns and goes on.
        most_in_a_row: with ``skip``, steps in a row that may be dropped until the run ends all the same, >= 1.
    """

    def __init__(self, action: Literal["stop", "skip"] = "stop", most_in_a_row: int = 10) -> None:
        if action not in ("stop", "skip"):
            raise ValueError(f"NonFiniteGuard.action must be stop or skip; got {action!r}")
        if most_in_a_row < 1:
            raise ValueError(f"NonFiniteGuard.most_in_a_row must be at least 1; got {most_in_a_row}")
        self.action, self.most_in_a_row = action, most_in_a_row
        self.skipped = 0
        """Steps dropped so far."""
        self._in_a_row = 0
        self._batch: StepBatch | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch, for its names."""
        self._batch = batch

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at loss and gradient; forget the gradient if it is unusable."""
        metrics = module_of(trainer, TrainedModule, "NonFiniteGuard").step_metrics
        gradients: list[Tensor] = []
        for group in optimizer.param_groups:
            gradients += [parameter.grad for parameter in group["params"] if parameter.grad is not None]
        loss_finite = torch.isfinite(metrics["loss"])
        # both checks as one number: the device is waited for once
        finite = bool(loss_finite & all_finite(gradients))
        # one rank alone must not drop the step: its weights would part from those of the others
        if not distributed.any_rank(not finite):
            self._in_a_row = 0
            if logs_now(trainer):
                norm = gradient_norm(gradients)
                pl_module.log("train/grad_norm", norm, on_step=True, on_epoch=False, batch_size=1)
            return
        # on every rank alike: without gradients the optimizer changes neither weights nor its own state
        optimizer.zero_grad(set_to_none=True)
        self.skipped += 1
        self._in_a_row += 1
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if scaled and self._in_a_row < self.most_in_a_row and not distributed.any_rank(not bool(loss_finite)):
            return  # the scaler drops the step, and lowers its scale
        names = [] if self._batch is None else list(self._batch.names)
        # the rank with the bad item may be another one
        found = distributed.interleave(lambda: offenders(names, metrics))
        suspects = found or distributed.interleave(lambda: names)
        message = (
            f"the loss or its gradient is not finite in step {trainer.global_step}; "
            + ("by their metrics, it is " if found else "the metrics are finite, so it is one of ")
            + ", ".join(dict.fromkeys(suspects))
        )
        if self.action == "stop" or self._in_a_row >= self.most_in_a_row:
            raise FloatingPointError(
                f"{message}. The weights are those before the step. Look at these responses in the ledger; lower "
                f"model.optimizer.lr, use float32 or bfloat16 in place of float16"
                + (", or drop such steps with NonFiniteGuard.action=skip" if self.action == "stop" else "")
                + (f". {self._in_a_row} steps in a row were like this" if self._in_a_row > 1 else "")
            )
        rank_zero_warn(f"{message}. The step is dropped, the {self.skipped}. of this run", stacklevel=2)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log how many steps were dropped, once one was."""
        self._batch = None
        if self.skipped:
            pl_module.log("train/skipped_steps", float(self.skipped), on_step=True, on_epoch=False, batch_size=1)

    def state_dict(self) -> State:
        """How many steps were dropped."""
        return {"skipped": self.skipped, "in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: State) -> None:
        """Restore the state of `state_dict`."""
        self.skipped, self._in_a_row = state_dict["skipped"], state_dict["in_a_row"]


def all_finite(tensors: list[Tensor]) -> Tensor:
    """Whether all numbers of some tensors are finite, as one number on their device; nothing is fetched.

    Sharded tensors are looked at where they lie: the part of this rank.
    """
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    local = [tensor for tensor in local if tensor.numel()]  # fewer rows than ranks leave some with nothing
    # max |x| is NaN or infinite if and only if some x is
    norms = list(torch._foreach_norm(local, float("inf"))) if local else []
    if not norms:
        return torch.tensor(True)
    device = norms[0].device
    return torch.stack([norm.to(device, torch.float32) for norm in norms]).isfinite().all()


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """Euclidean norm of all numbers of some tensors, a scalar; of sharded ones with the parts of all ranks."""
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    norms = [get_total_norm(part).float() for part in (sharded, whole) if part]
    full = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return torch.stack(full).norm() if full else torch.tensor(0.0)


def offenders(names: list[str], metrics: Mapping[str, Tensor]) -> list[str]:
    """Names of the items with a metric that is not finite.

    Args:
        names: names of the items of a step, padding items at the end.
        metrics: metrics of the step, one number per item without padding items; others are ignored.
    """
    bad: set[int] = set()
    for value in metrics.values():
        if value.ndim == 1 and len(value) <= len(names):
            bad.update((~value.isfinite()).nonzero().flatten().tolist())
    return [names[i] for i in sorted(bad)]
