"""Preference losses with a probability of ties: Rao-Kupper and Davidson in place of Bradley-Terry.

Chen et al. 2024, "On Extending Direct Preference Optimization to Accommodate Ties" (arXiv 2409.17431). A label of
exactly 1/2 is a tie, and its loss is the negative log-probability of a tie. Any other label is a probability of
preferring the chosen response, given that there is no tie; the loss is the expectation over it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_rlhf.losses.preference import AbstractPreferenceLoss, PairLogps


def rao_kupper_logps(gap: Tensor, nu: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities that the first response wins, that there is a tie, and that the second wins; shape of the gap.

    Rao and Kupper 1967; Chen et al. 2024 (arXiv 2409.17431). Gaps below ``log nu`` are hard to tell.

    Args:
        gap: reward of the first minus reward of the second response, nats.
        nu: > 1; at a gap of 0 a tie has the probability (nu - 1) / (nu + 1).
    """
    # P(win) = sigma(d - log nu); P(tie) = (nu^2 - 1) sigma(d - log nu) sigma(-d - log nu)
    threshold = math.log(nu)
    win, lose = F.logsigmoid(gap - threshold), F.logsigmoid(-gap - threshold)
    return win, math.log(nu * nu - 1) + win + lose, lose


def davidson_logps(gap: Tensor, nu: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities that the first response wins, that there is a tie, and that the second wins; shape of the gap.

    Davidson 1970; Chen et al. 2024 (arXiv 2409.17431): a tie is as likely as the geometric mean of the
    two wins, times 2 nu.

    Args:
        gap: reward of the first minus reward of the second response, nats.
        nu: > 0; at a gap of 0 a tie has the probability nu / (1 + nu).
    """
    # P(win) : P(tie) : P(lose) = exp(d/2) : 2 nu : exp(-d/2)
    logits = torch.stack([gap / 2, torch.full_like(gap, math.log(2 * nu)), -gap / 2])
    win, tie, lose = logits.log_softmax(0).unbind(0)
    return win, tie, lose


def tie_loss(logps: tuple[Tensor, Tensor, Tensor], label: Tensor) -> Tensor:
    """Negative log-likelihood of labels with ties; shape [pairs].

    Args:
        logps: log-probabilities of win, tie and loss of the chosen response, [pairs] each; carry gradient.
        label: P(chosen preferred) in [0, 1]; exactly 1/2 is a tie.
    """
    win, tie, lose = logps
    decided = -label * win - (1 - label) * lose
    return torch.where(label == 0.5, -tie, decided)


# -- classes that YAML can name ----------------------------------------------------------------------------------------


class RaoKupperLoss(AbstractPreferenceLoss):
    """DPO with ties by Rao-Kupper, Chen et al. 2024 (arXiv 2409.17431): the winner must lead by ``log nu`` nats.

    Args:
        nu: > 1; 3, as in the paper, makes ties as likely as not where both responses are equally good.

    Raises:
        ValueError: if nu is out of range.
    """

    def __init__(self, nu: float = 3.0) -> None:
        if not 1 < nu < math.inf:
            raise ValueError(f"RaoKupperLoss expects a finite nu > 1; got {nu}. DPOLoss has no ties; begin with 3")
        self.nu = nu

    def __call__(self, pairs: PairLogps, beta: float) -> Tensor:
        return tie_loss(rao_kupper_logps(beta * pairs.margin(), self.nu), pairs.label)


class DavidsonLoss(AbstractPreferenceLoss):
    """DPO with ties by Davidson, Chen et al. 2024 (arXiv 2409.17431).

    Args:
        nu: > 0; 1, as in the paper, makes ties as likely as not where both responses are equally good.

    Raises:
        ValueError: if nu is out of range.
    """

    def __init__(self, nu: float = 1.0) -> None:
        if not 0 < nu < math.inf:
            raise ValueError(f"DavidsonLoss expects a finite nu > 0; got {nu}. DPOLoss has no ties; begin with 1")
        self.nu = nu

    def __call__(self, pairs: PairLogps, beta: float) -> Tensor:
        return tie_loss(davidson_logps(beta * pairs.margin(), self.nu), pairs.label)
