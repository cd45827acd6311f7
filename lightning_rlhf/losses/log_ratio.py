"""Preference losses of the log-ratios to the reference: APO, BCO, chi-PO, DiscoPOP, EXO, NCA, SPPO and LN-DPO.

With the log-ratio h(y) = log(pi_theta(y|x) / pi_ref(y|x)) of a response, summed over tokens, in nats, each loss is a
function of h(y_w) and h(y_l). DPO and IPO depend on the difference of the two alone; APO, BCO, chi-PO, NCA and SPPO
also say where each of them should be. Labels are probabilities: the losses are expectations over the label, except
`exo_loss` and `sppo_loss`, which have the probability as their target.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_rlhf.losses.preference import AbstractPreferenceLoss, PairLogps, dpo_loss


def log_ratios(pairs: PairLogps) -> tuple[Tensor, Tensor]:
    """Log-ratios of the chosen and of the rejected responses, summed over tokens, nats; shape [pairs] each."""
    # h(y) = log pi_theta(y|x) / pi_ref(y|x)
    return pairs.policy_chosen - pairs.reference_chosen, pairs.policy_rejected - pairs.reference_rejected


def apo_zero_loss(chosen: Tensor, rejected: Tensor, label: Tensor, beta: float) -> Tensor:
    """APO-zero: moves the preferred response up and the other one down; shape [pairs].

    D'Oosterlinck et al. 2024 (arXiv 2408.06266, eq. 7) plus 1, in expectation over the label. For preferred responses
    that are better than those of the policy. It is 1 where the policy equals the reference, and lies in (0, 2).

    Args:
        chosen: log-ratios of the chosen responses, nats; carries gradient.
        rejected: log-ratios of the rejected responses, likewise.
        label: P(chosen preferred) in [0, 1].
        beta: strength of the pull towards the reference, > 0.
    """
    # L = 1 - sigma(beta h_w) + sigma(beta h_l)
    chosen_wins = torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)
    rejected_wins = torch.sigmoid(-beta * rejected) + torch.sigmoid(beta * chosen)
    return label * chosen_wins + (1 - label) * rejected_wins


def apo_down_loss(chosen: Tensor, rejected: Tensor, label: Tensor, beta: float) -> Tensor:
    """APO-down: moves both responses down, the other one further than the preferred one; shape [pairs].

    D'Oosterlinck et al. 2024 (arXiv 2408.06266, eq. 8) plus 1, in expectation over the label. For preferred responses
    that are worse than those of the policy. It is 1 where the policy equals the reference, and lies in (0, 2).

    Args:
        chosen: log-ratios of the chosen responses, nats; carries gradient.
        rejected: log-ratios of the rejected responses, likewise.
        label: P(chosen preferred) in [0, 1].
        beta: strength of the pull towards the reference, > 0.
    """
    # L = sigma(beta h_w) + 1 - sigma(beta (h_w - h_l))
    margin = beta * (chosen - rejected)
    chosen_wins = torch.sigmoid(beta * chosen) + torch.sigmoid(-margin)
    rejected_wins = torch.sigmoid(beta * rejected) + torch.sigmoid(margin)
    return label * chosen_wins + (1 - label) * rejected_wins


def bco_loss(chosen: Tensor, rejected: Tensor, label: Tensor, beta: float, shift: float) -> Tensor:
    """BCO: cross-entropy of a classifier that says "preferred" of each response by itself; shape [pairs].

    Jung et al. 2024 (arXiv 2404.04656), in expectation over the label. The paper's reward shift is a running mean of
    implicit rewards; here it is a constant. A response is at its minimum where ``beta h = shift + logit p``, with p
    the probability that it is the preferred one.

    Args:
        chosen: log-ratios of the chosen responses, nats; carries gradient.
        rejected: log-ratios of the rejected responses, likewise.
        label: P(chosen preferred) in [0, 1].
        beta: strength of the pull towards the reference, > 0.
        shift: implicit reward, nats, at which the classifier is undecided.
    """
    # L = -log sigma(beta h_w - delta) - log sigma(-(beta h_l - delta))
    up, down = beta * chosen - shift, beta * rejected - shift
    return dpo_loss(up, label, 1.0) + dpo_loss(down, 1 - label, 1.0)


def chi_po_loss(chosen: Tensor, rejected: Tensor, label: Tensor, beta: float, reward_range: float) -> Tensor:
    """chi-PO: DPO with the link ``phi(z) = z + log z`` in place of ``log z``; shape [pairs].

    Huang et al. 2024 (arXiv 2407.13399, algorithm 1), in expectation over the label. It is the DPO loss of a policy
    that is regularized by KL plus chi-squared divergence, ``1/2 E_ref (pi/pi_ref - 1)^2``, which grows with the
    probability ratio instead of its logarithm: the policy keeps closer to responses that the reference covers.

    Args:
        chosen: log-ratios of the chosen responses, nats; carries gradient.
        rejected: log-ratios of the rejected responses, likewise.
        label: P(chosen preferred) in [0, 1].
        beta: strength of the pull towards the reference, > 0.
        reward_range: R, > 0, may be infinite: margins are clipped to [-2R, 2R], beyond which there is no gradient.
    """
    # phi(pi/pi_ref) = exp(h) + h; exp(20) is 5e8, and larger ones would be inf - inf
    link = [torch.exp(h.clamp(max=20.0)) + h for h in (chosen, rejected)]
    # L = -log sigma(clip_2R[beta phi_w - beta phi_l])
    margin = (beta * (link[0] - link[1])).clamp(-2 * reward_range, 2 * reward_range)
    return dpo_loss(margin, label, 1.0)


def discopop_loss(margin: Tensor, label: Tensor, beta: float, tau: float) -> Tensor:
    """DiscoPOP: blend of the logistic and the exponential loss, found by a language model; shape [pairs].

    Lu et al. 2024 (arXiv 2406.08414, eq. 5, "log-ratio modulated loss"), in expectation over the label. The exponential
    loss counts where the margin is positive. The loss is neither convex nor monotone: at tau = 0.05 it has a local
    minimum at ``beta * margin`` = -0.12, where pairs of a wrong order may stay, and a local maximum at 0.07.

    Args:
        margin: log-ratio margins, nats; carries gradient.
        label: P(chosen preferred) in [0, 1].
        beta: strength of the pull towards the reference, > 0.
        tau: width of the blend, in units of ``beta * margin``, in (0, 1]; the paper uses 0.05.
    """

    def hard(z: Tensor) -> Tensor:
        # L = (1 - s) (-log sigma(z)) + s exp(-z) with s = sigma(z / tau)
        logistic = -F.logsigmoid(z) * torch.sigmoid(-z / tau)
        # s exp(-z) = exp(log s - z): where z is far below 0, exp(-z) alone overflows while s vanishes
        return logistic + torch.exp(F.logsigmoid(z / tau) - z)

    return label * hard(beta * margin) + (1 - label) * hard(-beta * margin)


def exo_loss(margin: Tensor, label: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """EXO: reverse KL from the Bradley-Terry model of the implicit reward to the label; shape [pairs], nats.

    Ji et al. 2024 (arXiv 2402.00856, eq. 16, two responses). DPO is the forward KL, up to a constant. The minimum is 0,
    where ``sigma(beta * margin)`` is the smoothed label.

    Args:
        margin: log-ratio margins, nats; carries gradient.
        label: P(chosen preferred) in [0, 1], before smoothing.
        beta: strength of the pull towards the reference, > 0.
        label_smoothing: probability that a label is wrong, in (0, 1/2): at 0 the KL to a hard label is infinite.
    """
    target = (1 - label_smoothing) * label + label_smoothing * (1 - label)
    # KL(q || p) = q log(q / p) + (1 - q) log((1 - q) / (1 - p)), q = sigma(beta margin)
    z = beta * margin
    up = torch.sigmoid(z) * (F.logsigmoid(z) - torch.log(target))
    return up + torch.sigmoid(-z) * (F.logsigmoid(-z) - torch.log1p(-target))


def nca_loss(chosen: Tensor, rejected: Tensor, label: Tensor, beta: float) -> Tensor:
    """NCA: noise-contrastive classification of each response, which keeps the preferred one likely; shape [pairs].

    Chen et al. 2024 (arXiv 2402.05369, NCA with two responses), in expectation over the label. A response is at its
    minimum where ``beta h = log 2p``, with p the probability that it is the preferred one.

    Args:
        chosen: log-ratios of the chosen responses, nats; carries gradient.
        rejected: log-ratios of the rejected responses, likewise.
        label: P(chosen preferred) in [0, 1].
        beta: strength of the pull towards the reference, > 0.
    """
    # L = -log sigma(r_w) - 1/2 log sigma(-r_w) - 1/2 log sigma(-r_l) with r = beta h
    up, down = beta * chosen, beta * rejected
    preferred = label * F.logsigmoid(up) + (1 - label) * F.logsigmoid(down)
    return -preferred - 0.5 * F.logsigmoid(-up) - 0.5 * F.logsigmoid(-down)


def sppo_loss(chosen: Tensor, rejected: Tensor, label: Tensor, beta: float) -> Tensor:
    """SPPO: squared distance of each log-ratio from the multiplicative-weights update of self-play; shape [pairs].

    Wu et al. 2024 (arXiv 2405.00675, eq. 4.7), where 1/beta is called eta. The minimum is 0, where the log-ratio of the
    chosen response is ``(label - 1/2) / beta`` and that of the rejected one is its negative. With the reference as the
    opponent this is one step of self-play: let the reference follow the policy between rounds.

    Args:
        chosen: log-ratios of the chosen responses, nats; carries gradient.
        rejected: log-ratios of the rejected responses, likewise.
        label: P(chosen preferred) in [0, 1], an estimate of the win probability against the opponent.
        beta: strength of the pull towards the reference, > 0.
    """
    # L = (h_w - eta (P - 1/2))^2 + (h_l - eta (1/2 - P))^2
    step = (label - 0.5) / beta
    return (chosen - step) ** 2 + (rejected + step) ** 2


# -- classes that YAML can name ----------------------------------------------------------------------------------------


class APOZeroLoss(AbstractPreferenceLoss):
    """APO-zero, D'Oosterlinck et al. 2024 (arXiv 2408.06266, eq. 7): preferred up, other down."""

    def __call__(self, pairs: PairLogps, beta: float) -> Tensor:
        return apo_zero_loss(*log_ratios(pairs), pairs.label, beta)


class APODownLoss(AbstractPreferenceLoss):
    """APO-down, D'Oosterlinck et al. 2024 (arXiv 2408.06266, eq. 8): both down, the other one further."""

    def __call__(self, pairs: PairLogps, beta: float) -> Tensor:
        return apo_down_loss(*log_ratios(pairs), pairs.label, beta)


class BCOLoss(AbstractPreferenceLoss):
    """BCO on pairs, Jung et al. 2024 (arXiv 2404.04656), with a constant reward shift.

    Args:
        shift: implicit reward, nats, at which a response counts as neither preferred nor not. 0, as in TRL's
            ``bco_pair``, compares with the reference; the paper's running mean of rewards is not implemented.

    Raises:
        ValueError: if shift is infinite or NaN.
    """

    def __init__(self, shift: float = 0.0) -> None:
        if not math.isfinite(shift):
            raise ValueError(f"BCOLoss expects a finite shift, in nats of implicit reward; got {shift}. Use 0 for none")
        self.shift = shift

    def __call__(self, pairs: PairLogps, beta: float) -> Tensor:
        return bco_loss(*log_ratios(pairs), pairs.label, beta, self.shift)


class ChiPOLoss(AbstractPreferenceLoss):
    """chi-PO, Huang et al. 2024 (arXiv 2407.13399, algorithm 1): DPO with a chi-squared term in its divergence.

    Args:
        reward_range: R, > 0, the range of rewards: margins are clipped to [-2R, 2R], as the paper's theorem asks.
            Default: not clipped.

    Raises:
        ValueError: if reward_range is not positive.
    """

    def __init__(self, reward_range: float = math.inf) -> None:
        if not reward_range > 0:
            raise ValueError(f"ChiPOLoss expects a reward_range > 0, in nats; got {reward_range}. Use .inf for none")
        self.reward_range = reward_range

    def __call__(self, pairs: PairLogps, beta: float) -> Tensor:
        return chi_po_loss(*log_ratios(pairs), pairs.label, beta, self.reward_range)


class DiscoPOPLoss(AbstractPreferenceLoss):
    """DiscoPOP, the log-ratio modulated loss of Lu et al. 2024 (arXiv 2406.08414, eq. 5).

    Args:
        tau: width of the blend of logistic and exponential loss, in (0, 1].

    Raises:
        ValueError: if tau is out of range.
    """

    def __init__(self, tau: float = 0.05) -> None:
        # above 1 the exponential loss would have no bound at negative margins
        if not 0 < tau <= 1:
            raise ValueError(f"DiscoPOPLoss expects a tau in (0, 1]; got {tau}. The paper uses 0.05")
        self.tau = tau

    def __call__(self, pairs: PairLogps, beta: float) -> Tensor:
        return discopop_loss(pairs.margin(), pairs.label, beta, self.tau)


class EXOLoss(AbstractPreferenceLoss):
    """EXO on pairs, Ji et al. 2024 (arXiv 2402.00856, eq. 16): the reverse KL where DPO has the forward one.

    Args:
        label_smoothing: probability that a label is wrong, in (0, 0.5).

    Raises:
        ValueError: if label_smoothing is out of range.
    """

    def __init__(self, label_smoothing: float = 1e-3) -> None:
        if not 0 < label_smoothing < 0.5:
            raise ValueError(
                f"EXOLoss expects a label_smoothing in (0, 0.5), since the reverse KL to a hard label is infinite; "
                f"got {label_smoothing}. Use 0.001"
            )
        self.label_smoothing = label_smoothing

    def __call__(self, pairs: PairLogps, beta: float) -> Tensor:
        return exo_loss(pairs.margin(), pairs.label, beta, self.label_smoothing)


class LNDPOLoss(AbstractPreferenceLoss):
    """Length-normalized DPO (Tulu 3, Lambert et al. 2024, arXiv 2411.15124): log-ratios averaged over tokens.

    The margin is nats per token, so that beta is larger than that of DPO; Tulu 3 uses 5.
    """

    def __call__(self, pairs: PairLogps, beta: float) -> Tensor:
        return dpo_loss(pairs.margin_per_token(), pairs.label, beta)


class NCALoss(AbstractPreferenceLoss):
    """NCA on pairs, Chen et al. 2024 (arXiv 2402.05369)."""

    def __call__(self, pairs: PairLogps, beta: float) -> Tensor:
        return nca_loss(*log_ratios(pairs), pairs.label, beta)


class SPPOLoss(AbstractPreferenceLoss):
    """SPPO, Wu et al. 2024 (arXiv 2405.00675, eq. 4.7), with the label as the win probability."""

    def __call__(self, pairs: PairLogps, beta: float) -> Tensor:
        return sppo_loss(*log_ratios(pairs), pairs.label, beta)
