"""How well a labeler agrees with people, and its biases: position, length, and labels of low probability."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_rlhf.evaluation.calibration import calibration_bins, empty_bins, expected_calibration_error
from lightning_rlhf.evaluation.rates import two_sided_binomial_p, wilson_interval
from lightning_rlhf.losses.preference import reward_accuracy


LOW_MASS = 0.05
"""Label mass under which a judge's labels lie in the tail of its distribution."""


def same_position(first_forward: Tensor, first_reverse: Tensor) -> Tensor:
    """Say which position a judge prefers in both orders: 1 the first, -1 the second, 0 none; [pairs].

    RLAIF vs. RLHF (arXiv 2309.00267), appendix B. A judge that is undecided in either order prefers no position.

    Args:
        first_forward: P(first label) with a shown first, [pairs].
        first_reverse: P(first label) with b shown first, [pairs].
    """
    forward, reverse = torch.sign(first_forward - 0.5), torch.sign(first_reverse - 0.5)
    return torch.where(forward == reverse, forward, torch.zeros_like(forward))


class JudgeMetrics(Metric):
    """Agreement of a labeler with human preferences, and its biases.

    States are sums in float64, so that any number of processes gives the metrics of one.

    `compute` returns float64 scalars; a metric without pairs is NaN, and intervals are Wilson's and hold 95 %:

    - ``alignment``, ``_low``, ``_high``: AI labeler alignment (RLAIF vs. RLHF, section 2.3): share of human-labeled
      pairs whose likelier side by the labeler is the human choice. A tie of either counts 1/2.
    - ``one_order_alignment``: the same, had each pair been judged in one order only; mean of the two orders.
    - ``ece``, ``brier``: calibration of P(a preferred) against the human labels; see
      `lightning_rlhf.evaluation.calibration`. Brier is the mean of (P - label)^2.
    - ``longer_alignment``, ``_low``, ``_high``: alignment of "the longer response is better", the baseline that a
      labeler must beat (take one minus it where the shorter ones are better).
    - ``prefers_longer``: share of the labeled pairs in which the labeler prefers the longer response.
    - ``same_position``, ``_low``, ``_high``: share of pairs judged in both orders in which the same position wins, so
      that the order and not the content decided.
    - ``first_position``: of those, the share in which it is the first; ``first_position_p``: two-sided binomial p-value
      against a fair coin.
    - ``mass``, ``mass_min``, ``mass_low``: label mass: its mean, its minimum, and the share of pairs below 0.05.
    - ``pairs``, ``human_pairs``, ``position_pairs``, ``mass_pairs``: number of pairs behind these metrics.
    """

    is_differentiable = False
    full_state_update = False

    sums: Tensor
    bins: Tensor
    mass_min: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(len(_SUMS), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("bins", empty_bins(), dist_reduce_fx="sum")
        self.add_state("mass_min", torch.tensor(torch.inf, dtype=torch.float64), dist_reduce_fx="min")

    def update(
        self,
        probability: Tensor,
        human: Tensor,
        lengths: Tensor,
        first_forward: Tensor | None = None,
        first_reverse: Tensor | None = None,
        mass: Tensor | None = None,
    ) -> None:
        """Take in pairs; NaN stands for numbers of a pair that are not known.

        Args:
            probability: P(a preferred) by the labeler, [pairs]; NaN where it gave no label, as for too little mass,
                which still counts in the metrics about position and mass.
            human: P(a preferred) by people, 0 or 1 as a rule, [pairs].
            lengths: lengths of a and b, in any unit, [pairs, 2].
            first_forward: P(first label) with a shown first, [pairs].
            first_reverse: P(first label) with b shown first, [pairs].
            mass: probability that the judge answers with a label at all, the smaller of both orders, [pairs].
        """
        device = self.sums.device
        probability, human = probability.detach().double().to(device), human.double().to(device)
        unknown = torch.full_like(probability, torch.nan)
        forward, reverse, mass = (
            unknown if value is None else value.detach().double().to(device)
            for value in (first_forward, first_reverse, mass)
        )
        # ties in length count one half, as ties in preference
        longer = lengths[:, 0].double().to(device) - lengths[:, 1].double().to(device)
        # NaN marks a missing verdict or label; sums with NaN are NaN
        decided, labeled = ~probability.isnan(), ~(probability + human).isnan()
        chosen, stated, gap = human[labeled], probability[labeled], longer[labeled]
        # of pairs that were judged in both orders
        position = same_position(forward, reverse)[~(forward + reverse).isnan()]
        ordered = ~(probability + human + forward + reverse).isnan()
        # with b shown first, the first label names b: 1/2 - P(first label) > 0 where a is named
        by_label = [reward_accuracy(named[ordered], human[ordered]) for named in (forward - 0.5, 0.5 - reverse)]
        masses = mass[~mass.isnan()]
        ones = torch.ones_like
        # not in place: a metric may be reset and updated in and out of inference mode
        self.sums = self.sums + torch.stack(
            [
                decided.double().sum(),
                reward_accuracy(longer, probability)[decided].sum(),
                ones(chosen).sum(),
                reward_accuracy(stated - 0.5, chosen).sum(),
                (stated - chosen).square().sum(),
                reward_accuracy(gap, chosen).sum(),
                ones(position).sum(),
                (position != 0).double().sum(),
                (position > 0).double().sum(),
                ones(masses).sum(),
                masses.sum(),
                (masses < LOW_MASS).double().sum(),
                ordered.double().sum(),
                sum(by_label, torch.zeros_like(human[ordered])).sum() / 2,
                # polarity > 0 where labels name the preferred response, < 0 where they name the worse one
                ((probability - 0.5) * (forward - reverse))[ordered].sum(),
            ]
        )
        self.bins = self.bins + calibration_bins(stated, chosen)
        # the minimum of no pairs stays at its start
        if len(masses):
            self.mass_min = torch.minimum(self.mass_min, masses.min())

    def compute(self) -> dict[str, Tensor]:
        """The metrics, over all pairs of all processes."""
        n = dict(zip(_SUMS, self.sums.tolist(), strict=True))
        metrics: dict[str, float | Tensor] = {
            **_rate("alignment", n["agree"], n["human_pairs"]),
            "ece": expected_calibration_error(self.bins),
            "brier": _share(n["squared_error"], n["human_pairs"]),
            "one_order_alignment": self._one_order(n),
            **_rate("longer_alignment", n["longer_agree"], n["human_pairs"]),
            "prefers_longer": _share(n["prefers_longer"], n["pairs"]),
            **_rate("same_position", n["same_position"], n["position_pairs"]),
            "first_position": _share(n["first_position"], n["same_position"]),
            "first_position_p": two_sided_binomial_p(int(n["first_position"]), int(n["same_position"])),
            "mass": _share(n["mass"], n["mass_pairs"]),
            "mass_min": self.mass_min if n["mass_pairs"] else torch.nan,
            "mass_low": _share(n["low_mass"], n["mass_pairs"]),
            **{name: n[name] for name in ("pairs", "human_pairs", "position_pairs", "mass_pairs")},
        }
        return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in metrics.items()}

    @staticmethod
    def _one_order(n: dict[str, float]) -> float:
        # a task may ask for the worse response: then the first label is named where a is not preferred
        agree = n["label_agree"] if n["polarity"] >= 0 else n["ordered_pairs"] - n["label_agree"]
        return _share(agree, n["ordered_pairs"])


_SUMS = (
    *("pairs", "prefers_longer", "human_pairs", "agree", "squared_error", "longer_agree"),
    *("position_pairs", "same_position", "first_position", "mass_pairs", "mass", "low_mass"),
    *("ordered_pairs", "label_agree", "polarity"),
)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else torch.nan


def _rate(name: str, part: float, whole: float) -> dict[str, float]:
    low, high = wilson_interval(part, whole)
    return {name: _share(part, whole), f"{name}_low": low, f"{name}_high": high}
