"""AOT: alignment by optimal transport in one dimension, of the margins of a micro-batch instead of single pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rlhf.losses.preference import AbstractPreferenceLoss, PairLogps, dpo_loss


def matched(values: Tensor, targets: Tensor) -> Tensor:
    """The target of the same rank for each value, which is the optimal transport on the line; shape [n].

    Args:
        values: [n]; only their order is used.
        targets: [n].
    """
    # the k-th smallest value is matched with the k-th smallest target, for every convex cost
    result = torch.empty_like(targets)
    result[values.detach().argsort(stable=True)] = targets.sort().values
    return result


def aot_loss(first: Tensor, second: Tensor, confidence: Tensor, beta: float) -> Tensor:
    """DPO loss of the quantile differences of two samples; shape [n], in the order of the first sample.

    Melnyk et al. 2024 (arXiv 2406.05882): the loss is small where the first sample dominates the second
    stochastically in first order. A single pair is DPO.

    Args:
        first: the sample that should dominate, [n], nats; carries gradient.
        second: the other sample, [n], nats; may carry gradient.
        confidence: P(label is right) of each item of the first sample, [n].
        beta: strength of the pull towards the reference, > 0.
    """
    # L = 1/n sum_k -log sigma(beta (first_(k) - second_(k))) with order statistics (k)
    return dpo_loss(first - matched(first, second), confidence, beta)


class AOTLoss(AbstractPreferenceLoss):
    """AOT, Melnyk et al. 2024 (arXiv 2406.05882), on the pairs of a micro-batch.

    Paired: the policy's margins ``log pi(y_w) - log pi(y_l)`` should dominate those of the reference. Unpaired: the
    log-ratios of preferred responses should dominate those of the others. The only loss in which a pair depends on the
    others: the result depends on the size of micro-batches and the number of ranks, and one pair per micro-batch is
    DPO. A label counts for the response that it prefers (the chosen one at 1/2), by its distance from 1/2. The weight
    of a pair counts at the rank of its margin, or of its preferred response.

    Args:
        paired: margins within pairs; false compares the responses without their pairs.
        label_smoothing: probability that a label is wrong, in [0, 0.5).

    Raises:
        ValueError: if label_smoothing is out of range.
    """

    def __init__(self, paired: bool = True, label_smoothing: float = 0.0) -> None:
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(
                f"AOTLoss expects a label_smoothing in [0, 0.5), the probability that a label is wrong; "
                f"got {label_smoothing}. Use 0 for none"
            )
        self.paired, self.label_smoothing = paired, label_smoothing

    def __call__(self, pairs: PairLogps, beta: float) -> Tensor:
        # the order statistics need to know which response is the preferred one
        prefers_rejected = pairs.label < 0.5
        confidence = torch.where(prefers_rejected, 1 - pairs.label, pairs.label)
        confidence = (1 - self.label_smoothing) * confidence + self.label_smoothing * (1 - confidence)
        if self.paired:
            sign = torch.where(prefers_rejected, -1.0, 1.0).to(pairs.policy_chosen)
            first = sign * (pairs.policy_chosen - pairs.policy_rejected)
            second = sign * (pairs.reference_chosen - pairs.reference_rejected)
        else:
            chosen = pairs.policy_chosen - pairs.reference_chosen
            rejected = pairs.policy_rejected - pairs.reference_rejected
            first = torch.where(prefers_rejected, rejected, chosen)
            second = torch.where(prefers_rejected, chosen, rejected)
        return aot_loss(first, second, confidence, beta)
