"""A sampler of your own: pair the two candidates that have the least in common.

Run it from this folder, or with this folder on PYTHONPATH:

    lightning-rlhf fit --config quickstart --data.sampler=custom_sampler.MySampler --data.sampler.n=4
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from lightning_rlhf.generation.base import AbstractEngine, Request
from lightning_rlhf.randomness import Key
from lightning_rlhf.samplers.base import AbstractPairSampler
from lightning_rlhf.types import Comparison, Prompt, Response


class MySampler(AbstractPairSampler):
    """Samples n candidates from the policy and keeps the two whose tokens overlap least.

    Args:
        n: candidates per prompt, >= 2.
    """

    def __init__(self, n: int = 4) -> None:
        if n < 2:
            raise ValueError(f"n must be at least 2; got {n}")
        self.n = n
        self.passes_per_pair = float(n)

    def sample(self, prompts: Sequence[Prompt], engine: AbstractEngine, key: Key) -> list[Comparison]:
        """Sample the candidates of all prompts in one batch, then choose a pair for each prompt."""
        sampled = engine.generate(
            [Request(prompt, key.fold(prompt.index, i)) for prompt in prompts for i in range(self.n)]
        )
        comparisons = []
        for i, prompt in enumerate(prompts):
            candidates = sampled[i * self.n : (i + 1) * self.n]
            a, b = min(combinations(candidates, 2), key=lambda pair: overlap(*pair))
            comparisons.append(Comparison(prompt, a, b, branch="diverse", passes=self.passes_per_pair))
        return comparisons


def overlap(a: Response, b: Response) -> float:
    """Share of the distinct tokens of two responses that both use, in [0, 1]."""
    return len(set(a.ids) & set(b.ids)) / len(set(a.ids) | set(b.ids))
