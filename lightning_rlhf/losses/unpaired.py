"""KTO and BCO: losses of single responses that are desirable or not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def kto_loss(
    log_ratio: Tensor,
    desirable: Tensor,
    kl: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO: prospect theory's value of a response against the mean response; shape [responses].

    Ethayarajh et al. 2024 (arXiv 2402.01306, eq. 7 and 8), in expectation over the label. The gradient is largest near
    the reference point, and vanishes far from it: responses that are much better or much worse do not count. It is half
    the weight where the policy equals the reference.

    Args:
        log_ratio: log(pi_theta / pi_ref) of each response, summed over tokens, nats; carries gradient.
        desirable: P(desirable) in [0, 1], [responses].
        kl: reference point, an estimate of KL(pi_theta || pi_ref), nats, >= 0, scalar; gets no gradient.
        beta: strength of the pull towards the reference, > 0; the paper uses 0.1.
        desirable_weight: weight of desirable responses, >= 0, called lambda_D in the paper.
        undesirable_weight: weight of other responses, >= 0, called lambda_U.
    """
    # L = lambda_D (1 - sigma(beta (h - z0))) if desirable, lambda_U (1 - sigma(beta (z0 - h))) if not
    gain = beta * (log_ratio - kl.detach())
    good = desirable_weight * torch.sigmoid(-gain)
    return desirable * good + (1 - desirable) * undesirable_weight * torch.sigmoid(gain)


def unpaired_bco_loss(
    log_ratio: Tensor,
    desirable: Tensor,
    shift: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """BCO: a binary classifier whose logit is the implicit reward above the mean reward; shape [responses].

    Jung et al. 2024 (arXiv 2404.04656), without the correction for other prompts of undesirable responses; in
    expectation over the label. At a given shift the loss of a response is least where ``beta h - delta`` is the logit
    of P(desirable), while that of KTO is monotone.

    Args:
        log_ratio: log(pi_theta / pi_ref) of each response, summed over tokens, nats; carries gradient.
        desirable: P(desirable) in [0, 1], [responses].
        shift: delta, the running mean of beta times the log-ratio over the responses so far, scalar; gets no gradient.
        beta: strength of the pull towards the reference, > 0.
        desirable_weight: weight of desirable responses, >= 0.
        undesirable_weight: weight of other responses, >= 0.
    """
    # L = -lambda_D log sigma(beta h - delta) if desirable, -lambda_U log sigma(delta - beta h) if not
    logit = beta * log_ratio - shift.detach()
    good = desirable_weight * -F.logsigmoid(logit)
    return desirable * good + (1 - desirable) * undesirable_weight * -F.logsigmoid(-logit)
