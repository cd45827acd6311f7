"""Weighted Vanilla: the expected gradient of T-PILAF from pairs of the policy alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_rlhf.estimators import RunningZZ, vanilla_pair_weight
from lightning_rlhf.generation.base import AbstractEngine
from lightning_rlhf.randomness import Key
from lightning_rlhf.samplers.base import AbstractPairSampler, SamplerState
from lightning_rlhf.samplers.draws import implicit_reward_gap, policy_pairs
from lightning_rlhf.types import Comparison, Prompt, Response


class WeightedVanillaSampler(AbstractPairSampler):
    """Samples both responses from the policy and weights the pair by its importance under T-PILAF.

    The weight is ``(1 + cosh delta) / (1 + mean cosh delta)`` with ``delta = r_theta(a) - r_theta(b)``. The expected
    gradient is therefore the one of T-PILAF (arXiv 2502.04270), at two forward passes per token instead of three and
    with more variance. The mean is a running mean; it is constant during a round and 1 in the first round.

    Args:
        decay: weight of earlier rounds relative to the newest round, in [0, 1].
        limit: cosh is clipped at exp(limit), >= 0, so that no weight exceeds ``(1 + exp(limit)) / 2``.

    Raises:
        ValueError: if an argument is out of range.
    """

    method = "Weighted Vanilla"
    first_distribution, second_distribution = "π_θ", "π_θ"

    def __init__(self, decay: float = 0.9, limit: float = 3.0) -> None:
        self.limit = limit
        self.estimate = RunningZZ(decay=decay, limit=limit)

    def sample(self, prompts: Sequence[Prompt], engine: AbstractEngine, key: Key) -> list[Comparison]:
        """Sample one pair per prompt; branch ``"base"``, ``meta["delta"]`` is the implicit-reward gap."""
        responses = engine.generate(policy_pairs(prompts, key), reference_logps=True)
        return [
            self._weighted(prompt, a, b, engine.beta)
            for prompt, a, b in zip(prompts, responses[::2], responses[1::2], strict=True)
        ]

    def _weighted(self, prompt: Prompt, a: Response, b: Response, beta: float) -> Comparison:
        """Make the comparison of a pair with its weight, (1 + cosh delta) / (1 + mean cosh delta)."""
        delta = implicit_reward_gap(a, b, beta)
        # one pair at a time: vectorized cosh rounds by position in the chunk, and weights must not depend on chunks
        weight = vanilla_pair_weight(torch.tensor(delta, dtype=torch.float64), self.estimate.zz_bar, self.limit)
        return Comparison(prompt, a, b, branch="base", weight=float(weight), passes=2.0, meta={"delta": delta})

    def observe(self, comparisons: Sequence[Comparison]) -> None:
        """Update the mean of cosh with the finished round."""
        # prompt index 0 for all: only the mean over prompts is used, and the state stays small
        self.estimate.observe([0] * len(comparisons), [comparison.meta["delta"] for comparison in comparisons])

    def state_dict(self) -> SamplerState:
        """The running mean."""
        return self.estimate.state_dict()

    def load_state_dict(self, state: SamplerState) -> None:
        """Restore the running mean."""
        self.estimate.load_state_dict(state)
