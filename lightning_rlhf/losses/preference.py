"""Preference losses: the DPO loss and the interface of all losses first, then cDPO, IPO, XPO and others.

The DPO loss, Rafailov et al. 2023 (arXiv 2305.18290, eq. 7), of a prompt x with chosen response y_w and rejected y_l::

    margin = log(pi_theta(y_w|x) / pi_ref(y_w|x)) - log(pi_theta(y_l|x) / pi_ref(y_l|x))
    L_DPO  = -log sigma(beta * margin)

Log-probabilities are summed over response tokens (EOS included), in nats. The margin carries the gradient.
`lightning_rlhf.modules.dpo` fills `PairLogps` and calls the loss, which returns one value per pair;
`lightning_rlhf.modules.base` multiplies by the weights and takes the mean.

A *label* is P(chosen preferred) in [0, 1]: 1 for an ordinary preference row, 1/2 for a tie. Labels carry no gradient.
Every loss of margins is the expectation over the label, ``label * L(margin) + (1 - label) * L(-margin)``. It is
therefore unchanged when chosen and rejected are swapped together with ``label -> 1 - label``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_rlhf.runtime.fingerprint import KeepsArguments


def dpo_loss(margin: Tensor, label: Tensor, beta: float) -> Tensor:
    """DPO loss: cross-entropy between the label and the Bradley-Terry model of the implicit reward; shape [pairs].

    Rafailov et al. 2023 (arXiv 2305.18290, eq. 7), in expectation over the label. It is ``log 2`` where the policy
    equals the reference, and stationary where ``sigma(beta * margin) = label``.

    Args:
        margin: log-ratio margins, nats; carries gradient.
        label: P(chosen preferred) in [0, 1].
        beta: strength of the pull towards the reference, > 0; the paper uses 0.1 to 0.5.
    """
    # L = -label log sigma(beta margin) - (1 - label) log sigma(-beta margin); label = 1 is eq. 7 of the DPO paper.
    # Two logsigmoids rather than softplus(z) - label * z: a hard label then loses no digits at large margins.
    return -label * F.logsigmoid(beta * margin) - (1 - label) * F.logsigmoid(-beta * margin)


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


class DPOLoss(AbstractPreferenceLoss):
    """DPO loss, Rafailov et al. 2023 (arXiv 2305.18290, eq. 7), with soft labels."""

    def __call__(self, pairs: PairLogps, beta: float) -> Tensor:
        return dpo_loss(pairs.margin(), pairs.label, beta)


def checked_losses(loss: AbstractPreferenceLoss, pairs: PairLogps, beta: float) -> Tensor:
    """Call a loss and check that it returns one value per pair; shape [pairs].

    Raises:
        ValueError: if it returns anything else, such as the mean.
    """
    losses: object = loss(pairs, beta)
    # the mean over pairs would broadcast to all of them without an error
    if not isinstance(losses, Tensor) or losses.shape != pairs.weight.shape:
        found = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
        raise ValueError(
            f"{type(loss).__name__} returned {found}; return one loss per pair, {tuple(pairs.weight.shape)}"
        )
    return losses


def implicit_rewards(policy_logps: Tensor, reference_logps: Tensor, beta: float) -> Tensor:
    """Implicit DPO reward of each response; any shape.

    Rafailov et al. 2023 (arXiv 2305.18290, section 5). It equals a reward up to a constant per prompt.

    Args:
        policy_logps: log-probabilities of the responses under the policy, nats.
        reference_logps: log-probabilities of the same responses under the reference, nats.
        beta: strength of the pull towards the reference, > 0.
    """
    # r_theta(x, y) = beta log(pi_theta(y|x) / pi_ref(y|x))
    return beta * (policy_logps - reference_logps)


def reward_accuracy(margin: Tensor, label: Tensor) -> Tensor:
    """Agreement of the implicit reward with the label: 1, 0, or 1/2 for a tie; shape [pairs], dtype of the margin.

    A tie is a margin of exactly 0 (policy equals reference) or a label of exactly 1/2.

    Args:
        margin: log-ratio margins, nats; only the sign is used.
        label: P(chosen preferred) in [0, 1].
    """
    # (1 + sign(margin) sign(label - 1/2)) / 2
    return (1 + torch.sign(margin.detach()) * torch.sign(label.to(margin.dtype) - 0.5)) / 2


# -- other losses: functions -------------------------------------------------------------------------------------------


def cdpo_loss(margin: Tensor, label: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """DPO loss with smoothed labels (conservative DPO), for labels that are wrong with some probability; shape [pairs].

    Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO". With a hard label the margin converges
    to ``log((1 - label_smoothing) / label_smoothing) / beta`` instead of infinity.

    Args:
        margin: log-ratio margins, nats; carries gradient.
        label: P(chosen preferred) in [0, 1], before smoothing.
        beta: strength of the pull towards the reference, > 0.
        label_smoothing: probability that a label is wrong, in [0, 1/2).
    """
    # L_cDPO = L_DPO at the label (1 - eps) label + eps (1 - label)
    return dpo_loss(margin, (1 - label_smoothing) * label + label_smoothing * (1 - label), beta)


def robust_loss(margin: Tensor, label: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """DPO loss corrected to be unbiased under label flips (robust DPO); shape [pairs].

    Chowdhury et al. 2024 (arXiv 2403.00409). In expectation over labels flipped with probability eps, it equals the DPO
    loss of the clean labels. It can be negative and has no lower bound in the margin.

    Args:
        margin: log-ratio margins, nats; carries gradient.
        label: P(chosen preferred) in [0, 1], as observed, flips included.
        beta: strength of the pull towards the reference, > 0.
        label_smoothing: probability that a label is wrong, in [0, 1/2).
    """
    # L = ((1 - eps) L_DPO(label) - eps L_DPO(1 - label)) / (1 - 2 eps)
    straight, flipped = dpo_loss(margin, label, beta), dpo_loss(margin, 1 - label, beta)
    return ((1 - label_smoothing) * straight - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo_loss(margin: Tensor, label: Tensor, beta: float) -> Tensor:
    """IPO loss: squared distance of the margin from its target ``1 / (2 beta)``; shape [pairs].

    Azar et al. 2023 (arXiv 2310.12036, eq. 17), where beta is called tau; in expectation over the label. The minimum is
    at the margin ``(label - 1/2) / beta``, which is finite for a hard label, too.

    Args:
        margin: log-ratio margins, nats, summed over tokens (the paper) or averaged (see `IPOLoss`); carries gradient.
        label: P(chosen preferred) in [0, 1].
        beta: regularization tau, > 0.
    """
    # L = label (margin - 1/(2 beta))^2 + (1 - label) (-margin - 1/(2 beta))^2
    target = 1 / (2 * beta)
    return label * (margin - target) ** 2 + (1 - label) * (-margin - target) ** 2


def hinge_loss(margin: Tensor, label: Tensor, beta: float) -> Tensor:
    """Hinge loss on the scaled margin, in expectation over the label; shape [pairs].

    The ``hinge-norm`` loss of RSO (Liu et al. 2023, arXiv 2309.06657): SLiC-HF (Zhao et al. 2023, arXiv 2305.10425) on
    log-ratios to the reference. For a hard label the gradient vanishes beyond a margin of ``1 / beta``.

    Args:
        margin: log-ratio margins, nats; carries gradient.
        label: P(chosen preferred) in [0, 1].
        beta: reciprocal of the target margin, > 0.
    """
    # L = label max(0, 1 - beta margin) + (1 - label) max(0, 1 + beta margin)
    return label * F.relu(1 - beta * margin) + (1 - label) * F.relu(1 + beta * margin)


def xpo_bonus(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_from_reference: Tensor,
    rejected_from_reference: Tensor,
    alpha: float,
) -> Tensor:
    """Exploration bonus that XPO adds to the loss; shape [pairs].

    Xie et al. 2024 (arXiv 2405.21046, algorithm 1). Minimizing it moves probability away from responses of the
    reference, towards responses that have not been tried. It uses responses sampled from pi_ref only; pairs without one
    get 0. The paper samples exactly one response of a pair from pi_ref; if both are, the terms are summed.

    Args:
        policy_chosen_logps: log pi_theta of the chosen responses, summed over tokens, nats; carries gradient.
        policy_rejected_logps: log pi_theta of the rejected responses, likewise.
        chosen_from_reference: whether the chosen response was sampled from pi_ref; bool.
        rejected_from_reference: whether the rejected response was sampled from pi_ref; bool.
        alpha: strength of the bonus, >= 0, per nat; 1e-5 and less in practice, decaying over rounds.
    """
    # bonus = alpha log pi_theta(y_ref). `where`, not a product with the mask: 0 * -inf would be NaN
    chosen = torch.where(chosen_from_reference, policy_chosen_logps, torch.zeros_like(policy_chosen_logps))
    rejected = torch.where(rejected_from_reference, policy_rejected_logps, torch.zeros_like(policy_rejected_logps))
    return alpha * (chosen + rejected)


def nudged_preference_loss(
    policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, label: Tensor, epsilon: float
) -> Tensor:
    """Policy gradient of a preference with the affirmative nudge, for both orders of a pair; shape [pairs].

    "Efficient Exploration at Scale" (arXiv 2603.17378): an ordered pair (Y, Y') adds ``(P(Y preferred) - 1/2 + eps)
    grad log pi(Y)`` to the gradient of the objective. With both orders of a pair, probability moves from the response
    that is preferred less often to the other one, by ``label - 1/2``, and to both of them, by eps. The loss has no
    lower bound, and its gradient is that of the expected preference only on responses that the present policy sampled.

    Args:
        policy_chosen_logps: log pi_theta of the chosen responses, summed over tokens, nats; carries gradient.
        policy_rejected_logps: log pi_theta of the rejected responses, likewise.
        label: P(chosen preferred) in [0, 1].
        epsilon: the nudge, >= 0.
    """
    # -(p - 1/2 + eps) log pi(y_w) - ((1 - p) - 1/2 + eps) log pi(y_l)
    return -(label - 0.5 + epsilon) * policy_chosen_logps - (0.5 - label + epsilon) * policy_rejected_logps


# -- other losses: classes that YAML can name --------------------------------------------------------------------------


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
        self.base = DPOLoss() if base is None else base

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


class NudgedPreferenceLoss(AbstractPreferenceLoss):
    """Policy gradient of the preference probability with an affirmative nudge (arXiv 2603.17378), for both orders.

    For pairs that the present policy sampled. It has no reference and does not use beta: `EfficientExplorationModule`
    adds the pull towards an average of the policy, without which nothing bounds the policy.

    Args:
        epsilon: the nudge, >= 0; adds to the weight of both responses. The paper says that it is small and positive,
            and that runs without it, 0, fail. The default is ours.

    Raises:
        ValueError: if epsilon is negative or infinite.
    """

    def __init__(self, epsilon: float = 0.05) -> None:
        if not 0 <= epsilon < float("inf"):
            raise ValueError(f"NudgedPreferenceLoss expects a finite epsilon >= 0; got {epsilon}. Use 0 for no nudge")
        self.epsilon = epsilon

    def __call__(self, pairs: PairLogps, beta: float) -> Tensor:
        del beta
        return nudged_preference_loss(pairs.policy_chosen, pairs.policy_rejected, pairs.label, self.epsilon)


def _checked_smoothing(label_smoothing: float, name: str) -> float:
    # at 1/2 the label of cDPO is 1/2 for every pair, and robust DPO divides by 1 - 2 eps = 0
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"{name} expects a label_smoothing in [0, 0.5), the probability that a label is wrong; "
            f"got {label_smoothing}. Above 0.5 labels say the opposite: exchange chosen and rejected instead"
        )
    return label_smoothing
