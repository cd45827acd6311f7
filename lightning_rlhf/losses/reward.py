"""Losses of reward models as pure functions of two scores: one value per pair, soft labels everywhere.

A *label* is P(chosen preferred) in [0, 1]: 1 for an ordinary preference row, what an AI labeler said otherwise. It
carries no gradient.
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
    D)``. Soft labels as in RLAIF vs.
    RLHF (arXiv 2309.00267, section 2.2.1), where training on them distils the labeler; with p = 1 the loss of Stiennon
    et al. 2020 (arXiv 2009.01325, eq. 1). The gradient by D is sigma(D - m) - p, and the minimum, at D = logit(p) + m,
    is the entropy of p. Exchanging the responses, and p for 1 - p, changes nothing, nor does a number added to both
    rewards.

    Args:
        chosen_rewards: rewards of the preferred responses, [pairs]; carries gradient.
        rejected_rewards: rewards of the other responses, [pairs]; carries gradient.
        label: P(chosen preferred) in [0, 1], [pairs].
        margin: by how much the reward of a surely preferred response should lead at least, >= 0 (Llama 2, arXiv
            2307.09288, section 3.2.2). A label between counts for as much of it as it prefers one response, |2p - 1|,
            so that a tie has none.
    """
    difference = chosen_rewards - rejected_rewards - margin * (2 * label - 1)
    return -label * F.logsigmoid(difference) - (1 - label) * F.logsigmoid(-difference)


def centering_penalty(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """Square of the sum of both rewards, which keeps their mean at zero; shape [pairs].

    Eisenstein et al. 2023 (arXiv 2312.09244), section 3: preferences say nothing of a number added to all rewards.

    Args:
        chosen_rewards: rewards of the preferred responses, [pairs]; carries gradient.
        rejected_rewards: rewards of the other responses, [pairs]; carries gradient.
    """
    return (chosen_rewards + rejected_rewards).square()


def nuclear_norm_ratio(matrix: Tensor) -> Tensor:
    """Nuclear norm over Frobenius norm, ``||A||_* / ||A||_F``: between 1 and the root of the rank; float32 at least.

    UP-RLHF (arXiv 2401.00243) subtracts its mean over layers from the loss, where A holds the down-projections of all
    members' adapters, one below the other: N members that read the same r directions equally give sqrt(r), members that
    read different ones up to sqrt(N r).

    Args:
        matrix: A, [rows, columns], not all zeros; carries gradient.
    """
    singular: Tensor = torch.linalg.svdvals(matrix if matrix.dtype == torch.float64 else matrix.float())
    return singular.sum() / singular.square().sum().sqrt()
