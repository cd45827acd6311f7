"""Adversarial rewards: a discriminator D tells demonstrations from samples of the policy (RLGAF, arXiv 2305.06176).

D(x, y) = sigma(l(x, y)) is the probability that a response is a demonstration. Everything is a function of its logit l.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor


RewardForm: TypeAlias = Literal["logit", "log_d", "minus_log_1_minus_d", "d"]


def discriminator_loss(logits: Tensor, real: Tensor, smoothing: float = 0.0) -> Tensor:
    """Loss of the discriminator on each response; the shape of ``logits``.

    L_D = -E_demonstrations[log D] - E_policy[log(1 - D)], Yu et al. 2023 (arXiv 2305.06176).

    Args:
        logits: l(x, y); carries gradient.
        real: whether each response is a demonstration.
        smoothing: the target of demonstrations is 1 - smoothing, in [0, 0.5), which bounds their logits.
    """
    # one-sided: smoothed samples of the policy would make D point away from the data where the policy has mass
    target = (1.0 - smoothing) * real.to(logits)
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none")


def adversarial_reward(logits: Tensor, form: RewardForm = "logit") -> Tensor:
    """Reward of responses by the discriminator, detached; any shape.

    Args:
        logits: l(x, y).
        form: ``logit`` is l = log D - log(1 - D), unbounded on both sides, whose mean under the policy is
            -KL(policy || demonstrations) for the best D; ``log_d`` is log D <= 0; ``minus_log_1_minus_d`` is
            -log(1 - D) >= 0; ``d`` is D in [0, 1].

    Raises:
        ValueError: if there is no such form.
    """
    logits = logits.detach()
    if form == "logit":
        return logits
    if form == "log_d":
        # log D = log sigma(l)
        return F.logsigmoid(logits)
    if form == "minus_log_1_minus_d":
        # -log(1 - sigma(l)) = softplus(l)
        return F.softplus(logits)
    if form == "d":
        return logits.sigmoid()
    raise ValueError(f"there is no form {form!r} of the reward: use logit, log_d, minus_log_1_minus_d or d")


def discriminator_accuracy(demonstrations: Tensor, samples: Tensor) -> float:
    """Mean of the shares of demonstrations and of samples that the discriminator gets right; a logit of 0 counts half.

    0.5 is chance, also for a D that calls all responses the same.

    Args:
        demonstrations: logits of demonstrations, [n].
        samples: logits of samples of the policy, [m].
    """
    # heaviside(l, 1/2): 1 above 0, 0 below
    half = torch.tensor(0.5).to(samples)
    right = torch.heaviside(demonstrations, half).mean() + torch.heaviside(-samples, half).mean()
    return right.item() / 2
