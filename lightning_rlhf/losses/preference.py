"""Preference losses as pure functions of margins: DPO (`sigmoid_loss`), cDPO, robust DPO, IPO, hinge and XPO.

The DPO loss, Rafailov et al. 2023 (arXiv 2305.18290, eq. 7), of a prompt x with chosen response y_w and rejected y_l::

    margin = log(pi_theta(y_w|x) / pi_ref(y_w|x)) - log(pi_theta(y_l|x) / pi_ref(y_l|x))
    L_DPO  = -log sigma(beta * margin)

Log-probabilities are summed over response tokens (EOS included), in nats. The margin carries the gradient. Every loss
returns one value per pair; the caller weights them and takes the mean.

A *label* is P(chosen preferred) in [0, 1]: 1 for an ordinary preference row, 1/2 for a tie. Labels carry no gradient.
Every loss but XPO's bonus is the expectation over the label, ``label * L(margin) + (1 - label) * L(-margin)``. It is
therefore unchanged when chosen and rejected are swapped together with ``label -> 1 - label``.

The classes that YAML can name are in `lightning_rlhf.losses.base`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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


def sigmoid_loss(margin: Tensor, label: Tensor, beta: float) -> Tensor:
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
    return sigmoid_loss(margin, (1 - label_smoothing) * label + label_smoothing * (1 - label), beta)


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
    straight, flipped = sigmoid_loss(margin, label, beta), sigmoid_loss(margin, 1 - label, beta)
    return ((1 - label_smoothing) * straight - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo_loss(margin: Tensor, label: Tensor, beta: float) -> Tensor:
    """IPO loss: squared distance of the margin from its target ``1 / (2 beta)``; shape [pairs].

    Azar et al. 2023 (arXiv 2310.12036, eq. 17), where beta is called tau; in expectation over the label. The minimum is
    at the margin ``(label - 1/2) / beta``, which is finite for a hard label, too.

    Args:
        margin: log-ratio margins, nats, summed over tokens (the paper) or averaged (see `IPOLoss`); carries gradient.
        label: P(chosen preferred) in [0, 1].
        beta: regularisation tau, > 0.
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
