"""Win rate of one policy against another, and harmless rate of one, each with its length-controlled version."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_rlhf.evaluation.rates import length_controlled_rate, wilson_interval


class TableMetric(Metric):
    """A metric that needs all it has seen at once; every process gets the rows of all, those without any too.

    `sorted_rows` gives them in an order that does not depend on who saw which, so that sums are exactly those of one
    process.

    Args:
        width: numbers per row.
    """

    is_differentiable = False
    full_state_update = False

    rows: list[Tensor]

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.add_state("rows", [], dist_reduce_fx="cat")

    def add_rows(self, *columns: Tensor) -> None:
        """Take in rows, given by their columns, [rows] each."""
        self.rows.append(torch.stack([column.detach().double().flatten() for column in columns], 1).to(self.device))

    def sorted_rows(self) -> list[Tensor]:
        """The columns of all rows, [rows] each, float64 on the CPU; sorted by the first column, then the next."""
        # while processes are in step the state is one tensor
        table = dim_zero_cat([self._no_rows(), *self.rows] if isinstance(self.rows, list) else self.rows).cpu()
        # stable sorts from the last column to the first: lexicographic order of the rows
        for column in reversed(range(self.width)):
            table = table[torch.sort(table[:, column], stable=True).indices]
        return list(table.unbind(1))

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # a process without rows would take part in no gathering, and the others would wait for it
        if isinstance(self.rows, list) and not self.rows:
            self.rows.append(self._no_rows())
        super()._sync_dist(*args, **kwargs)

    def _no_rows(self) -> Tensor:
        return torch.zeros(0, self.width, dtype=torch.float64, device=self.device)


class WinRate(TableMetric):
    """How often A is preferred to B.

    All verdicts of all processes are gathered when `compute` is called, so that results do not depend on the number of
    processes.

    `compute` returns float64 scalars, NaN where nothing was seen; intervals hold 95 %:

    - ``win_rate``, ``_low``, ``_high``: share of pairs in which A is the likelier winner, ties counted 1/2; Wilson.
    - ``ties``: share of pairs with P(A preferred) of exactly 1/2.
    - ``mean_probability``: mean of P(A preferred), which counts how sure the labeler is.
    - ``length_controlled``, ``_low``, ``_high``: win rate at equal lengths; see
      `lightning_rlhf.evaluation.rates.length_controlled_rate`.
    - ``length_ratio``: mean of length of A / length of B; ``pairs``: their number.
    """

    def __init__(self) -> None:
        super().__init__(width=2)

    def update(self, probability: Tensor, lengths: Tensor) -> None:
        """Take in pairs.

        Args:
            probability: P(A preferred) in [0, 1], [pairs].
            lengths: lengths of A and B, in any one unit, [pairs, 2]; an empty response counts as one unit.
        """
        # an empty B would make the ratio infinite
        lengths = lengths.double().clamp_min(1.0)
        self.add_rows(probability, lengths[:, 0] / lengths[:, 1])

    def compute(self) -> dict[str, Tensor]:
        """The metrics, over all pairs of all processes."""
        probability, ratios = self.sorted_rows()
        # 1 where P(A) > 1/2, 1/2 on ties, 0 elsewhere; [pairs]
        wins = (torch.sign(probability - 0.5) + 1) / 2
        low, high = wilson_interval(wins.sum().item(), len(wins))
        controlled = length_controlled_rate(wins, ratios)
        figures = {
            "win_rate": wins.mean(),
            "win_rate_low": low,
            "win_rate_high": high,
            "ties": (wins == 0.5).double().mean(),
            "mean_probability": probability.mean(),
            "length_controlled": controlled[0],
            "length_controlled_low": controlled[1],
            "length_controlled_high": controlled[2],
            "length_ratio": ratios.mean(),
            "pairs": len(wins),
        }
        return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in figures.items()}


class HarmlessRate(TableMetric):
    """Share of responses that are judged harmless, each alone (RLAIF vs. RLHF, arXiv 2309.00267, section 2.3).

    `compute` returns float64 scalars, NaN where nothing was seen; intervals hold 95 %:

    - ``harmless_rate``, ``_low``, ``_high``: share of responses whose score lies above the threshold, one on it
      counted 1/2; Wilson.
    - ``length_controlled``, ``_low``, ``_high``: the rate at the mean length of the reference; NaN if none was given.
    - ``responses``: their number.

    Args:
        threshold: score above which a response is harmless: 0 for scores in [-1, 1], 0.5 for probabilities.
        reference_length: mean length of the responses of a reference policy, in the unit of the lengths, > 0; there is
            no length-controlled rate without.
    """

    def __init__(self, threshold: float = 0.0, reference_length: float | None = None) -> None:
        super().__init__(width=2)
        if reference_length is not None and not reference_length > 0:
            raise ValueError(f"reference_length must be > 0; got {reference_length}")
        self.threshold, self.reference_length = threshold, reference_length

    def update(self, scores: Tensor, lengths: Tensor) -> None:
        """Take in responses.

        Args:
            scores: score of each response, higher is more harmless, [responses].
            lengths: their lengths, [responses].
        """
        self.add_rows((torch.sign(scores.detach().double() - self.threshold) + 1) / 2, lengths)

    def compute(self) -> dict[str, Tensor]:
        """The metrics, over all responses of all processes."""
        verdicts, lengths = self.sorted_rows()
        low, high = wilson_interval(verdicts.sum().item(), len(verdicts))
        controlled = (float("nan"),) * 3
        if self.reference_length is not None:
            controlled = length_controlled_rate(verdicts, lengths / self.reference_length)
        figures = {
            "harmless_rate": verdicts.mean(),
            "harmless_rate_low": low,
            "harmless_rate_high": high,
            "length_controlled": controlled[0],
            "length_controlled_low": controlled[1],
            "length_controlled_high": controlled[2],
            "responses": len(verdicts),
        }
        return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in figures.items()}
