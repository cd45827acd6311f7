"""Exact distributions of the pairs of each sampler over small response sets.

Shapes and notation as in `lightning_rlhf.estimators.tabular`. Distributions of responses are log-probabilities [...,
responses]. Distributions of pairs are probabilities [..., responses, responses], first index a, second index b, and
symmetrized, since labels do not depend on the order of a pair.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_rlhf.estimators.pilaf import cosh_delta, log_secant_slope, pair_weight
from lightning_rlhf.estimators.tabular import (
    differences,
    product_pair_distribution,
    tilted_distributions,
    tilted_pair_distribution,
)
from lightning_rlhf.estimators.tabular import tpilaf_pair_distribution as exact_tpilaf


TIE = 1e-9
"""Implicit rewards of a prompt count as equal within this range, as they are while the policy is the reference."""


class PairDistribution(NamedTuple):
    """Distribution and loss weight of the pairs of a sampler.

    Args:
        probability: probability of each pair; shape [..., responses, responses].
        weight: weight of each pair in the loss, broadcast against ``probability``.
    """

    probability: Tensor
    weight: Tensor


Sampler = Callable[[Tensor, Tensor, float], PairDistribution]
"""Maps log policy, log reference and beta to the distribution of pairs."""


def vanilla(log_policy: Tensor, log_reference: Tensor, beta: float) -> PairDistribution:
    """Two independent policy samples."""
    del log_reference, beta
    # q(a, b) = pi_theta(a) pi_theta(b)
    return _unweighted(product_pair_distribution(log_policy, log_policy))


def hybrid(log_policy: Tensor, log_reference: Tensor, beta: float) -> PairDistribution:
    """One policy sample and one reference sample (Xie et al. 2024, arXiv 2405.21046)."""
    del beta
    # q(a, b) = pi_theta(a) pi_ref(b), symmetrized
    return _unweighted(product_pair_distribution(log_policy, log_reference))


def pilaf(log_policy: Tensor, log_reference: Tensor, beta: float, tilt: float | None = None) -> PairDistribution:
    """PILAF with branch probability 1/2; tilts whole responses. Default of ``tilt``: beta."""
    # q(a, b) = pi_theta(a) pi_theta(b) / 2 + pi+(a) pi-(b) / 2, symmetrized
    return _unweighted(tilted_pair_distribution(log_policy, log_reference, beta if tilt is None else tilt, 0.5))


def t_pilaf(log_policy: Tensor, log_reference: Tensor, beta: float) -> PairDistribution:
    """T-PILAF with the branch probability and prompt weights of Theorem 1; prompts are the last leading dimension."""
    zz = tilted_distributions(log_policy, log_reference, beta).zz()
    # w(x) = (1 + zz) / (1 + mean zz)
    weight = pair_weight(zz, zz.mean(-1, keepdim=True) if zz.dim() else zz)
    return PairDistribution(exact_tpilaf(log_policy, log_reference, beta), weight[..., None, None])


def weighted_vanilla(log_policy: Tensor, log_reference: Tensor, beta: float) -> PairDistribution:
    """Policy pairs weighted by their importance under T-PILAF; the expected gradient is that of T-PILAF."""
    probability = product_pair_distribution(log_policy, log_policy)
    cosh = cosh_delta(beta * differences(log_policy - log_reference))
    mean = (probability * cosh).sum((-1, -2), keepdim=True)
    mean = mean.mean(-3, keepdim=True) if mean.dim() > 2 else mean
    # w = (1 + cosh delta) / (1 + E[cosh delta])
    return PairDistribution(probability, (1 + cosh) / (1 + mean))


def best_of_n(log_policy: Tensor, log_reference: Tensor, beta: float, n: int = 8) -> PairDistribution:
    """Best and worst of n policy samples by the implicit reward; a random pair if all rewards tie.

    With responses sorted by reward, the probability that n samples have their minimum at b and their maximum at a > b
    is ``M[b, a]^n - M(b, a]^n - M[b, a)^n + M(b, a)^n``, where M is the probability of an interval.

    Args:
        log_policy: log pi_theta of every response.
        log_reference: log pi_ref of every response.
        beta: the DPO beta, > 0.
        n: samples per prompt, >= 2.
    """
    reward = beta * (log_policy - log_reference)
    order = reward.argsort(-1)
    mass = log_policy.exp().gather(-1, order)
    upto = mass.cumsum(-1)
    before = upto - mass
    # first index a, the maximum; second index b, the minimum: M[b, a]^n, M(b, a]^n, M[b, a)^n and M(b, a)^n
    both = (upto[..., :, None] - before[..., None, :]).clamp_min(0) ** n
    above = (upto[..., :, None] - upto[..., None, :]).clamp_min(0) ** n
    below = (before[..., :, None] - before[..., None, :]).clamp_min(0) ** n
    inside = (before[..., :, None] - upto[..., None, :]).clamp_min(0) ** n
    # all n samples equal: P(a, a) = pi_theta(a)^n
    ordered = (both - above - below + inside).clamp_min(0).tril(-1) + torch.diag_embed(mass**n)
    # back to the original order of the responses
    place = order.argsort(-1)
    size = order.shape[-1]
    probability = ordered.gather(-2, place[..., :, None].expand(*place.shape, size))
    probability = probability.gather(-1, place[..., None, :].expand(*place.shape, size))
    probability = (probability + probability.transpose(-1, -2)) / 2
    ties = (reward.amax(-1) - reward.amin(-1) < TIE)[..., None, None]
    return _unweighted(torch.where(ties, product_pair_distribution(log_policy, log_policy), probability))


def secant(log_policy: Tensor, log_reference: Tensor, beta: float, reward: Tensor) -> PairDistribution:
    """Policy pairs tilted by 1/m, with the secant slope ``m = (sigma(delta*) - sigma(delta)) / (delta* - delta)``.

    T-PILAF approximates m by ``sigma'(delta)``. With the secant to the true reward the gradient is aligned exactly,
    also far from the oracle; in practice ``reward`` is an estimate.

    Args:
        log_policy: log pi_theta of every response.
        log_reference: log pi_ref of every response.
        beta: the DPO beta, > 0.
        reward: estimated reward of every response.
    """
    delta, target = beta * differences(log_policy - log_reference), differences(reward)
    slope = log_secant_slope(delta, target).exp()
    # q(a, b) = pi_theta(a) pi_theta(b) / (m Z(x)) with the weight w(x) = Z(x) / mean Z
    tilted = product_pair_distribution(log_policy, log_policy) / slope
    total = tilted.sum((-1, -2), keepdim=True)
    mean = total.mean(-3, keepdim=True) if total.dim() > 2 else total
    return PairDistribution(tilted / total, total / mean)


SAMPLERS: dict[str, Sampler] = {
    "Vanilla": vanilla,
    "Best-of-N": best_of_n,
    "Hybrid": hybrid,
    "PILAF": pilaf,
    "T-PILAF": t_pilaf,
    "Weighted Vanilla": weighted_vanilla,
}
"""Samplers with a closed form, by their names in reports."""


def _unweighted(probability: Tensor) -> PairDistribution:
    """Pairs of weight 1."""
    return PairDistribution(probability, torch.ones((), dtype=probability.dtype, device=probability.device))
