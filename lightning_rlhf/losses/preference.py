"""Preference losses as pure functions of margins: one value per pair, soft labels everywhere.

A *margin* is ``log pi_theta(chosen)/pi_ref(chosen) - log pi_theta(rejected)/pi_ref(rejected)``, summed over response
tokens (EOS included), in nats; it carries the gradient. A *label* is P(chosen preferred) in [0, 1]: 1 for an ordinary
preference row, 1/2 for a tie. Labels carry no gradient. Every loss is linear in the label, so that a soft label gives
the expected loss under labels drawn from it, and every loss is unchanged when chosen and rejected change places
together with ``label -> 1 - label``.

The classes that YAML can name are in `lightning_rlhf.losses.base`; they take the mean nowhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def implicit_rewards(policy_logps: Tensor, reference_logps: Tensor, beta: float) -> Tensor:
    """Scale log-ratios to the implicit reward ``beta * log pi_theta/pi_ref``; any shape.

    Rafailov et al. 2023 (arXiv 2305.18290), section 5. Equal to a reward only up to a constant per prompt.

    Args:
        policy_logps: log-probabilities of the responses under the policy, nats.
        reference_logps: the same under the reference, nats.
        beta: strength of the pull towards the reference, > 0.
    """
    return beta * (policy_logps - reference_logps)


def reward_accuracy(margin: Tensor, label: Tensor) -> Tensor:
    """Say per pair whether the implicit reward agrees with the likelier side of the label: 1, 0, or 1/2 for a tie.

    A tie is a margin of exactly 0 (policy equals reference) or a label of exactly 1/2. Shape [pairs], margin's dtype.

    Args:
        margin: log-ratio margins, nats; only the sign counts.
        label: P(chosen preferred) in [0, 1].
    """
    return (1 + torch.sign(margin.detach()) * torch.sign(label.to(margin.dtype) - 0.5)) / 2


def sigmoid_loss(margin: Tensor, label: Tensor, beta: float) -> Tensor:
    """Cross-entropy between the label and the Bradley-Terry model of the implicit reward (DPO); shape [pairs].

    Rafailov et al. 2023 (arXiv 2305.18290), eq. 7, in expectation over the label; ``log 2`` where the policy equals the
    reference, and stationary where ``sigma(beta * margin) = label``.

    Args:
        margin: log-ratio margins, nats; carries gradient.
        label: P(chosen preferred) in [0, 1].
        beta: strength of the pull towards the reference, > 0; the paper uses 0.1 to 0.5.
    """
    # Two logsigmoids rather than softplus(z) - label * z: a hard label then loses no digits at large margins.
    return -label * F.logsigmoid(beta * margin) - (1 - label) * F.logsigmoid(-beta * margin)


def cdpo_loss(margin: Tensor, label: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Sigmoid loss whose labels are believed to be flipped now and then (conservative DPO); shape [pairs].

    Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO". With a hard label the margin
    settles at ``log((1 - label_smoothing)/label_smoothing) / beta`` instead of running to infinity.

    Args:
        margin: log-ratio margins, nats; carries gradient.
        label: P(chosen preferred) in [0, 1], before smoothing.
        beta: strength of the pull towards the reference, > 0.
        label_smoothing: probability that a label is wrong, in [0, 1/2).
    """
    return sigmoid_loss(margin, (1 - label_smoothing) * label + label_smoothing * (1 - label), beta)


def robust_loss(margin: Tensor, label: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Sigmoid loss corrected to be unbiased under label flips (robust DPO); shape [pairs].

    Chowdhury et al. 2024 (arXiv 2403.00409): ``((1-eps) l(label) - eps l(1-label)) / (1-2 eps)``. Averaged over
    labels that were flipped with probability eps it equals the sigmoid loss of the clean labels. It can be negative and
    has no lower bound in the margin.

    Args:
        margin: log-ratio margins, nats; carries gradient.
        label: P(chosen preferred) in [0, 1], as observed, flips included.
        beta: strength of the pull towards the reference, > 0.
        label_smoothing: probability that a label is wrong, in [0, 1/2).
    """
    straight, flipped = sigmoid_loss(margin, label, beta), sigmoid_loss(margin, 1 - label, beta)
    return ((1 - label_smoothing) * straight - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo_loss(margin: Tensor, label: Tensor, beta: float) -> Tensor:
    """Squared distance of the margin from its target ``+-1/(2 beta)``, in expectation over the label; shape [pairs].

    Azar et al. 2023 (arXiv 2310.12036), eq. 17, where beta is called tau. The minimum over margins is at
    ``(label - 1/2) / beta``: finite also for a hard label.

    Args:
        margin: log-ratio margins, nats, summed over tokens (the paper) or averaged (see `IPOLoss`); carries gradient.
        label: P(chosen preferred) in [0, 1].
        beta: regularisation tau, > 0.
    """
    target = 1 / (2 * beta)
    return label * (margin - target) ** 2 + (1 - label) * (-margin - target) ** 2


def hinge_loss(margin: Tensor, label: Tensor, beta: float) -> Tensor:
    """Hinge on the scaled margin, in expectation over the label; shape [pairs].

    The ``hinge-norm`` loss of RSO (Liu et al. 2023, arXiv 2309.06657), which normalises SLiC-HF (Zhao et al. 2023,
    arXiv 2305.10425) by the reference. For a hard label the gradient vanishes beyond a margin of ``1 / beta``.

    Args:
        margin: log-ratio margins, nats; carries gradient.
        label: P(chosen preferred) in [0, 1].
        beta: reciprocal of the margin asked for, > 0.
    """
    return label * F.relu(1 - beta * margin) + (1 - label) * F.relu(1 + beta * margin)


def xpo_bonus(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_from_reference: Tensor,
    rejected_from_reference: Tensor,
    alpha: float,
) -> Tensor:
    """Give the optimism term that XPO adds to the loss, ``alpha * log pi_theta(y_ref)``; shape [pairs].

    Xie et al. 2024 (arXiv 2405.21046), algorithm 1. Minimising it moves probability away from what the reference would
    have said, and so towards what has not been tried. It reads responses drawn from pi_ref only; pairs without one
    get 0. The paper draws exactly one response of a pair from pi_ref; if both were, both count.

    Args:
        policy_chosen_logps: log pi_theta of the chosen responses, summed over tokens, nats; carries gradient.
        policy_rejected_logps: the same of the rejected responses.
        chosen_from_reference: whether the chosen response was drawn from pi_ref; bool.
        rejected_from_reference: whether the rejected response was drawn from pi_ref; bool.
        alpha: strength of the optimism, >= 0, per nat; 1e-5 and less in practice, decaying over rounds.
    """
    # `where`, not a product with the mask: 0 * -inf would be NaN.
    chosen = torch.where(chosen_from_reference, policy_chosen_logps, torch.zeros_like(policy_chosen_logps))
    rejected = torch.where(rejected_from_reference, policy_rejected_logps, torch.zeros_like(policy_rejected_logps))
    return alpha * (chosen + rejected)
