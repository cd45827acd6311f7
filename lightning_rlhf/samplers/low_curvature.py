"""Single responses tilted towards low curvature: PILAF's idea for KTO and BCO."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_rlhf.estimators.singles import pool_probabilities
from lightning_rlhf.generation.base import AbstractEngine
from lightning_rlhf.randomness import Key
from lightning_rlhf.samplers.base import SamplerState
from lightning_rlhf.samplers.draws import COIN, implicit_rewards, pool_requests
from lightning_rlhf.samplers.single import SingleSampler
from lightning_rlhf.types import NO_RESPONSE, Comparison, Prompt


class LowCurvatureSampler(SingleSampler):
    """Samples a pool of n responses from the policy and keeps one, with probability ∝ ``1 / sigma'(r - c)``.

    r is the implicit reward of the response, nats, and c the reference point of KTO or BCO, estimated by the mean
    implicit reward of all pools of the last round; 0 in the first. Responses far from the reference point, on both
    sides, are kept more often: there the loss is flat. The rule is ours, not of the PILAF paper; docs/pilaf.md
    derives its effect. With BCO the expected gradient of a prompt is, to first order, along that of J, as T-PILAF's is
    with DPO. With KTO it is the gradient of P(desirable), without a KL term. Prompts have weight 1.

    Args:
        n: responses per prompt, >= 2; each is decoded, and one is labeled.
        temperature: divides r - c, > 0; ``.inf`` in YAML keeps a random response.

    Raises:
        ValueError: if n or temperature is out of range.
    """

    first_distribution = "one of n π_θ, tilted by cosh"

    def __init__(self, n: int = 8, temperature: float = 1.0) -> None:
        if n < 2 or not temperature > 0:
            raise ValueError(f"LowCurvatureSampler needs n >= 2 and temperature > 0; got {n} and {temperature}")
        self.n, self.temperature = n, temperature
        self.passes_per_pair = float(n)
        self.method = f"Low curvature (KTO), N={n}"
        self._point = 0.0

    def sample(self, prompts: Sequence[Prompt], engine: AbstractEngine, key: Key) -> list[Comparison]:
        """Sample a pool per prompt in one batch and keep one response; branch ``"low_curvature"``.

        ``meta`` holds its implicit reward, ``reward``, and the mean of the pool, ``mean_reward``.
        """
        pool = engine.generate(pool_requests(prompts, self.n, key), reference_logps=True)
        rewards = implicit_rewards(pool, engine.beta).reshape(len(prompts), self.n)
        comparisons = []
        for i, prompt in enumerate(prompts):
            cumulative = pool_probabilities(rewards[i], self._point, self.temperature).cumsum(0)
            # inverse transform; rounding can put the threshold at the total
            threshold = float(key.fold(prompt.index, COIN).uniforms(1)) * float(cumulative[-1])
            kept = min(int(torch.searchsorted(cumulative, threshold, right=True)), self.n - 1)
            meta = {"reward": float(rewards[i, kept]), "mean_reward": float(rewards[i].mean())}
            response = pool[i * self.n + kept]
            comparisons.append(
                Comparison(
                    prompt, response, NO_RESPONSE, branch="low_curvature", passes=self.passes_per_pair, meta=meta
                )
            )
        return comparisons

    def observe(self, comparisons: Sequence[Comparison]) -> None:
        """Estimate the reference point from the pools of a round."""
        means = [float(c.meta["mean_reward"]) for c in comparisons if "mean_reward" in c.meta]
        if means:
            # c = beta KL(pi_theta || pi_ref) = E[r] >= 0 over samples of the policy
            self._point = max(sum(means) / len(means), 0.0)

    def state_dict(self) -> SamplerState:
        """The reference point."""
        return {"point": self._point}

    def load_state_dict(self, state: SamplerState) -> None:
        """Restore the reference point."""
        self._point = float(state.get("point", 0.0))
