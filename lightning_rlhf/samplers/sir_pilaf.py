"""SIR-PILAF: sample a pool of responses, then resample one pair with the probabilities of T-PILAF."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

from lightning_rlhf.estimators.pilaf import log_secant_slope
from lightning_rlhf.generation.base import AbstractEngine
from lightning_rlhf.randomness import Key
from lightning_rlhf.rewards.base import AbstractReward, checked_score
from lightning_rlhf.samplers.base import AbstractPairSampler
from lightning_rlhf.samplers.draws import COIN, implicit_rewards, pool_requests, repeated
from lightning_rlhf.types import Comparison, Prompt


class SIRPILAFSampler(AbstractPairSampler):
    """Samples a pool of n responses from the policy and resamples one pair (sampling-importance-resampling, SIR).

    T-PILAF (arXiv 2502.04270, Theorem 1) samples pairs of the policy tilted by ``1 / sigma'(delta)``, the inverse
    curvature of the Bradley-Terry likelihood, where delta is the implicit-reward gap of two whole responses. PILAF
    mixes logits token by token, which approximates that tilt. Resampling converges to it as n grows, at the cost of n
    responses. A pair is chosen with probability proportional to ``1 / sigma'(delta / temperature)``: Vanilla at an
    infinite temperature, T-PILAF at 1, best-of-N by the implicit reward towards 0.

    With a reward model the tilt is by the secant, ``(delta - gap) / (sigma(delta) - sigma(gap))``, where ``gap`` is the
    difference of the model's rewards. If the model is correct and n large, the expected gradient of each prompt has
    exactly the direction of the gradient of J, however far the policy is from the oracle. ``1 / sigma'(delta)`` is the
    limit for an optimal policy. Like PILAF, and unlike T-PILAF, the sampler gives all pairs weight 1: over several
    prompts the gradient is a sum of gradients of J with a positive factor per prompt.

    Where the pairs train a reward model and not the policy (RLHF), ``tilt=reward`` takes its rewards r in place of the
    implicit ones: pairs of ``pi exp(+r)`` and ``pi exp(-r)``. The expected gradient of the reward model's likelihood is
    then, to first order, that of the squared error of r over samples of the policy (docs/pilaf.md).

    Args:
        n: responses per prompt, >= 2; each is decoded, and no more than two are labeled.
        temperature: > 0; ``.inf`` in YAML gives random pairs of the pool.
        reward: estimates the oracle's reward in nats of the Bradley-Terry model. Default: no secant.
        tilt: ``policy`` tilts by the implicit reward, or by the secant from it; ``reward`` by ``reward`` alone, and
            needs no reference.

    Raises:
        ValueError: if n or temperature is out of range, or ``tilt=reward`` comes without a reward.
    """

    first_distribution, second_distribution = "pair of n π_θ", "tilted by cosh Δ"

    def __init__(
        self,
        n: int = 8,
        temperature: float = 1.0,
        reward: AbstractReward | None = None,
        tilt: Literal["policy", "reward"] = "policy",
    ) -> None:
        if n < 2 or not temperature > 0:
            raise ValueError(f"SIR-PILAF needs n >= 2 and temperature > 0; got {n} and {temperature}")
        if tilt not in ("policy", "reward") or (tilt == "reward" and reward is None):
            raise ValueError(f"SIR-PILAF tilts by policy, or by reward where one is given; got {tilt!r} and {reward!r}")
        self.n, self.temperature, self.reward, self.tilt = n, temperature, reward, tilt
        self.passes_per_pair = float(n)
        way = "" if reward is None else ", secant" if tilt == "policy" else ", by reward"
        self.method = f"SIR-PILAF, N={n}{way}"

    def sample(self, prompts: Sequence[Prompt], engine: AbstractEngine, key: Key) -> list[Comparison]:
        """Sample a pool per prompt in one batch and keep one pair; branch ``"sir"``.

        ``meta`` holds ``"delta"``, or with ``tilt=reward`` the gap of the rewards, ``"reward_gap"``.
        """
        by_policy = self.tilt == "policy"
        pool = engine.generate(pool_requests(prompts, self.n, key), reference_logps=by_policy)
        shape = len(prompts), self.n
        scores = None
        if self.reward is not None:
            scores = checked_score(self.reward, repeated(prompts, self.n), pool).double().reshape(shape)
        # no reward model, or by it alone: the secant from a gap to itself is the slope sigma'(gap)
        own = implicit_rewards(pool, engine.beta).reshape(shape) if by_policy or scores is None else scores
        target = own if scores is None else scores
        name = "delta" if by_policy else "reward_gap"
        comparisons = []
        for i, prompt in enumerate(prompts):
            uniform = float(key.fold(prompt.index, COIN).uniforms(1))
            first, second = resampled_pair(own[i], target[i], self.temperature, uniform)
            a, b = pool[i * self.n + first], pool[i * self.n + second]
            meta = {name: float(own[i, first] - own[i, second])}
            comparisons.append(Comparison(prompt, a, b, branch="sir", passes=self.passes_per_pair, meta=meta))
        return comparisons


def pair_probabilities(own: torch.Tensor, target: torch.Tensor, temperature: float) -> torch.Tensor:
    """Probability of each ordered pair of a pool, zero for a candidate with itself; float64 [..., n, n].

    Args:
        own: implicit rewards, nats; shape [..., n].
        target: estimated rewards, nats; same shape. ``own`` itself gives the slope at the implicit-reward gap.
        temperature: > 0, may be infinite.
    """
    gaps = [(r[..., :, None] - r[..., None, :]) / temperature for r in (own, target)]
    # P(a, b) ∝ 1/m, the importance weight of the pair, with the secant slope
    # m = (sigma(target) - sigma(delta)) / (target - delta)
    logits = -log_secant_slope(gaps[0], gaps[1])
    same = torch.eye(own.shape[-1], dtype=torch.bool, device=own.device)
    return logits.masked_fill(same, -math.inf).flatten(-2).softmax(-1).reshape(logits.shape)


def resampled_pair(own: torch.Tensor, target: torch.Tensor, temperature: float, uniform: float) -> tuple[int, int]:
    """Sample the positions of two different candidates with `pair_probabilities`, by inverse transform.

    Args:
        own: implicit rewards, nats; shape [n].
        target: estimated rewards, nats; shape [n].
        temperature: > 0, may be infinite.
        uniform: random number in [0, 1).
    """
    cumulative = pair_probabilities(own, target, temperature).flatten().cumsum(0)
    # right=True: pairs of probability zero, such as (0, 0), are never selected
    index = int(torch.searchsorted(cumulative, uniform * float(cumulative[-1]), right=True))
    return divmod(index, len(own))
