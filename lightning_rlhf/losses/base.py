"""The interface of preference losses, their input, and the classes that YAML can name.

The module collates preferences into `PairLogps`, calls the loss, multiplies by ``weight`` and takes the mean. The
formulas, DPO first, are in `lightning_rlhf.losses.preference`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from lightning_rlhf.fingerprint import KeepsArguments
from lightning_rlhf.losses.preference import (
    cdpo_loss,
    hinge_loss,
    ipo_loss,
    robust_loss,
    sigmoid_loss,
    xpo_bonus,
)


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of a batch of pairs; every tensor has shape [pairs].

    Log-probabilities are sums over response tokens, EOS included when it was sampled, in nats.

    Args:
        policy_chosen: log pi_theta of the chosen responses; carries gradient.
        policy_rejected: log pi_theta of the rejected responses; carries gradient.
        reference_chosen: log pi_ref of the chosen responses.
        reference_rejected: log pi_ref of the rejected responses.
        chosen_length: tokens of the chosen responses, >= 1.
        rejected_length: tokens of the rejected responses, >= 1.
        chosen_from_reference: whether the chosen response was sampled from pi_ref; bool.
        rejected_from_reference: whether the rejected response was sampled from pi_ref; bool.
        label: P(chosen preferred) in [0, 1].
        weight: weight of the pair, >= 0. Applied by the module, never by a loss.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
    chosen_from_reference: Tensor
    rejected_from_reference: Tensor
    label: Tensor
    weight: Tensor

    def margin(self) -> Tensor:
        """Log-ratio of the chosen minus log-ratio of the rejected response, nats; shape [pairs]."""
        # margin = log pi_theta(y_w)/pi_ref(y_w) - log pi_theta(y_l)/pi_ref(y_l)
        return (self.policy_chosen - self.reference_chosen) - (self.policy_rejected - self.reference_rejected)

    def margin_per_token(self) -> Tensor:
        """Margin of the log-ratios averaged over the tokens of each response, nats per token; shape [pairs]."""
        # log pi_theta(y_w)/pi_ref(y_w) / |y_w| - log pi_theta(y_l)/pi_ref(y_l) / |y_l|
        chosen = (self.policy_chosen - self.reference_chosen) / self.chosen_length
        return chosen - (self.policy_rejected - self.reference_rejected) / self.rejected_length


class AbstractPreferenceLoss(KeepsArguments, ABC):
    """Computes one loss per pair from the log-probabilities of pairs.

    Subclass it, implement ``__call__``, and name your class by its path: ``--model.loss=my_file.MyLoss``. Support soft
    labels by taking the expectation over the label. Do not use ``pairs.weight``: the module multiplies by it.
    """

    @abstractmethod
    def __call__(self, pairs: PairLogps, beta: float) -> Tensor:
        """Compute the loss of each pair; shape [pairs].

        Called in every training and validation step, on every rank.

        Args:
            pairs: log-probabilities, labels and lengths.
            beta: strength of the pull towards the reference, > 0.
        """


class SigmoidLoss(AbstractPreferenceLoss):
    """DPO loss, Rafailov et al. 2023 (arXiv 2305.18290, eq. 7), with soft labels."""

    def __call__(self, pairs: PairLogps, beta: float) -> Tensor:
        return sigmoid_loss(pairs.margin(), pairs.label, beta)


class CDPOLoss(AbstractPreferenceLoss):
    """DPO loss with smoothed labels, Mitchell 2023 (conservative DPO).

    Args:
        label_smoothing: probability that a label is wrong, in [0, 0.5).

    Raises:
        ValueError: if label_smoothing is out of range.
    """

    def __init__(self, label_smoothing: float = 0.1) -> None:
        self.label_smoothing = _checked_smoothing(label_smoothing, "CDPOLoss")

    def __call__(self, pairs: PairLogps, beta: float) -> Tensor:
        return cdpo_loss(pairs.margin(), pairs.label, beta, self.label_smoothing)


class RobustLoss(AbstractPreferenceLoss):
    """DPO loss corrected to be unbiased under label flips, Chowdhury et al. 2024 (arXiv 2403.00409).

    Args:
        label_smoothing: probability that a label is wrong, in [0, 0.5).

    Raises:
        ValueError: if label_smoothing is out of range.
    """

    def __init__(self, label_smoothing: float = 0.1) -> None:
        self.label_smoothing = _checked_smoothing(label_smoothing, "RobustLoss")

    def __call__(self, pairs: PairLogps, beta: float) -> Tensor:
        return robust_loss(pairs.margin(), pairs.label, beta, self.label_smoothing)


class IPOLoss(AbstractPreferenceLoss):
    """IPO loss, Azar et al. 2023 (arXiv 2310.12036, eq. 17), with beta as the paper's tau.

    Args:
        length_normalize: average log-ratios over the tokens of each response, as TRL does; false sums them, as in the
            paper. The target margin 1/(2 beta) is per token or per response accordingly.
    """

    def __init__(self, length_normalize: bool = True) -> None:
        self.length_normalize = length_normalize

    def __call__(self, pairs: PairLogps, beta: float) -> Tensor:
        margin = pairs.margin_per_token() if self.length_normalize else pairs.margin()
        return ipo_loss(margin, pairs.label, beta)


class HingeLoss(AbstractPreferenceLoss):
    """Hinge loss of SLiC (arXiv 2305.10425) on log-ratios to the reference, as in RSO (arXiv 2309.06657)."""

    def __call__(self, pairs: PairLogps, beta: float) -> Tensor:
        return hinge_loss(pairs.margin(), pairs.label, beta)


class XPOLoss(AbstractPreferenceLoss):
    """Base loss plus the exploration bonus of XPO, Xie et al. 2024 (arXiv 2405.21046, algorithm 1).

    Meant for pairs of one policy response and one reference response (``HybridSampler``). On pairs without a reference
    response it equals the base loss.

    Args:
        alpha: strength of the bonus, >= 0; multiplies log pi_theta of the reference response, in nats.
        base: loss that the bonus is added to. Default: the DPO loss.

    Raises:
        ValueError: if alpha is negative or infinite.
    """

    def __init__(self, alpha: float = 1e-5, base: AbstractPreferenceLoss | None = None) -> None:
        if not 0 <= alpha < float("inf"):
            raise ValueError(
                f"XPOLoss expects a finite alpha >= 0; got {alpha}. Use 0 for the plain loss, 1e-5 to begin with"
            )
        self.alpha = alpha
        self.base = SigmoidLoss() if base is None else base

    def __call__(self, pairs: PairLogps, beta: float) -> Tensor:
        # loss = base + alpha log pi_theta(y_ref)
        bonus = xpo_bonus(
            pairs.policy_chosen,
            pairs.policy_rejected,
            pairs.chosen_from_reference,
            pairs.rejected_from_reference,
            self.alpha,
        )
        return self.base(pairs, beta) + bonus


def _checked_smoothing(label_smoothing: float, name: str) -> float:
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"{name} expects a label_smoothing in [0, 0.5), the probability that a label is wrong; "
            f"got {label_smoothing}. Above 0.5 labels say the opposite: exchange chosen and rejected instead"
        )
    return label_smoothing
