"""Exact pair laws of the samplers over small response sets, and what their expected gradients and labels are worth.

Shapes and notation as in `lightning_rlhf.estimators.tabular`: laws of responses are log-probabilities [..., responses],
pair laws probabilities [..., responses, responses], first index a, second b. All pair laws here are symmetrised: labels
do not know which response came first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_rlhf.estimators.pilaf import cosh_delta, log_secant_slope, pair_weight
from lightning_rlhf.estimators.tabular import differences, product_pair_law, tilted_distributions, tilted_pair_law
from lightning_rlhf.estimators.tabular import tpilaf_pair_law as exact_tpilaf


TIE = 1e-9
"""Implicit rewards of a prompt that all lie this close are equal, as they are while the policy is the reference."""


class PairLaw(NamedTuple):
    """What a sampler draws and how it weighs it.

    Args:
        law: probability of each pair; shape [..., responses, responses].
        weight: weight of each pair in the loss, broadcast against ``law``.
    """

    law: Tensor
    weight: Tensor


Sampler = Callable[[Tensor, Tensor, float], PairLaw]
"""Log policy, log reference and beta in, the pair law out."""


def vanilla(log_policy: Tensor, log_reference: Tensor, beta: float) -> PairLaw:
    """Two independent draws of the policy."""
    del log_reference, beta
    return _unweighted(product_pair_law(log_policy, log_policy))


def hybrid(log_policy: Tensor, log_reference: Tensor, beta: float) -> PairLaw:
    """One draw of the policy, one of the reference (Xie et al. 2024)."""
    del beta
    return _unweighted(product_pair_law(log_policy, log_reference))


def pilaf(log_policy: Tensor, log_reference: Tensor, beta: float, tilt: float | None = None) -> PairLaw:
    """PILAF with its fair coin; whole responses are tilted, by ``tilt`` in place of beta if it is given."""
    return _unweighted(tilted_pair_law(log_policy, log_reference, beta if tilt is None else tilt, 0.5))


def t_pilaf(log_policy: Tensor, log_reference: Tensor, beta: float) -> PairLaw:
    """T-PILAF with the probability and the prompt weights of Theorem 1; prompts are the last leading dimension."""
    zz = tilted_distributions(log_policy, log_reference, beta).zz()
    weight = pair_weight(zz, zz.mean(-1, keepdim=True) if zz.dim() else zz)
    return PairLaw(exact_tpilaf(log_policy, log_reference, beta), weight[..., None, None])


def weighted_vanilla(log_policy: Tensor, log_reference: Tensor, beta: float) -> PairLaw:
    """Policy pairs weighted by ``1 + cosh delta``: the expected gradient of T-PILAF."""
    law = product_pair_law(log_policy, log_policy)
    cosh = cosh_delta(beta * differences(log_policy - log_reference))
    mean = (law * cosh).sum((-1, -2), keepdim=True)
    mean = mean.mean(-3, keepdim=True) if mean.dim() > 2 else mean
    return PairLaw(law, (1 + cosh) / (1 + mean))


def best_of_n(log_policy: Tensor, log_reference: Tensor, beta: float, n: int = 8) -> PairLaw:
    """Best and worst of n draws of the policy by the implicit reward; a random pair where all rewards tie.

    For rewards in ascending order, n draws have their smallest at b and their largest at a > b with probability
    ``M[b, a]^n - M(b, a]^n - M[b, a)^n + M(b, a)^n``, where M is the mass of an interval.
    """
    reward = beta * (log_policy - log_reference)
    order = reward.argsort(-1)
    mass = log_policy.exp().gather(-1, order)
    upto = mass.cumsum(-1)
    before = upto - mass
    # first index a, the upper end; second b, the lower one
    both = (upto[..., :, None] - before[..., None, :]).clamp_min(0) ** n
    above = (upto[..., :, None] - upto[..., None, :]).clamp_min(0) ** n
    below = (before[..., :, None] - before[..., None, :]).clamp_min(0) ** n
    inside = (before[..., :, None] - upto[..., None, :]).clamp_min(0) ** n
    ordered = (both - above - below + inside).clamp_min(0).tril(-1) + torch.diag_embed(mass**n)
    place = order.argsort(-1)
    size = order.shape[-1]
    law = ordered.gather(-2, place[..., :, None].expand(*place.shape, size))
    law = law.gather(-1, place[..., None, :].expand(*place.shape, size))
    law = (law + law.transpose(-1, -2)) / 2
    ties = (reward.amax(-1) - reward.amin(-1) < TIE)[..., None, None]
    return _unweighted(torch.where(ties, product_pair_law(log_policy, log_policy), law))


def secant(log_policy: Tensor, log_reference: Tensor, beta: float, reward: Tensor) -> PairLaw:
    """Policy pairs tilted by one over the secant slope ``(sigma(delta*) - sigma(delta)) / (delta* - delta)``.

    T-PILAF tilts by one over the slope at delta. With the secant of the true reward the gradient is aligned exactly,
    near the oracle and far from it; in practice ``reward`` is an estimate.

    Args:
        log_policy: log pi_theta of every response.
        log_reference: log pi_ref of every response.
        beta: the DPO beta, > 0.
        reward: estimated reward of every response.
    """
    delta, target = beta * differences(log_policy - log_reference), differences(reward)
    slope = log_secant_slope(delta, target).exp()
    tilted = product_pair_law(log_policy, log_policy) / slope
    total = tilted.sum((-1, -2), keepdim=True)
    mean = total.mean(-3, keepdim=True) if total.dim() > 2 else total
    return PairLaw(tilted / total, total / mean)


SAMPLERS: dict[str, Sampler] = {
    "Vanilla": vanilla,
    "Best-of-N": best_of_n,
    "Hybrid": hybrid,
    "PILAF": pilaf,
    "T-PILAF": t_pilaf,
    "Weighted Vanilla": weighted_vanilla,
}
"""Samplers whose pair law has a closed form, by the names that reports use."""


def _unweighted(law: Tensor) -> PairLaw:
    return PairLaw(law, torch.ones((), dtype=law.dtype, device=law.device))
