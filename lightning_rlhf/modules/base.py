"""The training step that all modules share: per-item losses become the loss of an optimizer step, in micro-batches.

A module writes one method, `item_losses`. `training_step` below weights, averages and accumulates: one item is a pair,
or a prompt with its responses. `lightning_rlhf.modules.fitting` has the checks and the optimizer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys  # has no public name

from lightning_rlhf.batching.batches import PreferenceBatch, StepBatch
from lightning_rlhf.batching.collate import collate_preferences
from lightning_rlhf.evaluation.held_out_pairs import HeldOutPairs
from lightning_rlhf.logprobs.packing import split_by_tokens
from lightning_rlhf.models.options import ModelOptions
from lightning_rlhf.modules.fitting import FittedModule
from lightning_rlhf.runtime.fingerprint import (
    CLASS_PATH,
    KeepsArguments,
    Settings,
    class_path,
    described,
    rebuildable,
)
from lightning_rlhf.runtime.metric_sums import RunningSums, logs_now
from lightning_rlhf.types import Comparison, Label, Preference, Prompt, State


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


class AbstractStepModule(KeepsArguments, FittedModule, Generic[Batch], ABC):
    """A model trained on batches of our DataModules: a batch is an optimizer step, of one or more micro-batches.

    Implement `item_losses`. `training_step` returns ``loss`` and the metrics per item, for callbacks.

    Args:
        checkpoint: the model that is trained, named as `lightning_rlhf.models.load.resolve_checkpoint` reads it.
        options: how it is loaded and run.
        optimizer: makes the optimizer of parameter groups.
        lr_scheduler: makes the schedule of an optimizer; it advances with every optimizer step.
    """

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
        self.disable_dropout = default
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

    # -- the training step ---------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Compute the loss of an optimizer step.

        All micro-batches but the last run forward and backward here; Lightning runs the backward pass of the last.
        ``train/loss`` is logged as the mean over the steps since it was last logged.
        """
        del batch_idx
        # num_global of every micro-batch is that of the whole step, so that their losses add up
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
            on_bar = name == "rewards/accuracies"
            self.log(f"train/{name}", torch.tensor(value / items), prog_bar=on_bar, batch_size=num_items)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: State) -> None:
        """Keep class and arguments: ``load_from_checkpoint`` and ``lightning-rlhf export`` build the module of them."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[CLASS_PATH] = class_path(type(self))
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = {
            # Lightning's own function for arguments as a config has them
            "_instantiator": "lightning.pytorch.cli.instantiate_module",
            **rebuildable({**cast(Settings, described(self))["init_args"], **described(self.described_optimizer())}),
        }

    def load_state_dict(
        self, state_dict: Mapping[str, object], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """Restore weights; frozen ones that the checkpoint leaves out are those of the model it was trained from.

        Raises:
            ValueError: if a trained weight is missing.
        """
        keys = super().load_state_dict(state_dict, strict=strict, assign=assign)
        missing = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        missing &= set(keys.missing_keys)
        if missing:
            raise ValueError(
                f"the checkpoint lacks {len(missing)} trained weights of {type(self).__name__}, such as "
                f"{min(missing)}: it is of another model or another adapter; check model.lora and the checkpoint"
            )
        return _IncompatibleKeys([], keys.unexpected_keys)


class AbstractPreferenceModule(AbstractStepModule[PreferenceBatch], ABC):
    """A model trained on batches of `PreferenceDataModule`; an item is a pair.

    Held-out rows with recorded pairs are evaluated by the loss of training, in eval mode and without decoding. Logged
    on validation: ``val/loss``, sum_i w_i l_i / n over the n pairs; ``val/rewards/chosen``, ``/rejected`` and
    ``/margins``; the metrics of `PairMetrics` under ``val/``, among them ``val/accuracy``; and, where rows name their
    source, ``val/source/NAME/...``.

    Args:
        checkpoint, options, optimizer, lr_scheduler: as in `AbstractStepModule`.

    Attributes:
        TRAINS_SINGLES: whether items may be single responses with labels of their own, see `Comparison.is_single`.
    """

    TRAINS_SINGLES: ClassVar[bool] = False

    def __init__(
        self,
        checkpoint: str,
        *,
        options: ModelOptions,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable,
    ) -> None:
        super().__init__(checkpoint, options=options, optimizer=optimizer, lr_scheduler=lr_scheduler)
        self.held_out = HeldOutPairs()
        self.held_out_results: dict[str, float] = {}
        """Metrics of the held-out pairs of the last validation, without ``val/``; empty without pairs."""

    def held_out_losses(self, batch: PreferenceBatch) -> ItemLosses:
        """Losses of a micro-batch of held-out pairs, with ``chosen_rewards`` and ``rejected_rewards`` in its metrics.

        Called in eval mode, without gradients. Default: `item_losses`.
        """
        return self.item_losses(batch)

    def evaluate_pairs(self, pairs: Sequence[Preference]) -> None:
        """Take the recorded pairs of a validation batch, at least one, into the held-out metrics."""
        comparisons = [preference.comparison for preference in pairs]
        groups = [(c.prompt.ids, (c.a.ids,) if c.is_single else (c.a.ids, c.b.ids)) for c in comparisons]
        layout = self.options.layout
        # the micro-batches of scoring: no gradients are kept, so that they may be larger than those of training
        for part in split_by_tokens(
            groups, self.options.scoring_batch_tokens, "shared" if layout == "auto" else layout
        ):
            batch = collate_preferences([pairs[i] for i in part])
            out = self.held_out_losses(batch.to(self.device))
            self.held_out.update(
                torch.stack([out.metrics["chosen_rewards"], out.metrics["rejected_rewards"]], 1),
                batch.label,
                out.losses,
                batch.weight,
                # a single response is neither longer nor shorter than another
                torch.tensor([[len(a), len(b) or len(a)] for a, b in zip(batch.chosen, batch.rejected, strict=True)]),
                [pairs[i].comparison.prompt.subset for i in part],
            )

    def held_out_metrics(self) -> dict[str, float]:
        """Metrics of the held-out pairs by name, without ``val/``; every rank must call."""
        return self.held_out.compute()

    def on_validation_epoch_start(self) -> None:
        """Start with no pairs."""
        super().on_validation_epoch_start()
        self.held_out.reset()

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of held-out pairs."""
        self.held_out_results = self.held_out_metrics()
        for name, value in self.held_out_results.items():
            self.log(f"val/{name}", value, sync_dist=True, batch_size=1)  # equal on all ranks already
        super().on_validation_epoch_end()


def recorded_pairs(prompts: Sequence[Prompt]) -> list[Preference]:
    """Recorded pairs of held-out rows with their recorded labels; rows without a pair are left out."""
    found = []
    for prompt in prompts:
        if prompt.pair is not None and prompt.recorded is not None:
            comparison = Comparison(prompt, *prompt.pair, branch="offline", weight=prompt.recorded.weight, passes=0.0)
            found.append(Preference(comparison, Label(prompt.recorded.probability, cost=0.0)))
    return found
