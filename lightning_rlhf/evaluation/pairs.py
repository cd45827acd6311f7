"""How well two scores say which of two responses people prefer; exact on one process and on many."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_rlhf.evaluation.calibration import calibration_bins, empty_bins, expected_calibration_error
from lightning_rlhf.losses.preference import reward_accuracy


MARGINS = (0.5, 1.0, 2.0)
"""Borders between the classes of ``|r(a) - r(b)|`` that accuracies are given for."""

LENGTH_RATIOS = (1.25, 2.0)
"""Borders between the classes of longer over shorter length that accuracies are given for."""


class PairMetrics(Metric):
    """Accuracy, calibration and length bias of a reward model on labeled pairs.

    P(a preferred) is sigma(r(a) - r(b)), as the Bradley-Terry model has it; a tie of reward or label counts 1/2 in
    every accuracy. States are sums in float64, so that results do not depend on the number of processes.

    `compute` returns float64 scalars; NaN for metrics without a pair:

    - ``accuracy``: share of pairs whose better response has the higher reward.
    - ``longer_accuracy``: the accuracy of preferring the longer response, the baseline.
    - ``brier``: mean of (P - label)^2; ``nll``: mean cross-entropy, nats.
    - ``ece``: expected calibration error: mean over pairs of |confidence - accuracy| in ten bins of the confidence
      max(P, 1 - P), a tenth of [0.5, 1] wide.
    - ``accuracy_margin/...``: accuracy among pairs whose rewards differ by 0 to 0.5, 0.5 to 1, 1 to 2, and over 2.
    - ``accuracy_length_ratio/...``: accuracy among pairs whose longer response has 1 to 1.25, 1.25 to 2, and over 2
      times the length of the other.
    - ``accuracy_better_longer``, ``accuracy_better_shorter``: accuracy where the better response is the longer one, and
      where it is the shorter one; far apart in a model that looks at the length.
    - ``pairs``: their number.
    """

    is_differentiable = False
    full_state_update = False

    sums: Tensor
    bins: Tensor
    margins: Tensor
    lengths: Tensor
    ratios: Tensor

    def __init__(self, *, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.add_state("sums", torch.zeros(5, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("bins", empty_bins(), dist_reduce_fx="sum")
        self.add_state("margins", torch.zeros(len(MARGINS) + 1, 2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("ratios", torch.zeros(len(LENGTH_RATIOS) + 1, 2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("lengths", torch.zeros(2, 2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, scores: Tensor, labels: Tensor, lengths: Tensor) -> None:
        """Take in pairs.

        Args:
            scores: rewards of a and b, [pairs, 2].
            labels: P(a preferred) in [0, 1], [pairs].
            lengths: lengths of a and b, in any unit, > 0, [pairs, 2].
        """
        device = self.sums.device
        difference = (scores[:, 0] - scores[:, 1]).detach().double().to(device)
        labels, lengths = labels.double().to(device), lengths.double().to(device)
        longer = lengths[:, 0] - lengths[:, 1]
        agrees = reward_accuracy(difference, labels)
        # P(a preferred) = sigma(r(a) - r(b))
        probability = difference.sigmoid()
        # -label log P - (1 - label) log(1 - P), from the logit: log P stays finite where P rounds to 0 or 1
        nll = torch.nn.functional.binary_cross_entropy_with_logits(difference, labels, reduction="none")
        columns = (torch.ones_like(labels), agrees, reward_accuracy(longer, labels), (probability - labels) ** 2, nll)
        # not in place: a metric may be reset and updated in and out of inference mode
        self.sums = self.sums + torch.stack([column.sum() for column in columns])

        self.bins = self.bins + calibration_bins(probability, labels)
        borders = torch.tensor(MARGINS, dtype=torch.float64, device=device)
        # columns: number of pairs, and how many are right; [pairs, 2]
        counted = torch.stack([torch.ones_like(agrees), agrees], 1)
        # right=True: a border belongs to the class above it
        self.margins = self.margins.index_add(0, torch.bucketize(difference.abs(), borders, right=True), counted)
        ratio = lengths.amax(1) / lengths.amin(1)
        borders = torch.tensor(LENGTH_RATIOS, dtype=torch.float64, device=device)
        self.ratios = self.ratios.index_add(0, torch.bucketize(ratio, borders, right=True), counted)
        # > 0 where the better response is the longer one, < 0 where it is the shorter one, 0 on ties
        better_longer = longer * (labels - 0.5)
        by_length = [counted[chosen].sum(0) for chosen in (better_longer > 0, better_longer < 0)]
        self.lengths = self.lengths + torch.stack(by_length)

    def compute(self) -> dict[str, Tensor]:
        """The metrics, over all pairs of all processes."""
        pairs, agree, longer, brier, nll = self.sums.unbind()
        names = ["0-0.5", "0.5-1", "1-2", "2-inf"]
        by_margin = zip(names, self.margins, strict=True)
        by_ratio = zip(("1-1.25", "1.25-2", "2-inf"), self.ratios, strict=True)
        return {
            "accuracy": agree / pairs,
            "longer_accuracy": longer / pairs,
            "brier": brier / pairs,
            "nll": nll / pairs,
            "ece": expected_calibration_error(self.bins),
            **{f"accuracy_margin/{name}": right / count for name, (count, right) in by_margin},
            **{f"accuracy_length_ratio/{name}": right / count for name, (count, right) in by_ratio},
            "accuracy_better_longer": self.lengths[0, 1] / self.lengths[0, 0],
            "accuracy_better_shorter": self.lengths[1, 1] / self.lengths[1, 0],
            "pairs": pairs,
        }
