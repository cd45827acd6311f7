"""The training step that all modules share: per-item losses become the loss of an optimizer step, in micro-batches.

A module writes one method, `item_losses`. `training_step` below weights, averages and accumulates: one item is a pair,
or a prompt with its responses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer

from lightning_rlhf.batching.batches import PreferenceBatch, StepBatch
from lightning_rlhf.models.dropout import config_dropout
from lightning_rlhf.models.master_weights import refuse_half_weights
from lightning_rlhf.models.options import ModelOptions
from lightning_rlhf.modules.checkpoint import CheckpointModule
from lightning_rlhf.modules.optimizer import ParameterGroups, build_optimizer, described_optimizer, trial
from lightning_rlhf.modules.sharded import ShardedModule
from lightning_rlhf.protocols import StepData
from lightning_rlhf.runtime.fingerprint import KeepsArguments
from lightning_rlhf.runtime.metric_sums import RunningSums, logs_now
from lightning_rlhf.runtime.precision import check_dtype, check_precision
from lightning_rlhf.runtime.safety import check_trainer, essential_callbacks
from lightning_rlhf.runtime.step_callbacks import RepairFinishedEpoch, SeedDropout


Batch = TypeVar("Batch", bound=StepBatch)


@dataclass(frozen=True)
class ItemLosses:
    """Losses of the items of a micro-batch, padding items included.

    Args:
        losses: loss of each item, before its weight, [items]; carries gradient.
        num_tokens: token positions of the forward pass.
        metrics: numbers per item for logging and callbacks, [items] each; need not be detached.
        regularizer: a loss of the model that is no sum over items, scalar; carries gradient. It counts once per
            optimizer step.
    """

    losses: Tensor
    num_tokens: int
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    regularizer: Tensor | None = None


@dataclass(frozen=True)
class MicroBatch:
    """Result of a micro-batch.

    Args:
        loss: its part of the loss of the optimizer step, scalar.
        num_tokens: token positions of the forward pass.
        metrics: numbers per item without padding items, detached.
    """

    loss: Tensor
    num_tokens: int
    metrics: dict[str, Tensor]


class AbstractStepModule(KeepsArguments, CheckpointModule, ShardedModule, Generic[Batch], ABC):
    """A model trained on batches of our DataModules: a batch is an optimizer step, of one or more micro-batches.

    Implement `item_losses`. `training_step` returns ``loss`` and the metrics per item, for callbacks.

    Args:
        checkpoint: the model that is trained, named as `lightning_rlhf.models.load.resolve_checkpoint` reads it.
        options: how it is loaded and run.
        optimizer: makes the optimizer of parameter groups.
        lr_scheduler: makes the schedule of an optimizer; it advances with every optimizer step.

    Attributes:
        FREE_SETTINGS: arguments that change how fast a run is, but not its samples and updates; dots lead into groups.
        DISABLE_DROPOUT: default of ``options.disable_dropout``.
    """

    FREE_SETTINGS: ClassVar[frozenset[str]] = frozenset(
        f"options.{name}"
        for name in ("scoring_batch_tokens", "gradient_checkpointing", "layout", "attn_implementation", "use_vllm")
    )
    DISABLE_DROPOUT: ClassVar[bool] = True

    def __init__(
        self,
        checkpoint: str,
        *,
        options: ModelOptions,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable,
    ) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.options = options
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        default = self.DISABLE_DROPOUT if options.disable_dropout is None else options.disable_dropout
        self.disable_dropout: bool = default
        """Whether the dropout of the checkpoint is off in training."""
        self._sums = RunningSums()
        self.step_metrics: dict[str, Tensor] = {}
        """Loss of the newest training step and its metrics per item, detached, before the optimizer steps."""

    # -- for subclasses ------------------------------------------------------------------------------------------------

    @abstractmethod
    def item_losses(self, batch: Batch) -> ItemLosses:
        """Run the forward pass of a micro-batch and return one loss per item.

        Weights, padding items, averaging over ranks and accumulation are not the concern of this method.
        """

    def sums_to_log(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums over the items of a step, logged as means over items under ``train/`` and their name; default: none."""
        del metrics
        return {}

    def parameter_groups(self) -> ParameterGroups:
        """Parameter groups of the optimizer; default: one group with all trained parameters."""
        return [{"params": [parameter for parameter in self.parameters() if parameter.requires_grad]}]

    @property
    def trained_whole(self) -> bool:
        """Whether weights of the checkpoint are trained, not adapters alone."""
        return True

    # -- the training step ---------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Compute the loss of an optimizer step.

        All micro-batches but the last run forward and backward here; Lightning runs the backward pass of the last.
        ``train/loss`` is logged as the mean over the steps since it was last logged.
        """
        del batch_idx
        *first, last = batch.split()
        parts = [self._accumulate(part) for part in first]
        parts.append(self._micro_batch(last))
        # the value of the whole loss, with the gradient that is still missing
        loss = sum((earlier.loss for earlier in parts[:-1]), start=parts[-1].loss)
        # [items of a micro-batch] each, without padding items -> [num_items]
        metrics = {name: torch.cat([part.metrics[name] for part in parts]) for name in parts[0].metrics}
        # padding items have weight 0: they only give every rank as many micro-batches as the others
        num_items = len(batch) - batch.num_padding
        self.step_metrics = {"loss": loss.detach(), **metrics}
        self._log_means(loss, metrics, num_items)
        num_tokens = sum(part.num_tokens for part in parts)
        return {"loss": loss, **metrics, "num_items": num_items, "num_tokens": num_tokens}

    def _micro_batch(self, batch: Batch) -> MicroBatch:
        """Forward pass of a micro-batch and its part of the loss of the step."""
        out = self.item_losses(batch)
        num_counted = len(batch) - batch.num_padding
        # num_global is the number of items of the step on all ranks divided by the number of ranks, so that DDP's
        # average over ranks is the mean over items
        num_items = batch.num_global or len(batch)
        # loss = sum_i w_i l_i / n; padding items have w_i = 0
        loss = (batch.weight.to(out.losses) * out.losses).sum() / num_items
        if out.regularizer is not None:
            # shares that add up to 1 over the micro-batches of the step
            loss = loss + out.regularizer * num_counted / num_items
        # padding items are at the end: [items] -> [num_counted]
        metrics = {name: value.detach()[:num_counted] for name, value in out.metrics.items()}
        return MicroBatch(loss, out.num_tokens, metrics)

    def _accumulate(self, batch: Batch) -> MicroBatch:
        """Forward and backward pass whose gradients wait for those of the last micro-batch.

        DDP reduces gradients in the backward pass that follows `training_step`, so that these stay on their rank.
        """
        part = self._micro_batch(batch)
        # not scaled by accumulate_grad_batches, which the DataModule sets to 1: losses are divided by n
        # autocast covers forward passes only; the backward pass takes its data types from them
        with torch.autocast(self.device.type, enabled=False):
            self.trainer.strategy.backward(part.loss, None)
        return MicroBatch(part.loss.detach(), part.num_tokens, part.metrics)

    def _log_means(self, loss: Tensor, metrics: dict[str, Tensor], num_items: int) -> None:
        self._sums.add({"loss": loss, "steps": 1.0, "items": float(num_items), **self.sums_to_log(metrics)})
        # fetching waits for all queued kernels, and the sum over ranks is a collective: not in every step
        if not logs_now(self.trainer):
            return
        sums = self._sums.take(self.trainer)
        # mean loss = sum over ranks and steps / (ranks * steps), since every rank counts its own steps
        steps, items = sums.pop("steps"), sums.pop("items")
        # on the CPU: the progress bar reads it at every refresh, and would wait for the device
        mean = torch.tensor(sums.pop("loss") / steps)
        self.log("train/loss", mean, prog_bar=True, batch_size=num_items)
        for name, value in sums.items():
            self.log(f"train/{name}", torch.tensor(value / items), batch_size=num_items)

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


class AbstractPreferenceModule(AbstractStepModule[PreferenceBatch]):
    """A model trained on batches of `PreferenceDataModule`; an item is a pair."""
