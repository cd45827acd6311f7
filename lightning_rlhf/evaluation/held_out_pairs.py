"""Loss, rewards and accuracy of held-out pairs, over all pairs and by the source of the data.

The rows of all ranks are gathered before anything is averaged, so that one process and many report the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_rlhf.evaluation.pairs import PairMetrics
from lightning_rlhf.losses.preference import reward_accuracy
from lightning_rlhf.runtime import distributed


MOST_SUBSETS = 32
"""Sources that get metrics of their own; data with more, such as a web address per row, has none by source."""


@dataclass(frozen=True)
class HeldOutPair:
    """The evaluation of one held-out pair (a, b).

    Args:
        reward_a: reward of a: implicit, beta log pi/pi_ref in nats, or the output of a reward model.
        reward_b: reward of b.
        label: P(a preferred) in [0, 1].
        loss: loss of the pair before its weight.
        weight: weight of the pair, >= 0.
        length_a: tokens of a.
        length_b: tokens of b.
        subset: name of the source of the row; empty if it has none.
    """

    reward_a: float
    reward_b: float
    label: float
    loss: float
    weight: float
    length_a: float
    length_b: float
    subset: str = ""


class HeldOutPairs:
    """Collects the held-out pairs of one validation epoch, on every rank its own until `compute`."""

    def __init__(self) -> None:
        self._rows: list[HeldOutPair] = []

    def reset(self) -> None:
        """Forget all pairs: a new validation epoch begins."""
        self._rows = []

    def update(
        self,
        rewards: Tensor,
        labels: Tensor,
        losses: Tensor,
        weights: Tensor,
        lengths: Tensor,
        subsets: Sequence[str],
    ) -> None:
        """Take in pairs.

        Args:
            rewards: rewards of a and b, [pairs, 2].
            labels: P(a preferred) in [0, 1], [pairs].
            losses: loss of each pair before its weight, [pairs].
            weights: weight of each pair, >= 0, [pairs].
            lengths: tokens of a and b, > 0, [pairs, 2].
            subsets: source of each pair; empty where there is none.
        """
        columns = (rewards[:, 0], rewards[:, 1], labels, losses, weights, lengths[:, 0], lengths[:, 1])
        # one transfer for all columns, [pairs, 7]; moved before the conversion, since MPS has no float64
        table = torch.stack([column.detach().float().to(rewards.device) for column in columns], 1).cpu().tolist()
        for (a, b, label, loss, weight, length_a, length_b), subset in zip(table, subsets, strict=True):
            self._rows.append(HeldOutPair(a, b, label, loss, weight, length_a, length_b, subset))

    def compute(self) -> dict[str, float]:
        """Metrics of all pairs of all ranks by name, empty without pairs; every rank must call. See `pair_means`."""
        rows = distributed.interleave(lambda: self._rows)
        if not rows:
            return {}
        metrics = PairMetrics(sync_on_compute=False)
        columns = [[r.reward_a, r.reward_b, r.label, r.length_a, r.length_b] for r in rows]
        table = torch.tensor(columns, dtype=torch.float64)
        metrics.update(table[:, :2], table[:, 2], table[:, 3:])
        found = pair_means(rows) | {name: value.item() for name, value in metrics.compute().items()}
        subsets = sorted({row.subset for row in rows} - {""})
        if len(subsets) <= MOST_SUBSETS:
            for subset in subsets:
                means = pair_means([row for row in rows if row.subset == subset])
                found |= {f"source/{subset}/{name}": value for name, value in means.items()}
        return found


def pair_means(rows: Sequence[HeldOutPair]) -> dict[str, float]:
    """Means over pairs, at least one, with the more probable winner as the chosen response.

    - ``loss``: sum_i w_i l_i / n, the loss of an optimizer step of training on these n pairs.
    - ``rewards/chosen``, ``rewards/rejected``, ``rewards/margins``: mean reward of the chosen and of the rejected
      response, and of their difference.
    - ``accuracy``: share of pairs whose better response has the higher reward; a tie of reward or label counts 1/2.
    - ``pairs``: n.
    """
    columns = [[r.reward_a, r.reward_b, r.label, r.loss, r.weight] for r in rows]
    first, second, label, loss, weight = torch.tensor(columns, dtype=torch.float64).unbind(1)
    # as in batches of training, where labels lie in [0.5, 1]
    swapped = label < 0.5
    chosen, rejected = torch.where(swapped, second, first), torch.where(swapped, first, second)
    return {
        # weights do not enter the denominator, as in `AbstractStepModule`
        "loss": (weight * loss).mean().item(),
        "rewards/chosen": chosen.mean().item(),
        "rewards/rejected": rejected.mean().item(),
        "rewards/margins": (chosen - rejected).mean().item(),
        "accuracy": reward_accuracy(first - second, label).mean().item(),
        "pairs": float(len(rows)),
    }
