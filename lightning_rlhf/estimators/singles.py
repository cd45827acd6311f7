"""Single responses tilted towards low curvature: PILAF's idea for KTO and BCO, as pure functions.

The tilt and its derivation are ours (docs/pilaf.md); PILAF (arXiv 2502.04270) leaves KTO open. Notation::

    r(y) = beta log(pi_theta(y|x) / pi_ref(y|x))     implicit reward, nats
    c                                                 reference point: beta z0 of KTO, delta of BCO
    u    = r(y) - c                                   logit that a response is desirable
    q    ∝ pi_theta / sigma'(u)                       responses tilted towards low curvature
    Z(x) = E_{pi_theta}[1 / sigma'(u)] >= 4           its normalizer

``sigma'(u)`` is the slope of KTO's loss and the curvature of BCO's. Neither q nor c carries gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class LowCurvature(NamedTuple):
    """The tilted distribution.

    Args:
        log_probability: log q of every response; shape [..., responses].
        log_z: log Z of every prompt; shape [...].
    """

    log_probability: Tensor
    log_z: Tensor


def log_inverse_curvature(logit: Tensor) -> Tensor:
    """``log(1 / sigma'(u)) = log(2 + exp(u) + exp(-u))``, without overflow; any shape.

    Args:
        logit: u, nats.
    """
    # 1 / sigma'(u) = 1 / (sigma(u) sigma(-u))
    return -F.logsigmoid(logit) - F.logsigmoid(-logit)


def low_curvature(log_policy: Tensor, log_reference: Tensor, beta: float, point: Tensor) -> LowCurvature:
    """Tilt the policy by ``1 / sigma'(u)``, at the level of whole responses.

    q is a mixture of the policy and the tilted distributions of PILAF,
    ``(2 pi_theta + exp(-c) Z+ pi+ + exp(c) Z- pi-) / Z``.

    Args:
        log_policy: log pi_theta of every response, finite; shape [..., responses].
        log_reference: log pi_ref of every response, finite.
        beta: the beta of the loss, > 0.
        point: reference point c, nats; shape [...].
    """
    logit = beta * (log_policy - log_reference) - point[..., None]
    tilted = log_policy + log_inverse_curvature(logit)
    log_z = tilted.logsumexp(-1)
    return LowCurvature(tilted - log_z[..., None], log_z)


def pool_probabilities(rewards: Tensor, point: float, temperature: float) -> Tensor:
    """Probability with which each response of a pool of policy samples is kept, ∝ ``1 / sigma'(u / temperature)``.

    Sampling-importance-resampling: the kept response follows q as the pool grows. Shape of the rewards.

    Args:
        rewards: implicit rewards of the pool, nats; shape [..., pool].
        point: reference point c, nats.
        temperature: > 0, may be infinite, which keeps a random response.
    """
    return log_inverse_curvature((rewards - point) / temperature).softmax(-1)
