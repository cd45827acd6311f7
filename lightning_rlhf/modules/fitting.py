"""The run around the training steps of a module: checks before its weights are loaded, callbacks, the optimizer."""

from __future__ import annotations

from typing import Any, ClassVar

import lightning as L
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim import Optimizer

from lightning_rlhf.models.dropout import config_dropout
from lightning_rlhf.models.master_weights import refuse_half_weights
from lightning_rlhf.modules.checkpoint import CheckpointModule
from lightning_rlhf.modules.optimizer import ParameterGroups, build_optimizer, described_optimizer, trial
from lightning_rlhf.modules.sharded import ShardedModule
from lightning_rlhf.protocols import StepData
from lightning_rlhf.runtime.precision import check_dtype, check_precision
from lightning_rlhf.runtime.safety import check_trainer, essential_callbacks
from lightning_rlhf.runtime.step_callbacks import RepairFinishedEpoch, SeedDropout


class FittedModule(CheckpointModule, ShardedModule):
    """A module that a Trainer can fit, apart from its training step.

    Attributes:
        FREE_SETTINGS: arguments that change how fast a run is, but not its samples and updates; dots lead into groups.
        DISABLE_DROPOUT: default of ``options.disable_dropout``.
        optimizer: makes the optimizer of parameter groups.
        lr_scheduler: makes the schedule of an optimizer; it advances with every optimizer step.
        disable_dropout: whether the dropout of the checkpoint is off in training.
    """

    FREE_SETTINGS: ClassVar[frozenset[str]] = frozenset(
        f"options.{name}"
        for name in (
            *("scoring_batch_tokens", "gradient_checkpointing", "layout", "attn_implementation"),
            *("generation", "server", "use_vllm"),
        )
    )
    DISABLE_DROPOUT: ClassVar[bool] = True

    optimizer: OptimizerCallable
    lr_scheduler: LRSchedulerCallable
    disable_dropout: bool

    def parameter_groups(self) -> ParameterGroups:
        """Parameter groups of the optimizer; default: one group with all trained parameters."""
        return [{"params": [parameter for parameter in self.parameters() if parameter.requires_grad]}]

    @property
    def trained_whole(self) -> bool:
        """Whether weights of the checkpoint are trained, not adapters alone."""
        return True

    # -- checks before the model is loaded -----------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check strategy, precision and optimizer before the model is loaded.

        Raises:
            ValueError: under FSDP1, whose models cannot be gathered for forward passes that differ between ranks; or
                under a precision that the model cannot be computed or trained in; or if a setting of the optimizer is
                out of range.
        """
        plugin = self.trainer.precision_plugin
        check_precision(str(plugin.precision), type(plugin).__name__)
        if stage == "fit":
            check_dtype(self.options.dtype, str(plugin.precision), self.trained_whole)
            # a setting that is out of range fails here rather than after the weights are loaded
            trial(self.optimizer, self.lr_scheduler)
        if isinstance(self.trainer.strategy, FSDPStrategy):
            raise ValueError(
                "trainer.strategy=fsdp is FSDP1, which cannot decode or score in rounds; use --config trainer/fsdp, "
                "which is FSDP2 (ModelParallelStrategy)"
            )

    def on_fit_start(self) -> None:
        """Refuse optimizers that do not suit the data types of the weights."""
        refuse_half_weights(self.trainer.optimizers, type(self).__name__)

    def free_settings(self) -> frozenset[str]:
        """Settings that change neither samples nor updates of this run, for this checkpoint."""
        # runs of versions without this setting kept the dropout
        kept = not self.disable_dropout or not config_dropout(self._checkpoint_config)
        return self.FREE_SETTINGS | ({"options.disable_dropout"} if kept else set())

    def resolved_settings(self) -> dict[str, Any]:
        """Settings whose default depends on the class, by their path, as they are in force."""
        return {"options.disable_dropout": self.disable_dropout}

    def described_optimizer(self) -> dict[str, Any]:
        """Optimizer and schedule by class and arguments."""
        return described_optimizer(self.optimizer, self.lr_scheduler)

    # -- callbacks and optimizer ---------------------------------------------------------------------------------------

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, and empty the gradients at once: micro-batches add theirs up, and no round is sampled with them."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Leave the gradients: Lightning would empty them before the last backward pass of a step."""

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer, on float32 master weights where weights are bfloat16, and the schedule."""
        return build_optimizer(self.parameter_groups(), self.optimizer, self.lr_scheduler, self._planned_steps)

    def _planned_steps(self) -> int | None:
        # -1 is Lightning's value for no limit
        if self.trainer.max_steps != -1:
            return self.trainer.max_steps
        datamodule = getattr(self.trainer, "datamodule", None)
        return datamodule.planned_steps() if isinstance(datamodule, StepData) else None

    def configure_callbacks(self) -> list[L.Callback]:
        """Callbacks that a training run must have, whatever list the Trainer was given; Lightning adds them.

        Raises:
            ValueError: if the Trainer has one that cannot work with rounds.
        """
        # Lightning calls this hook for validate and predict too, where nothing is trained
        if self.trainer.state.fn != TrainerFn.FITTING:
            return []
        check_trainer(self.trainer)
        return [SeedDropout(), RepairFinishedEpoch(), *essential_callbacks(self.trainer)]
