"""Learning-rate schedules with linear warm-up, named on the command line: ``--model.lr_scheduler=CosineWithWarmup``.

The factor of optimizer step ``s`` (from 0) is ``min(1, (s + 1) / warmup_steps)`` times the decay of the schedule.
"""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class AbstractSchedule(LambdaLR):
    """A schedule whose factor is warm-up times `decay`.

    Args:
        optimizer: optimizer of the run.
        warmup_steps: optimizer steps of linear warm-up, >= 0.
        total_steps: optimizer steps of the run, >= 1; None if the schedule does not depend on it, or if the module is
            to set it before the first step.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int, total_steps: int | None) -> None:
        if warmup_steps < 0:
            raise ValueError(f"model.lr_scheduler.warmup_steps must be >= 0; got {warmup_steps}")
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"model.lr_scheduler.total_steps must be >= 1; got {total_steps}")
        # before the constructor of LambdaLR, which calls `factor` for step 0
        self.warmup_steps, self.total_steps = warmup_steps, total_steps
        # a plain function: torch writes the attributes of other callables into checkpoints
        super().__init__(optimizer, lambda step: self.factor(step))

    def state_dict(self) -> dict[str, Any]:
        """Position in the schedule; its settings are those of the new start, e.g. after a longer run was asked for."""
        settings = ("warmup_steps", "total_steps", "final_factor", "decay_fraction")
        return {name: value for name, value in super().state_dict().items() if name not in settings}

    @property
    def needs_total_steps(self) -> bool:
        """Whether `decay` depends on the number of steps and does not know it yet."""
        return False

    def factor(self, step: int) -> float:
        """Factor on the peak learning rate in optimizer step ``step``, from 0."""
        # min(1, (t + 1) / W) decay(t); t + 1, since a factor of 0 would waste the first step
        return min(1.0, (step + 1) / max(self.warmup_steps, 1)) * self.decay(step)

    def decay(self, step: int) -> float:
        """Factor after warm-up; 1 keeps the peak learning rate."""
        del step
        return 1.0


class ConstantWithWarmup(AbstractSchedule):
    """Linear warm-up, then constant.

    Args:
        optimizer: optimizer of the run.
        warmup_steps: optimizer steps of linear warm-up, >= 0.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int = 0) -> None:
        super().__init__(optimizer, warmup_steps, None)


class AbstractDecaySchedule(AbstractSchedule):
    """A schedule that decays towards the end of the run.

    Args:
        optimizer: optimizer of the run.
        warmup_steps: optimizer steps of linear warm-up, >= 0.
        total_steps: optimizer steps of the run, >= 1; default: ``trainer.max_steps``, or the steps that the DataModule
            plans for ``trainer.max_epochs``.
        final_factor: factor at the end, in [0, 1].
    """

    def __init__(
        self, optimizer: Optimizer, warmup_steps: int = 0, total_steps: int | None = None, final_factor: float = 0.0
    ) -> None:
        if not 0 <= final_factor <= 1:
            raise ValueError(f"model.lr_scheduler.final_factor must lie in [0, 1]; got {final_factor}")
        self.final_factor = final_factor
        super().__init__(optimizer, warmup_steps, total_steps)

    @property
    def needs_total_steps(self) -> bool:
        """Whether the number of steps is still to be set."""
        return self.total_steps is None

    def progress(self, step: int, start: int) -> float:
        """Share of the steps from ``start`` to the end that are over, in [0, 1]; 0 while the end is not known."""
        if self.total_steps is None:
            return 0.0
        # (t - start) / (T - start), clipped to [0, 1]; T may equal start where warm-up fills the run
        return min(max(step - start, 0) / max(self.total_steps - start, 1), 1.0)

    def between(self, share: float) -> float:
        """Point between 1 (share 1) and ``final_factor`` (share 0)."""
        # f + (1 - f) share
        return self.final_factor + (1.0 - self.final_factor) * share


class CosineWithWarmup(AbstractDecaySchedule):
    """Linear warm-up, then half a cosine down to ``final_factor``."""

    def decay(self, step: int) -> float:
        """Compute (1 + cos(pi * progress)) / 2, scaled to end at ``final_factor``."""
        return self.between((1.0 + math.cos(math.pi * self.progress(step, self.warmup_steps))) / 2.0)


class LinearWithWarmup(AbstractDecaySchedule):
    """Linear warm-up, then linear decay to ``final_factor``."""

    def decay(self, step: int) -> float:
        """Compute 1 - progress, scaled to end at ``final_factor``."""
        return self.between(1.0 - self.progress(step, self.warmup_steps))


class WarmupStableDecay(AbstractDecaySchedule):
    """Linear warm-up, a constant part, then linear decay to ``final_factor`` (WSD; Hu et al. 2024, arXiv 2404.06395).

    Args:
        optimizer: optimizer of the run.
        warmup_steps: optimizer steps of linear warm-up, >= 0.
        total_steps: optimizer steps of the run, >= 1; default: ``trainer.max_steps``, or the steps that the DataModule
            plans for ``trainer.max_epochs``.
        decay_fraction: fraction of the steps at the end that decay, in (0, 1].
        final_factor: factor at the end, in [0, 1].
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int = 0,
        total_steps: int | None = None,
        decay_fraction: float = 0.1,
        final_factor: float = 0.0,
    ) -> None:
        if not 0 < decay_fraction <= 1:
            raise ValueError(f"model.lr_scheduler.decay_fraction must lie in (0, 1]; got {decay_fraction}")
        self.decay_fraction = decay_fraction
        super().__init__(optimizer, warmup_steps, total_steps, final_factor)

    def decay(self, step: int) -> float:
        """Stay at 1 until the last ``decay_fraction`` of the steps, then decay linearly."""
        # start = T (1 - decay_fraction); T is not known yet when LambdaLR asks for the first factor
        start = round((self.total_steps or 0) * (1.0 - self.decay_fraction))
        return self.between(1.0 - self.progress(step, start))
