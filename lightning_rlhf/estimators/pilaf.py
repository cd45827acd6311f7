"""The equations of PILAF and T-PILAF (arXiv 2502.04270) as pure functions, and a running estimate of Z+ Z-.

Notation of the paper::

    r(y)  = beta log(pi_theta(y|x) / pi_ref(y|x))                      implicit reward
    delta = r(a) - r(b)                                                implicit-reward gap of a pair
    pi+   ∝ pi_theta exp(+r) = pi_theta^(1 + beta) pi_ref^(-beta)      normalizer Z+(x) = E_{pi_theta}[exp(+r)]
    pi-   ∝ pi_theta exp(-r) = pi_theta^(1 - beta) pi_ref^(+beta)      normalizer Z-(x) = E_{pi_theta}[exp(-r)]
    zz(x) = Z+(x) Z-(x) = E_{a, b ~ pi_theta}[cosh delta] >= 1         1 where policy and reference agree
    p(x)  = zz / (1 + zz)                                              T-PILAF: probability of a (pi+, pi-) pair
    w(x)  = (1 + zz) / (1 + mean zz)                                   T-PILAF: loss weight of the pair

PILAF applies the tilt token by token: `mix_logits`. Nothing here carries gradient into a loss, since distributions and
weights are constants of the round. `lightning_rlhf.estimators.tabular` has the exact distributions over small response
sets; tests compare the two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor


Number = TypeVar("Number", float, Tensor)
"""A function of a Python number returns a Python number, a function of a tensor returns a tensor."""


def mix_logits(policy_logits: Tensor, reference_logits: Tensor, mix: Tensor) -> Tensor:
    """Mix next-token logits of policy and reference, the practical PILAF of section 5; shape of the logits.

    ::

        pi+ : softmax((1 + beta) h_theta - beta h_ref)      mix = +beta
        pi- : softmax((1 - beta) h_theta + beta h_ref)      mix = -beta
        policy: mix = 0; reference: mix = -1

    Computed in float32 or better. The result is exact to the last bit where mix is 0 or -1 (the logits of the unused
    model may then hold any value) and where both models agree. A token that both models forbid (-inf) stays forbidden.
    A token forbidden only by a model with a negative coefficient gets a logit of +inf or NaN, because the mixed
    distribution does not exist; sampling then raises an error.

    Args:
        policy_logits: h_theta, logits or log-probabilities of the policy; shape [rows, ..., vocabulary].
        reference_logits: h_ref, of the reference on the same prefixes; same shape.
        mix: extrapolation away from the reference; shape [rows].
    """
    dtype = torch.promote_types(torch.promote_types(policy_logits.dtype, reference_logits.dtype), torch.float32)
    policy, reference = policy_logits.to(dtype), reference_logits.to(dtype)
    mix = mix.to(dtype).reshape(-1, *[1] * (policy.dim() - 1))
    # (1 + mix) h_theta - mix h_ref, written so that equal models give the policy exactly
    mixed = policy + mix * (policy - reference)
    # -inf - (-inf) above is NaN: put -inf back where the mixed distribution does forbid the token
    forbidden = torch.isneginf(policy) & ((mix > -1) | torch.isneginf(reference))
    mixed = mixed.masked_fill(forbidden, -math.inf)
    # one model alone: select it, since 0 * inf and 0 * NaN of the other one would not vanish
    return torch.where(mix == 0, policy, torch.where(mix == -1, reference, mixed))


def cosh_delta(delta: Tensor, limit: float = math.inf) -> Tensor:
    """Compute ``min(cosh(delta), exp(limit))``; any shape.

    Args:
        delta: implicit-reward gaps, nats.
        limit: logarithm of the largest value, >= 0; infinity does not clip. Clipping biases means of cosh downward.

    Raises:
        ValueError: if ``limit`` is negative, since cosh is never below 1.
    """
    if not limit >= 0:
        raise ValueError(f"the limit on cosh(delta) is exp(limit) with limit >= 0; got limit = {limit}")
    # exp overflows float64 beyond 709
    return torch.cosh(delta).clamp(max=math.exp(limit) if limit < 709 else math.inf)


def zz_from_deltas(delta: Tensor, limit: float = math.inf) -> Tensor:
    """Estimate zz by the mean of ``cosh(delta)`` over pairs; shape [...].

    Unbiased if each pair is two independent samples of the policy (branch ``"base"``) and nothing is clipped. The pairs
    need not be independent of each other: all pairs of N samples may be used.

    Args:
        delta: implicit-reward gaps, nats; shape [..., pairs].
        limit: see `cosh_delta`.
    """
    # zz = Z+ Z- = E[exp(r_a - r_b)] = E[cosh delta], since a and b are exchangeable
    return cosh_delta(delta, limit).mean(-1)


def tilt_probability(zz: Number) -> Number:
    """Probability that T-PILAF samples the pair from (pi+, pi-), in [1/2, 1).

    Args:
        zz: Z+ Z- of the prompt, >= 1.
    """
    # p(x) = Z+ Z- / (1 + Z+ Z-)
    return zz / (1 + zz)


def pair_weight(zz: Number, zz_bar: Number) -> Number:
    """Loss weight of T-PILAF pairs, mean 1 over prompts.

    Args:
        zz: zz of the prompt of the pair, >= 1.
        zz_bar: mean of zz over prompts, >= 1.
    """
    # w(x) = (1 + Z+ Z-) / Zbar with Zbar = E_x[1 + Z+ Z-]
    return (1 + zz) / (1 + zz_bar)


def vanilla_pair_weight(delta: Tensor, mean_cosh: Tensor | float, limit: float = math.inf) -> Tensor:
    """Importance weight that gives policy pairs the expected gradient of T-PILAF; shape of ``delta``.

    It is the density of T-PILAF pairs relative to policy pairs, ``(1 + cosh delta) / (1 + zz)``, times the loss weight
    ``w(x)``. A pair costs two forward passes per token instead of three, and the gradient has more variance.

    Args:
        delta: implicit-reward gaps, nats.
        mean_cosh: mean of cosh(delta) over prompts and pairs of the policy, >= 1.
        limit: see `cosh_delta`.
    """
    # w = (1 + cosh delta) / (1 + mean cosh), where 1 + cosh delta = 1 / (2 sigma'(delta))
    return (1 + cosh_delta(delta, limit)) / (1 + mean_cosh)


def log_secant_slope(delta: Tensor, target: Tensor) -> Tensor:
    """Log of the secant slope ``m = (sigma(target) - sigma(delta)) / (target - delta)``; any shape.

    m is the slope of the Bradley-Terry probability between two gaps, in (0, 1/4], and ``sigma'(delta)`` where the gaps
    are equal. Policy pairs tilted by 1/m have an expected gradient along the gradient of J. T-PILAF approximates m by
    ``sigma'(delta)``.

    Args:
        delta: implicit-reward gaps, nats.
        target: gaps in (estimated) true reward, nats.
    """
    # sigma(x) - sigma(y) = sinh(h) / (2 cosh(x/2) cosh(y/2)) with h = (x - y) / 2, so that
    # log m = log(sinh(h) / h) - log cosh(x/2) - log cosh(y/2) - 2 log 2; logarithms do not overflow
    half = (target - delta).abs() / 2
    # below 1e-3, log(sinh(h) / h) loses its digits: use the Taylor term h^2 / 6
    far = half.clamp_min(1e-3)
    log_ratio = torch.where(half < 1e-3, half**2 / 6, far + torch.log1p(-torch.exp(-2 * far)) - torch.log(2 * far))
    return log_ratio - _log_cosh(delta / 2) - _log_cosh(target / 2) - 2 * math.log(2.0)


def _log_cosh(x: Tensor) -> Tensor:
    # log cosh x = |x| + log(1 + exp(-2|x|)) - log 2, without overflow
    return x.abs() + torch.log1p(torch.exp(-2 * x.abs())) - math.log(2.0)


@dataclass
class RunningZZ:
    """Running estimate of ``zz(x) = E[cosh delta]`` per prompt, shrunk towards the mean over prompts.

    Call `observe` once per round with the pairs of two independent policy samples (branch ``"base"``). A prompt with n
    observed pairs has the estimate ``(strength * zz_bar + sum of its cosh) / (strength + n)``; an unseen prompt has
    zz_bar. Before the first round every estimate is 1, which is exact while the policy equals the reference. Sums and
    counts decay by ``decay`` per round, since the policy changes. The estimate is deterministic: equal pairs in equal
    order give equal state on every rank.

    Args:
        strength: weight of the mean over prompts, in pairs, >= 0.
        decay: weight of earlier rounds relative to the next one, in [0, 1]; 1 averages all rounds, 0 keeps the last.
        limit: cosh is clipped at exp(limit), >= 0; without a clip one outlier pair can dominate the mean.

    Raises:
        ValueError: if an argument is out of range.
    """

    strength: float = 8.0
    decay: float = 0.9
    limit: float = 10.0
    _total: float = field(default=0.0, init=False, repr=False)
    _count: float = field(default=0.0, init=False, repr=False)
    _round: int = field(default=0, init=False, repr=False)
    _prompts: dict[int, tuple[float, float, int]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not (0 <= self.strength < math.inf and 0 <= self.decay <= 1 and self.limit >= 0):
            raise ValueError(
                f"RunningZZ expects a finite strength >= 0, decay in [0, 1] and limit >= 0; "
                f"got strength={self.strength}, decay={self.decay}, limit={self.limit}"
            )

    @property
    def zz_bar(self) -> float:
        """Mean of zz over prompts; 1 before the first observation."""
        return self._total / self._count if self._count > 0 else 1.0

    def zz(self, prompt: int) -> float:
        """Estimate zz of a prompt, >= 1.

        Args:
            prompt: index of the prompt in its data set.
        """
        # zz(x) = (strength * zz_bar + sum cosh) / (strength + n)
        total, count = self._decayed(prompt)
        # no prior and no pair of this prompt: 0 / 0
        if self.strength + count == 0:
            return self.zz_bar
        return (self.strength * self.zz_bar + total) / (self.strength + count)

    def observe(
        self, prompts: Sequence[int], deltas: Sequence[float], importance: Sequence[float] | None = None
    ) -> None:
        """Update the estimate with all base pairs of one round; a round without base pairs changes nothing.

        Args:
            prompts: index of the prompt of each pair.
            deltas: implicit-reward gap of each pair, nats.
            importance: importance weight of each pair, 1 / P(base branch) of its prompt, >= 1. T-PILAF takes the base
                branch less often on prompts with a large zz, so that the unweighted mean over base pairs is biased
                downward. Default: 1 for every pair.

        Raises:
            ValueError: if lengths differ or a gap is not finite; the message names the prompt.
        """
        importance = [1.0] * len(prompts) if importance is None else importance
        if not len(prompts) == len(deltas) == len(importance):
            raise ValueError(
                f"expected one delta and one importance per prompt; "
                f"got {len(prompts)} prompts, {len(deltas)} deltas and {len(importance)} importances"
            )
        for prompt, delta in zip(prompts, deltas, strict=True):
            if not math.isfinite(delta):
                raise ValueError(
                    f"the implicit rewards of prompt {prompt} differ by {delta}, expected a finite number; "
                    f"check the log-probabilities of policy and reference for this prompt"
                )
        if not prompts:
            return
        values = cosh_delta(torch.tensor(list(deltas), dtype=torch.float64), self.limit).tolist()
        self._round += 1
        self._total *= self.decay
        self._count *= self.decay
        for prompt, value, factor in zip(prompts, values, importance, strict=True):
            # zz_bar = sum(cosh / (1 - p)) / sum(1 / (1 - p)), self-normalized importance sampling over prompts
            self._total += factor * value
            self._count += factor
            # no importance within a prompt: its branch is chosen independently of the pair
            total, count = self._decayed(prompt)
            self._prompts[prompt] = (total + value, count + 1.0, self._round)

    def state_dict(self) -> dict[str, Any]:
        """State as plain numbers and lists, for JSON and for checkpoints loaded with ``weights_only=True``."""
        return {
            "total": self._total,
            "count": self._count,
            "round": self._round,
            "prompts": [[prompt, *entry] for prompt, entry in self._prompts.items()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned; strength, decay and limit stay as constructed."""
        self._total, self._count, self._round = float(state["total"]), float(state["count"]), int(state["round"])
        self._prompts = {
            int(prompt): (float(total), float(count), int(round_)) for prompt, total, count, round_ in state["prompts"]
        }

    def _decayed(self, prompt: int) -> tuple[float, float]:
        """Sum and count of a prompt, decayed to the current round (lazily: only prompts of a round are touched)."""
        total, count, last = self._prompts.get(prompt, (0.0, 0.0, self._round))
        factor = self.decay ** (self._round - last)
        return factor * total, factor * count
