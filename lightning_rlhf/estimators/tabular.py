"""Exact laws, losses and objectives over small response sets, to test samplers and losses by enumeration.

Notation as in `lightning_rlhf.estimators.pilaf`. Laws are log-probabilities of shape [..., responses], one row per
prompt (no leading dimension: a single prompt); results have the leading shape [...], and the caller averages over
prompts. Pair laws are probabilities of shape [..., responses, responses], first index a, second b.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_rlhf.estimators.kl import categorical_kl
from lightning_rlhf.estimators.pilaf import tilt_probability


class TiltedLaws(NamedTuple):
    """The laws of T-PILAF: log pi+ and log pi-, shape [..., responses], and log Z+ and log Z-, shape [...]."""

    log_plus: Tensor
    log_minus: Tensor
    log_z_plus: Tensor
    log_z_minus: Tensor

    def zz(self) -> Tensor:
        """``Z+ Z- = E[cosh delta]``, >= 1; shape [...]."""
        return (self.log_z_plus + self.log_z_minus).exp()


def tilted_laws(log_policy: Tensor, log_reference: Tensor, beta: float) -> TiltedLaws:
    """Tilt the policy by ``exp(+r)`` and ``exp(-r)``, whole responses at a time.

    ``pi+`` is proportional to ``pi_theta^(1+beta) pi_ref^(-beta)``, ``pi-`` to ``pi_theta^(1-beta) pi_ref^beta``.
    Mixing logits token by token gives these laws for responses of one token, and approximates them for longer ones.

    Args:
        log_policy: log pi_theta of every response, finite; shape [..., responses].
        log_reference: log pi_ref of every response, finite.
        beta: the DPO beta, >= 0.
    """
    reward = beta * (log_policy - log_reference)
    log_z_plus = torch.logsumexp(log_policy + reward, -1)
    log_z_minus = torch.logsumexp(log_policy - reward, -1)
    return TiltedLaws(
        log_policy + reward - log_z_plus[..., None],
        log_policy - reward - log_z_minus[..., None],
        log_z_plus,
        log_z_minus,
    )


def differences(values: Tensor) -> Tensor:
    """Differences between every two responses, ``values[a] - values[b]``; shape [..., responses, responses]."""
    return values[..., :, None] - values[..., None, :]


def product_pair_law(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Symmetrised law of two independent responses, a from one law and b from the other."""
    law = (log_a[..., :, None] + log_b[..., None, :]).exp()
    return (law + law.transpose(-1, -2)) / 2


def tilted_pair_law(log_policy: Tensor, log_reference: Tensor, beta: float, probability: Tensor | float) -> Tensor:
    """Symmetrised pair law when (pi+, pi-) is drawn with ``probability`` and (pi_theta, pi_theta) otherwise.

    Args:
        log_policy: log pi_theta of every response; shape [..., responses].
        log_reference: log pi_ref of every response.
        beta: the DPO beta, >= 0.
        probability: probability of the tilted branch; a number, or shape [...]. 0 is Vanilla, 1/2 is PILAF.
    """
    laws = tilted_laws(log_policy, log_reference, beta)
    tilt = torch.as_tensor(probability, dtype=log_policy.dtype, device=log_policy.device)[..., None, None]
    base = product_pair_law(log_policy, log_policy)
    return (1 - tilt) * base + tilt * product_pair_law(laws.log_plus, laws.log_minus)


def tpilaf_pair_law(log_policy: Tensor, log_reference: Tensor, beta: float) -> Tensor:
    """Symmetrised pair law of T-PILAF, built from its two branches.

    It equals ``pi_theta(a) pi_theta(b) / (2 sigma'(delta) (1 + zz))``: pairs of the policy tilted by the inverse
    curvature of the Bradley-Terry likelihood.
    """
    zz = tilted_laws(log_policy, log_reference, beta).zz()
    return tilted_pair_law(log_policy, log_reference, beta, tilt_probability(zz))


def expected_dpo_loss(
    log_policy: Tensor, log_reference: Tensor, beta: float, pair_law: Tensor, weights: Tensor | float, p_star: Tensor
) -> Tensor:
    """Population DPO loss of each prompt under a pair law; shape [...].

    Args:
        log_policy: log pi_theta of every response; carries gradient. Shape [..., responses].
        log_reference: log pi_ref of every response.
        beta: the DPO beta, > 0.
        pair_law: probability of every pair; detach it, for samplers carry no gradient.
        weights: weight of every pair, broadcast against ``pair_law``; of every prompt: pass ``w[..., None, None]``.
        p_star: P(a preferred) of every pair. May leave [0, 1], as the linearised label of the gradient identity does.
    """
    delta = beta * differences(log_policy - log_reference)
    loss = -p_star * F.logsigmoid(delta) - (1 - p_star) * F.logsigmoid(-delta)
    return (pair_law * weights * loss).sum((-1, -2))


def objective_j(log_policy: Tensor, log_reference: Tensor, reward: Tensor, beta: float) -> Tensor:
    """Expected reward minus ``beta * KL(policy || reference)`` of each prompt; shape [...].

    Args:
        log_policy: log pi_theta of every response; carries gradient. Shape [..., responses].
        log_reference: log pi_ref of every response.
        reward: reward of every response.
        beta: price of a nat of KL, >= 0.
    """
    return (log_policy.exp() * reward).sum(-1) - beta * categorical_kl(log_policy, log_reference)
