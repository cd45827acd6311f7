"""Reward-model losses as pure functions of two scores: one value per pair, with soft labels.

A *label* is P(chosen preferred) in [0, 1]: 1 for an ordinary preference row, the probability given by an AI labeler
otherwise. It carries no gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(
    chosen_rewards: Tensor, rejected_rewards: Tensor, label: Tensor, margin: float | Tensor = 0.0
) -> Tensor:
    """Cross-entropy between the label p and the Bradley-Terry model of two rewards; shape [pairs].

    With D = r(chosen) - r(rejected) and the lead m = margin * (2p - 1): ``-p log sigma(D - m) - (1 - p) log sigma(m -
    D)``. With p = 1 it is the loss of Stiennon et al. 2020 (arXiv 2009.01325, eq. 1). Soft labels follow RLAIF vs. RLHF
    (arXiv 2309.00267, section 2.2.1), which calls training on them distillation of the labeler. The derivative in D is
    sigma(D - m) - p, and the minimum, at D = logit(p) + m, is the entropy of p. The loss is invariant to exchanging the
    responses together with p and 1 - p, and to adding a constant to both rewards.

    Args:
        chosen_rewards: rewards of the preferred responses, [pairs]; carries gradient.
        rejected_rewards: rewards of the other responses, [pairs]; carries gradient.
        label: P(chosen preferred) in [0, 1], [pairs].
        margin: by how much the reward of a surely preferred response should lead at least, >= 0 (Llama 2, arXiv
            2307.09288, section 3.2.2). A label between counts for as much of it as it prefers one response, |2p - 1|,
            so that a tie has none.
    """
    # L = -p log sigma(D - m) - (1 - p) log sigma(m - D)
    difference = chosen_rewards - rejected_rewards - margin * (2 * label - 1)
    return -label * F.logsigmoid(difference) - (1 - label) * F.logsigmoid(-difference)


def centering_penalty(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """Square of the sum of both rewards, which keeps their mean at zero; shape [pairs].

    Eisenstein et al. 2023 (arXiv 2312.09244, section 3). Preferences do not identify a constant added to all rewards;
    the penalty fixes it.

    Args:
        chosen_rewards: rewards of the preferred responses, [pairs]; carries gradient.
        rejected_rewards: rewards of the other responses, [pairs]; carries gradient.
    """
    # (r(chosen) + r(rejected))^2
    return (chosen_rewards + rejected_rewards).square()


def nuclear_norm_ratio(matrix: Tensor) -> Tensor:
    """Nuclear norm over Frobenius norm, between 1 and sqrt(rank); a scalar, float32 or better.

    UP-RLHF (arXiv 2401.00243) subtracts its mean over layers from the loss. There A stacks the down-projections of the
    adapters of all N ensemble members. Members that project on the same r directions give sqrt(r), members with
    different directions up to sqrt(N r).

    Args:
        matrix: A, [rows, columns], not all zeros; carries gradient.
    """
    # ||A||_* / ||A||_F = sum_i s_i / sqrt(sum_i s_i^2) over singular values; bfloat16 has no SVD
    singular: Tensor = torch.linalg.svdvals(matrix if matrix.dtype == torch.float64 else matrix.float())
    return singular.sum() / singular.square().sum().sqrt()
