"""PILAF by resampling: of a pool of whole draws, a pair with the probability that T-PILAF gives it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lightning_rlhf.estimators.pilaf import log_secant_slope
from lightning_rlhf.generation.base import AbstractEngine
from lightning_rlhf.randomness import Key
from lightning_rlhf.rewards.base import AbstractReward, checked_score
from lightning_rlhf.samplers.base import AbstractPairSampler
from lightning_rlhf.samplers.draws import COIN, implicit_rewards, pool_requests
from lightning_rlhf.types import Comparison, Prompt


class SIRPILAFSampler(AbstractPairSampler):
    """Draws a pool of n responses from the policy and resamples one pair of it (sampling-importance-resampling).

    T-PILAF (arXiv 2502.04270, Theorem 1) draws pairs of the policy tilted by ``1 / sigma'(delta)``, the inverse
    curvature of the Bradley-Terry likelihood, where delta is the gap in implicit reward of two whole responses. PILAF
    mixes logits token by token, which is another law for responses of several tokens; resampling has the right one for
    n to infinity, at the cost of n draws. A temperature makes one family of samplers: a pair is taken with probability
    proportional to ``1 / sigma'(delta / temperature)``, which is Vanilla at infinity, T-PILAF at 1 and, towards 0,
    best-of-N by the implicit reward.

    With a reward model the tilt is by the secant, ``(delta - gap) / (sigma(delta) - sigma(gap))``, where gap is that of
    the model's rewards. If the model is right, and n large, the expected gradient of each prompt has the direction of
    J's exactly, however far the policy is from the oracle; the slope at delta is its limit for a policy that is right
    itself. Like PILAF, and unlike T-PILAF, the sampler gives all pairs weight 1: over several prompts the direction is
    that of J up to a positive factor per prompt.

    Args:
        n: responses per prompt, >= 2; each costs decoding, none a label.
        temperature: > 0; ``.inf`` in YAML gives random pairs of the pool.
        reward: estimates the oracle's reward, on its scale (nats of Bradley-Terry): the secant is taken towards it.

    Raises:
        ValueError: if n or temperature is out of range.
    """

    first_law, second_law = "pair of n π_θ", "tilted by cosh Δ"

    def __init__(self, n: int = 8, temperature: float = 1.0, reward: AbstractReward | None = None) -> None:
        if n < 2 or not temperature > 0:
            raise ValueError(f"SIR-PILAF needs n >= 2 and temperature > 0; got {n} and {temperature}")
        self.n, self.temperature, self.reward = n, temperature, reward
        self.passes_per_pair = float(n)
        self.method = f"SIR-PILAF, N={n}" + ("" if reward is None else ", secant")

    def sample(self, prompts: Sequence[Prompt], engine: AbstractEngine, key: Key) -> list[Comparison]:
        """Draw a pool per prompt in one batch and keep one pair; branch ``"sir"``. ``meta`` holds ``"delta"``."""
        drawn = engine.generate(pool_requests(prompts, self.n, key), reference_logps=True)
        shape = len(prompts), self.n
        own = implicit_rewards(drawn, engine.beta).reshape(shape)
        target = own
        if self.reward is not None:
            target = checked_score(self.reward, [p for p in prompts for _ in range(self.n)], drawn).double()
            target = target.reshape(shape)
        comparisons = []
        for i, prompt in enumerate(prompts):
            uniform = float(key.fold(prompt.index, COIN).uniforms(1))
            first, second = resampled_pair(own[i], target[i], self.temperature, uniform)
            a, b = drawn[i * self.n + first], drawn[i * self.n + second]
            meta = {"delta": float(own[i, first] - own[i, second])}
            comparisons.append(Comparison(prompt, a, b, branch="sir", passes=self.passes_per_pair, meta=meta))
        return comparisons


def pair_probabilities(own: torch.Tensor, target: torch.Tensor, temperature: float) -> torch.Tensor:
    """Probability of each ordered pair of a pool, zero for a candidate with itself; float64 [..., n, n].

    Proportional to one over the slope of the logistic function from the gap in implicit reward to the gap in estimated
    reward, both divided by the temperature.

    Args:
        own: implicit rewards; shape [..., n].
        target: estimated rewards; ``own`` itself gives the slope at the implicit gap.
        temperature: > 0, may be infinite.
    """
    gaps = [(r[..., :, None] - r[..., None, :]) / temperature for r in (own, target)]
    logits = -log_secant_slope(gaps[0], gaps[1])
    same = torch.eye(own.shape[-1], dtype=torch.bool, device=own.device)
    return logits.masked_fill(same, -math.inf).flatten(-2).softmax(-1).reshape(logits.shape)


def resampled_pair(own: torch.Tensor, target: torch.Tensor, temperature: float, uniform: float) -> tuple[int, int]:
    """Draw positions of two different candidates by `pair_probabilities`; shapes [n], ``uniform`` in [0, 1)."""
    cumulative = pair_probabilities(own, target, temperature).flatten().cumsum(0)
    # right of the number: pairs of probability zero, such as the first, are never met
    index = int(torch.searchsorted(cumulative, uniform * float(cumulative[-1]), right=True))
    return divmod(index, len(own))
