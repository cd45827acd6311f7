"""The quantities of PILAF and T-PILAF that samplers and engines need, as pure functions, with a running estimate of zz.

Notation of PILAF (arXiv 2502.04270): ``r = beta * log pi_theta/pi_ref`` is the implicit reward, ``delta = r(a) - r(b)``
belongs to a pair, and ``zz = Z+(x) Z-(x) = E[cosh delta]`` over independent pairs of the policy. ``zz >= 1``, with
equality where policy and reference agree. Nothing here carries gradient into a loss: laws and weights are constants of
the round.

Exact laws for small response sets, against which all of this is tested, are in `lightning_rlhf.estimators.tabular`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor


Number = TypeVar("Number", float, Tensor)
"""Python number in, Python number out; tensor in, tensor out."""


def mix_logits(policy_logits: Tensor, reference_logits: Tensor, mix: Tensor) -> Tensor:
    """Extrapolate next-token logits, ``(1 + mix) * h_policy - mix * h_reference``; shape of the logits.

    PILAF, section 5: ``mix = +beta`` gives pi+, ``mix = -beta`` gives pi-, 0 the policy, -1 the reference. Computed in
    float32 or better. Exact, to the last bit, where mix is 0 or -1 (the unused model may then hold anything) and where
    both models agree. A token that both forbid (-inf) stays forbidden. One that is forbidden only by a model with a
    negative coefficient gets a logit of +inf or NaN, because the law does not exist: sampling then fails loudly.

    Args:
        policy_logits: logits or log-probabilities of the policy; shape [rows, ..., vocabulary].
        reference_logits: the same of the reference on the same prefixes.
        mix: extrapolation away from the reference; shape [rows].
    """
    dtype = torch.promote_types(torch.promote_types(policy_logits.dtype, reference_logits.dtype), torch.float32)
    policy, reference = policy_logits.to(dtype), reference_logits.to(dtype)
    mix = mix.to(dtype).reshape(-1, *[1] * (policy.dim() - 1))
    # policy + mix * (policy - reference) rather than two products: equal models then give the policy exactly.
    mixed = policy + mix * (policy - reference)
    forbidden = torch.isneginf(policy) & ((mix > -1) | torch.isneginf(reference))
    mixed = mixed.masked_fill(forbidden, -math.inf)
    return torch.where(mix == 0, policy, torch.where(mix == -1, reference, mixed))


def cosh_delta(delta: Tensor, limit: float = math.inf) -> Tensor:
    """Compute ``cosh(delta)`` clipped from above at ``exp(limit)``; any shape.

    Args:
        delta: differences of implicit rewards, nats.
        limit: logarithm of the largest value, >= 0; infinity does not clip. Clipping biases means of cosh downward.

    Raises:
        ValueError: if ``limit`` is negative, since cosh is never below 1.
    """
    if not limit >= 0:
        raise ValueError(f"the limit on cosh(delta) is exp(limit) with limit >= 0; got limit = {limit}")
    # 709 is the largest exponent that float64 can hold.
    return torch.cosh(delta).clamp(max=math.exp(limit) if limit < 709 else math.inf)


def zz_from_deltas(delta: Tensor, limit: float = math.inf) -> Tensor:
    """Estimate zz by the mean of ``cosh(delta)`` over pairs; shape [...].

    Unbiased if each pair is two independent draws of the policy (branch ``"base"``) and nothing is clipped. The pairs
    need not be independent of each other: all pairs out of N draws will do.

    Args:
        delta: differences of implicit rewards, nats; shape [..., pairs].
        limit: see `cosh_delta`.
    """
    return cosh_delta(delta, limit).mean(-1)


def tilt_probability(zz: Number) -> Number:
    """Probability ``p(x) = zz / (1 + zz)`` with which T-PILAF draws the pair from pi+ and pi-; in [1/2, 1)."""
    return zz / (1 + zz)


def pair_weight(zz: Number, zz_bar: Number) -> Number:
    """Loss weight of T-PILAF pairs, ``w(x) = (1 + zz(x)) / (1 + zz_bar)``, which averages 1 over prompts.

    Args:
        zz: zz of the prompt of the pair, >= 1.
        zz_bar: mean of zz over prompts, >= 1.
    """
    return (1 + zz) / (1 + zz_bar)


def vanilla_pair_weight(delta: Tensor, mean_cosh: Tensor | float, limit: float = math.inf) -> Tensor:
    """Weight that gives pairs of the policy the expected gradient of T-PILAF; shape of delta.

    ``(1 + cosh delta) / (1 + mean cosh)``, where the numerator is ``1 / (2 sigma'(delta))``, the inverse curvature of
    the Bradley-Terry likelihood. It costs two sampling passes per pair instead of T-PILAF's three, and more variance.

    Args:
        delta: differences of implicit rewards, nats.
        mean_cosh: mean of cosh(delta) over prompts and pairs of the policy, >= 1.
        limit: see `cosh_delta`.
    """
    return (1 + cosh_delta(delta, limit)) / (1 + mean_cosh)


def log_secant_slope(delta: Tensor, target: Tensor) -> Tensor:
    """Logarithm of ``(sigma(target) - sigma(delta)) / (target - delta)``, and of ``sigma'(delta)`` where they meet.

    The slope of the Bradley-Terry probability between two gaps, in (0, 1/4]; any shape. Pairs tilted by its inverse
    give a gradient that is aligned with that of J; T-PILAF takes the slope at delta for it.

    Args:
        delta: gaps in implicit reward, nats.
        target: gaps in (estimated) true reward, nats.
    """
    # sigma(x) - sigma(y) = sinh(h) / (2 cosh(x / 2) cosh(y / 2)) with h = (x - y) / 2; logarithms do not overflow
    half = (target - delta).abs() / 2
    far = half.clamp_min(1e-3)
    log_ratio = torch.where(half < 1e-3, half**2 / 6, far + torch.log1p(-torch.exp(-2 * far)) - torch.log(2 * far))
    return log_ratio - _log_cosh(delta / 2) - _log_cosh(target / 2) - 2 * math.log(2.0)


def _log_cosh(x: Tensor) -> Tensor:
    return x.abs() + torch.log1p(torch.exp(-2 * x.abs())) - math.log(2.0)


@dataclass
class RunningZZ:
    """Estimates ``zz(x) = E[cosh delta]`` per prompt, shrunk towards the mean over prompts.

    Feed it once per round with the pairs that came from two independent draws of the policy (branch ``"base"``). A
    prompt seen n times has the estimate ``(strength * zz_bar + sum of its cosh) / (strength + n)``; an unseen one has
    zz_bar. Before the first round every estimate is 1, which is exact while the policy equals the reference. Sums and
    counts are multiplied by ``decay`` once per round, since the policy moves. Nothing is random; equal pairs in equal
    order give equal state on every rank.

    Args:
        strength: pairs that the mean over prompts is worth beside a prompt's own pairs, >= 0.
        decay: weight of the past relative to the next round, in [0, 1]; 1 averages all rounds, 0 keeps the last.
        limit: cosh is clipped at exp(limit), >= 0; without a clip one odd pair can decide all.
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
        """Mean of zz over prompts; 1 before anything was observed."""
        return self._total / self._count if self._count > 0 else 1.0

    def zz(self, prompt: int) -> float:
        """Estimate zz of a prompt, >= 1.

        Args:
            prompt: index of the prompt in its data set.
        """
        total, count = self._aged(prompt)
        if self.strength + count == 0:
            return self.zz_bar
        return (self.strength * self.zz_bar + total) / (self.strength + count)

    def observe(
        self, prompts: Sequence[int], deltas: Sequence[float], importance: Sequence[float] | None = None
    ) -> None:
        """Learn from all base pairs of one round; a round without any changes nothing.

        Args:
            prompts: index of the prompt of each pair.
            deltas: difference of implicit rewards of each pair, nats.
            importance: one over the probability with which each pair's prompt used the base branch, >= 1. T-PILAF uses
                it less on prompts with a large zz, so that a plain mean over base pairs would come out low. 1 if not
                given.

        Raises:
            ValueError: if lengths differ or a difference is not finite; the message names the prompt.
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
            self._total += factor * value
            self._count += factor
            # The coin of the branch does not depend on the pair, so a prompt's own mean needs no correction.
            total, count = self._aged(prompt)
            self._prompts[prompt] = (total + value, count + 1.0, self._round)

    def state_dict(self) -> dict[str, Any]:
        """What was learnt, as plain numbers and lists for JSON and for checkpoints with ``weights_only=True``."""
        return {
            "total": self._total,
            "count": self._count,
            "round": self._round,
            "prompts": [[prompt, *entry] for prompt, entry in self._prompts.items()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; strength, decay and limit stay as constructed."""
        self._total, self._count, self._round = float(state["total"]), float(state["count"]), int(state["round"])
        self._prompts = {
            int(prompt): (float(total), float(count), int(round_)) for prompt, total, count, round_ in state["prompts"]
        }

    def _aged(self, prompt: int) -> tuple[float, float]:
        """Sum and count of a prompt, decayed to the current round."""
        total, count, last = self._prompts.get(prompt, (0.0, 0.0, self._round))
        factor = self.decay ** (self._round - last)
        return factor * total, factor * count
