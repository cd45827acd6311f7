"""Build the optimizer and the schedule that the configuration names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_rlhf.models.master_weights import MasterWeights, is_half
from lightning_rlhf.modules.schedules import AbstractSchedule
from lightning_rlhf.runtime.fingerprint import described


ParameterGroups = list[dict[str, Any]]


def build_optimizer(
    groups: ParameterGroups,
    optimizer: OptimizerCallable,
    lr_scheduler: LRSchedulerCallable,
    planned_steps: Callable[[], int | None],
) -> OptimizerLRScheduler:
    """Build optimizer and schedule; the schedule advances with every optimizer step.

    Args:
        groups: parameter groups; a group may bring a learning rate of its own as ``lr``.
        optimizer: makes an optimizer of parameter groups.
        lr_scheduler: makes a schedule of an optimizer.
        planned_steps: optimizer steps of the run, None if they are not known; asked only by schedules that need it.

    Raises:
        ValueError: if a learning rate or weight decay is out of range, or a schedule needs the number of steps and
            nothing tells it.
    """
    built = checked_optimizer(groups, optimizer)
    use_fused_adamw(built)
    if any(map(is_half, parameters_of(built))):
        # steps on bfloat16 weights would round to no step at all
        built = MasterWeights(built)
    # of the wrapper, which copies its learning rates to the optimizer inside at every step
    schedule = lr_scheduler(built)
    if isinstance(schedule, AbstractSchedule) and schedule.needs_total_steps:
        schedule.total_steps = planned_steps()
        if schedule.total_steps is None:
            raise ValueError(
                f"{type(schedule).__name__} needs the number of optimizer steps, which rounds of varying size do not "
                f"tell in advance: set model.lr_scheduler.total_steps or trainer.max_steps"
            )
    return {"optimizer": built, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def parameters_of(optimizer: Optimizer) -> Iterator[Parameter]:
    """Parameters of all groups of an optimizer."""
    for group in optimizer.param_groups:
        yield from group["params"]


def forget_states(optimizer: Optimizer) -> None:
    """Let an optimizer go on as a fresh one, on the weights as they are; its schedule goes on."""
    if isinstance(optimizer, MasterWeights):
        optimizer.forget_states()
    else:
        optimizer.state.clear()


def checked_optimizer(groups: ParameterGroups, optimizer: OptimizerCallable) -> Optimizer:
    """Build the optimizer, and check learning rates and weight decays.

    Raises:
        ValueError: naming the setting that is out of range.
    """
    try:
        built = optimizer(groups)  # parameter groups are allowed wherever parameters are
    # torch refuses some values itself; its message does not say which setting of the config they are
    except ValueError as error:
        raise ValueError(f"model.optimizer: {error}") from error
    for group in built.param_groups:
        # an optimizer of another package may have neither setting: the defaults pass
        lr, decay = group.get("lr", 1.0), group.get("weight_decay", 0.0)
        if not 0 < lr < float("inf"):
            raise ValueError(f"model.optimizer.lr must be > 0; got {lr}")
        if not 0 <= decay < float("inf"):
            raise ValueError(f"model.optimizer.weight_decay must be >= 0; got {decay}")
    return built


def trial(optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable) -> tuple[Optimizer, Any] | None:
    """Optimizer and schedule on a parameter that is thrown away, to check and to describe them.

    None for an optimizer of another package that needs the real parameters or a GPU; it is checked when it is built.

    Raises:
        ValueError: naming the setting that is out of range.
    """
    # two dimensions: some optimizers take matrices only
    parameter = Parameter(torch.zeros(2, 2))
    try:
        built = checked_optimizer([{"params": [parameter]}], optimizer)
        return built, lr_scheduler(built)
    # a value out of range is an error of the user; any other failure may come from the small CPU parameter
    except ValueError:
        raise
    except Exception:
        return None


def described_optimizer(optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable) -> dict[str, Any]:
    """Optimizer and schedule as a config names them: class and arguments, whichever callables make them."""
    tried = trial(optimizer, lr_scheduler)
    if tried is None:
        return {"optimizer": described(optimizer), "lr_scheduler": described(lr_scheduler)}
    built, schedule = tried
    return {
        "optimizer": _as_config(built, built.defaults),
        # optimizers keep their arguments in `defaults`, schedules as attributes
        "lr_scheduler": _as_config(schedule, vars(schedule)),
    }


def _as_config(made: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    kind = type(made)
    # the first argument is the parameters or the optimizer, which are no settings
    names = list(inspect.signature(kind).parameters)[1:]
    return {
        "class_path": f"{kind.__module__}.{kind.__qualname__}",
        "init_args": {name: values[name] for name in names if name in values},
    }


def use_fused_adamw(optimizer: Optimizer) -> None:
    """Use the fused kernel of AdamW where the user has not chosen one and all parameters allow it."""
    # Lightning does not clip gradients for optimizers that say that they unscale them, in bfloat16 neither
    if hasattr(optimizer, "_step_supports_amp_scaling"):
        optimizer._step_supports_amp_scaling = False
    if type(optimizer) is not torch.optim.AdamW:
        return
    if not all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters_of(optimizer)):
        return
    for group in optimizer.param_groups:
        # torch refuses fused=True together with foreach or differentiable
        if group["fused"] is None and group["foreach"] is None and not group["differentiable"]:
            group["fused"] = True
