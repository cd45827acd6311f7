"""Exact distributions, losses and objectives over small response sets, to test samplers and losses by enumeration.

Notation as in `lightning_rlhf.estimators.pilaf`. Distributions of responses are log-probabilities of shape [...,
responses], one row per prompt (no leading dimension: a single prompt). Results have the leading shape [...], and the
caller averages over prompts. Distributions of pairs are probabilities of shape [..., responses, responses], first index
a, second index b. They are symmetrized, since labels do not depend on the order of a pair.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_rlhf.estimators.kl import categorical_kl
from lightning_rlhf.estimators.pilaf import tilt_probability


class TiltedDistributions(NamedTuple):
    """The tilted distributions of T-PILAF.

    Args:
        log_plus: log pi+ of every response; shape [..., responses].
        log_minus: log pi- of every response; shape [..., responses].
        log_z_plus: log Z+ of every prompt; shape [...].
        log_z_minus: log Z- of every prompt; shape [...].
    """

    log_plus: Tensor
    log_minus: Tensor
    log_z_plus: Tensor
    log_z_minus: Tensor

    def zz(self) -> Tensor:
        """``Z+ Z- = E[cosh delta]``, >= 1; shape [...]."""
        return (self.log_z_plus + self.log_z_minus).exp()


def tilted_distributions(log_policy: Tensor, log_reference: Tensor, beta: float) -> TiltedDistributions:
    """Tilt the policy by ``exp(+r)`` and ``exp(-r)``, at the level of whole responses.

    Mixing logits token by token (`lightning_rlhf.estimators.pilaf.mix_logits`) gives these distributions for responses
    of one token and approximates them for longer ones.

    Args:
        log_policy: log pi_theta of every response, finite; shape [..., responses].
        log_reference: log pi_ref of every response, finite.
        beta: the DPO beta, >= 0.
    """
    # r = beta log(pi_theta / pi_ref)
    reward = beta * (log_policy - log_reference)
    # Z+ = sum_y pi_theta exp(+r), Z- = sum_y pi_theta exp(-r)
    log_z_plus = torch.logsumexp(log_policy + reward, -1)
    log_z_minus = torch.logsumexp(log_policy - reward, -1)
    # pi+ = pi_theta exp(+r) / Z+, pi- = pi_theta exp(-r) / Z-
    return TiltedDistributions(
        log_policy + reward - log_z_plus[..., None],
        log_policy - reward - log_z_minus[..., None],
        log_z_plus,
        log_z_minus,
    )


def differences(values: Tensor) -> Tensor:
    """Differences ``values[a] - values[b]`` of all pairs of responses; shape [..., responses, responses]."""
    return values[..., :, None] - values[..., None, :]


def product_pair_distribution(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Symmetrized distribution of two independent responses, a from one distribution and b from the other.

    Args:
        log_a: log-probabilities of the first response; shape [..., responses].
        log_b: log-probabilities of the second response; shape [..., responses].
    """
    # q(a, b) = (p_a(a) p_b(b) + p_a(b) p_b(a)) / 2
    product = (log_a[..., :, None] + log_b[..., None, :]).exp()
    return (product + product.transpose(-1, -2)) / 2


def tilted_pair_distribution(
    log_policy: Tensor, log_reference: Tensor, beta: float, probability: Tensor | float
) -> Tensor:
    """Symmetrized distribution of a pair from (pi+, pi-) with ``probability``, from (pi_theta, pi_theta) otherwise.

    Args:
        log_policy: log pi_theta of every response; shape [..., responses].
        log_reference: log pi_ref of every response.
        beta: the DPO beta, >= 0.
        probability: probability of the tilted branch; a number, or shape [...]. 0 is Vanilla, 1/2 is PILAF.
    """
    tilted = tilted_distributions(log_policy, log_reference, beta)
    tilt = torch.as_tensor(probability, dtype=log_policy.dtype, device=log_policy.device)[..., None, None]
    base = product_pair_distribution(log_policy, log_policy)
    # q(a, b) = (1 - p) pi_theta(a) pi_theta(b) + p pi+(a) pi-(b), symmetrized
    return (1 - tilt) * base + tilt * product_pair_distribution(tilted.log_plus, tilted.log_minus)


def tpilaf_pair_distribution(log_policy: Tensor, log_reference: Tensor, beta: float) -> Tensor:
    """Symmetrized distribution of T-PILAF pairs, built from the two branches.

    It equals ``pi_theta(a) pi_theta(b) / (2 sigma'(delta) (1 + zz))``: pairs of the policy tilted by the inverse
    curvature of the Bradley-Terry likelihood. Arguments are those of `tilted_pair_distribution`.
    """
    # p(x) = zz / (1 + zz)
    zz = tilted_distributions(log_policy, log_reference, beta).zz()
    return tilted_pair_distribution(log_policy, log_reference, beta, tilt_probability(zz))


def expected_dpo_loss(
    log_policy: Tensor,
    log_reference: Tensor,
    beta: float,
    pair_distribution: Tensor,
    weights: Tensor | float,
    p_star: Tensor,
) -> Tensor:
    """Population DPO loss of each prompt under a distribution of pairs; shape [...].

    Args:
        log_policy: log pi_theta of every response; carries gradient. Shape [..., responses].
        log_reference: log pi_ref of every response.
        beta: the DPO beta, > 0.
        pair_distribution: probability of every pair; detach it, since samplers carry no gradient.
        weights: weight of every pair, broadcast against ``pair_distribution``; pass prompt weights as
            ``w[..., None, None]``.
        p_star: P(a preferred) of every pair. May leave [0, 1], as the linearized label of the gradient identity does.
    """
    # L = -sum_{a,b} q(a, b) w [p* log sigma(delta) + (1 - p*) log sigma(-delta)], delta = r_theta(a) - r_theta(b)
    delta = beta * differences(log_policy - log_reference)
    loss = -p_star * F.logsigmoid(delta) - (1 - p_star) * F.logsigmoid(-delta)
    return (pair_distribution * weights * loss).sum((-1, -2))


def objective_j(log_policy: Tensor, log_reference: Tensor, reward: Tensor, beta: float) -> Tensor:
    """Expected reward minus ``beta * KL(policy || reference)`` of each prompt; shape [...].

    Args:
        log_policy: log pi_theta of every response; carries gradient. Shape [..., responses].
        log_reference: log pi_ref of every response.
        reward: reward of every response.
        beta: price of a nat of KL, >= 0.
    """
    # J = E_{pi_theta}[r] - beta KL(pi_theta || pi_ref)
    return (log_policy.exp() * reward).sum(-1) - beta * categorical_kl(log_policy, log_reference)
