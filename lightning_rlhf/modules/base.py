"""What all modules share: steps of several passes, sync-free figures, AdamW, seeded dropout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property
from typing import Any, ClassVar, cast

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from lightning_rlhf.collate import PreferenceBatch, StepBatch
from lightning_rlhf.generation.base import AbstractEngine, Decoding
from lightning_rlhf.loading import forget_finished_epoch
from lightning_rlhf.models.dropout import config_dropout
from lightning_rlhf.models.load import context_window, load_tokenizer, resolve_checkpoint
from lightning_rlhf.models.master_weights import MasterWeights, is_half, refuse_half_weights
from lightning_rlhf.models.precision import check_dtype, check_precision
from lightning_rlhf.models.sharding import build_sharded, gathered
from lightning_rlhf.prompts.tokenize import CHAT_TEMPLATES
from lightning_rlhf.randomness import Key
from lightning_rlhf.sums import RunningSums, logs_now


class AbstractStepModule(L.LightningModule, ABC):
    """A model trained on batches of our DataModules, each an optimizer step that may take several passes.

    Implement `pass_outputs`. `training_step` returns ``loss`` and what the passes found, for callbacks.

    Args:
        checkpoint: what is trained, as `lightning_rlhf.models.load.resolve_checkpoint` takes it.
        chat_template: Jinja chat template, a file with one, or a name in ``CHAT_TEMPLATES``.
        trust_remote_code: run code that comes with the checkpoint.
        learning_rate: peak learning rate of AdamW, > 0.
        weight_decay: decoupled weight decay of AdamW, >= 0.
        warmup_steps: optimizer steps of linear warm-up; constant afterwards.

    Attributes:
        FREE_SETTINGS: arguments that change how fast a run is, but not what it draws and learns.
    """

    FREE_SETTINGS: ClassVar[frozenset[str]] = frozenset(
        {"tokens_per_batch", "gradient_checkpointing", "layout", "attn_implementation", "use_vllm"}
    )

    dtype_name: str = "float32"
    """Floating-point type of the weights, ``model.dtype``."""
    disable_dropout: bool = True
    """Whether the dropout of the checkpoint is off in training."""

    def __init__(
        self,
        checkpoint: str,
        chat_template: str | None,
        trust_remote_code: bool,
        learning_rate: float,
        weight_decay: float,
        warmup_steps: int,
    ) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.chat_template = chat_template
        self.trust_remote_code = trust_remote_code
        if not 0 < learning_rate < float("inf"):
            raise ValueError(f"model.learning_rate must be > 0; got {learning_rate}")
        self.learning_rate = learning_rate
        if not 0 <= weight_decay < float("inf"):
            raise ValueError(f"model.weight_decay must be >= 0; got {weight_decay}")
        self.weight_decay = weight_decay
        if warmup_steps < 0:
            raise ValueError(f"model.warmup_steps must be >= 0; got {warmup_steps}")
        self.warmup_steps = warmup_steps
        self._sums = RunningSums()
        self._gathered = ExitStack()
        self.step_figures: dict[str, Tensor] = {}
        """Loss of the newest training step and what its passes found, detached, before the optimizer steps."""

    def setup(self, stage: str) -> None:
        """Check what the model will run on, before it is loaded.

        Raises:
            ValueError: under FSDP1, whose models cannot be gathered for forward passes that differ between ranks; or
                under a precision that the model cannot be computed or trained in.
        """
        plugin = self.trainer.precision_plugin
        check_precision(str(plugin.precision), type(plugin).__name__)
        if stage == "fit":
            check_dtype(self.dtype_name, str(plugin.precision), self.trained_whole)
        if isinstance(self.trainer.strategy, FSDPStrategy):
            raise ValueError(
                "trainer.strategy=fsdp is FSDP1, which cannot decode or score in rounds; use --config trainer/fsdp, "
                "which is FSDP2 (ModelParallelStrategy)"
            )

    @property
    def trained_whole(self) -> bool:
        """Whether weights of the checkpoint are trained, not adapters alone."""
        return True

    def free_settings(self) -> frozenset[str]:
        """Arguments that change neither what this run draws nor what it learns, for this checkpoint."""
        # runs of versions without this setting kept the dropout
        kept = not self.disable_dropout or not config_dropout(self._checkpoint_config)
        return self.FREE_SETTINGS | ({"disable_dropout"} if kept else set())

    def on_fit_start(self) -> None:
        """Refuse optimizers that the types of the weights do not suit."""
        refuse_half_weights(self.trainer.optimizers, type(self).__name__)

    def placed(self, build: Callable[[bool], Any], cut: Callable[[Any, DeviceMesh], None]) -> Any:
        """Build a model where it is trained: on the device of the run, in shards where models are sharded.

        Args:
            build: makes the model; given True without its weights, on the meta device.
            cut: shards it in place, as `lightning_rlhf.models.sharding.shard` does.
        """
        device = self.trainer.strategy.root_device
        if self.device_mesh is None:
            return build(False).to(device)
        return build_sharded(build, cut, self.device_mesh["data_parallel"], device)

    def frozen_models(self) -> list[torch.nn.Module]:
        """Models beside those that are trained, which are no part of this module, and may be sharded; none here."""
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

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; loads without the model, so that rows can be checked first."""
        template = CHAT_TEMPLATES.get(self.chat_template or "", self.chat_template)
        return load_tokenizer(self.checkpoint, template, self.trust_remote_code)

    @cached_property
    def context_window(self) -> int | None:
        """Longest sequence in tokens; None when the model sets no limit."""
        return context_window(self._checkpoint_config)

    @cached_property
    def _checkpoint_config(self) -> PreTrainedConfig:
        checkpoint = resolve_checkpoint(self.checkpoint)
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=self.trust_remote_code)
        return cast(PreTrainedConfig, config)

    def engine(self, decoding: Decoding) -> AbstractEngine | None:
        """Make what responses are drawn with; None where there is no policy, and pairs must be recorded ones."""
        del decoding
        return None

    def start_round(self, index: int) -> None:
        """Prepare for round ``index``; the DataModule calls this before it draws."""
        del index

    @abstractmethod
    def pass_outputs(self, batch: Any) -> dict[str, Any]:
        """Run one forward pass.

        Returns:
            ``loss``, the part of the pass in the loss of its step, with gradient; ``num_tokens``; and figures, one
            number per item that counts, detached.
        """

    def sums_to_log(self, figures: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums over the items of a step, logged as means over items under ``train/`` and their name; none here."""
        del figures
        return {}

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Compute the loss of the items of a step.

        All passes of the step but the last are run here, forward and backward; Lightning does the backward of the last.
        ``train/loss`` is logged as the mean over the steps since it was last logged.
        """
        del batch_idx
        *first, last = batch.split()
        outputs = [self._accumulated(part) for part in first]
        outputs.append(self.pass_outputs(last))
        # the loss of the whole, with the gradient that is still missing
        loss = sum((earlier["loss"] for earlier in outputs[:-1]), start=outputs[-1]["loss"])
        names = [name for name in outputs[0] if name not in ("loss", "num_tokens")]
        figures = {name: torch.cat([output[name] for output in outputs]) for name in names}
        num_items = len(batch) - batch.num_idle
        self.step_figures = {"loss": loss.detach(), **figures}
        self._log_means(loss, figures, num_items)
        num_tokens = sum(output["num_tokens"] for output in outputs)
        return {"loss": loss, **figures, "num_items": num_items, "num_tokens": num_tokens}

    def _log_means(self, loss: Tensor, figures: dict[str, Tensor], num_items: int) -> None:
        self._sums.add({"loss": loss, "steps": 1.0, "items": float(num_items), **self.sums_to_log(figures)})
        if not logs_now(self.trainer):
            return
        sums = self._sums.take(self.trainer)
        steps, items = sums.pop("steps"), sums.pop("items")
        # on the CPU: the progress bar reads it at every refresh, and would wait for the device
        mean = torch.tensor(sums.pop("loss") / steps)
        self.log("train/loss", mean, prog_bar=True, batch_size=num_items)
        for name, value in sums.items():
            self.log(f"train/{name}", torch.tensor(value / items), batch_size=num_items)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, and empty the gradients at once: the passes of a step add up, and no round is drawn with them."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Leave the gradients: Lightning would empty them before the last backward pass of a step."""

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over what is trained, on float32 copies of weights in bfloat16, with linear warm-up."""
        groups = self.parameter_groups()
        parameters = [parameter for group in groups for parameter in group["params"]]
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
        optimizer: Any = torch.optim.AdamW(groups, lr=self.learning_rate, weight_decay=self.weight_decay, fused=fused)
        # Lightning does not clip gradients, in bfloat16 neither, for optimizers that say that they unscale them
        optimizer._step_supports_amp_scaling = False
        if any(map(is_half, parameters)):
            optimizer = MasterWeights(optimizer)
        warmup = max(self.warmup_steps, 1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained, as groups of AdamW; one group here."""
        return [{"params": [parameter for parameter in self.parameters() if parameter.requires_grad]}]

    def on_train_batch_start(self, batch: StepBatch, batch_idx: int) -> None:
        """Seed dropout by the step, so that a resumed run continues as if it had not stopped."""
        del batch, batch_idx
        step = self.trainer.fit_loop.total_batch_idx
        seed = getattr(getattr(self.trainer, "datamodule", None), "seed", 0)
        torch.manual_seed(Key((seed, _DROPOUT, step, self.global_rank)).seed())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Mend a checkpoint that was saved at the end of an epoch, before Lightning restores it."""
        forget_finished_epoch(checkpoint)

    def _accumulated(self, batch: StepBatch) -> dict[str, Any]:
        """Forward and backward pass whose gradients wait for those of the step's last pass; what it found, detached.

        DDP reduces gradients in the backward pass that follows `training_step`, so that these stay on their rank.
        """
        outputs = self.pass_outputs(batch)
        # mixed precision is for the forward pass; the backward pass takes its types from it
        with torch.autocast(self.device.type, enabled=False):
            self.trainer.strategy.backward(outputs["loss"], None)
        return {**outputs, "loss": outputs["loss"].detach()}


class AbstractPreferenceModule(AbstractStepModule):
    """A model trained on batches of `PreferenceDataModule`; figures are one number per pair."""

    @abstractmethod
    def pass_outputs(self, batch: PreferenceBatch) -> dict[str, Any]:
        """Run one forward pass over pairs; see `AbstractStepModule.pass_outputs`."""


# first part of key paths below the run seed; the DataModule has its own
_DROPOUT = 100
