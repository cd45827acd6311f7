"""Thompson sampling of pairs: responses that are best under samples of the posterior."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_rlhf.estimators import gaussian_samples
from lightning_rlhf.preference_models.base import Posterior
from lightning_rlhf.randomness import Key
from lightning_rlhf.samplers.model_based import AbstractModelSampler


Second: TypeAlias = Literal["double", "variance"]

TRIES = 30
"""Posterior samples in which the second response is searched (arXiv 2402.00396, double Thompson sampling)."""


class ThompsonSampler(AbstractModelSampler):
    """Pairs the best of n policy samples under a sample of the posterior with a second response.

    ``double`` takes the best under another posterior sample: double Thompson sampling of "Efficient Exploration for
    LLMs" (arXiv 2402.00396), EETS of SEA (arXiv 2411.01493). It is sampled again, at most 30 times, until it is
    another response; after that the second is a random one. ``variance`` takes the response whose reward gap to the
    first has the largest variance: BAITS of SEA, for the identification of the best response.

    Args:
        n: responses per prompt, >= 2.
        second: how the second response is chosen.

    Raises:
        ValueError: if n is smaller than 2, or ``second`` is unknown.
    """

    first_distribution = "best of n π_θ under a posterior sample"

    def __init__(self, n: int = 8, second: Second = "double") -> None:
        super().__init__(n)
        if second not in get_args(Second):
            raise ValueError(f"ThompsonSampler.second must be one of {', '.join(get_args(Second))}; got {second!r}")
        self.second = second
        self.method = f"{'Double Thompson' if second == 'double' else 'BAITS'}, N={n}"
        self.second_distribution = "the same, another sample" if second == "double" else "most uncertain against it"

    def choose(self, posterior: Posterior, key: Key) -> tuple[int, int]:
        """Best response under a posterior sample, and the second one."""
        size = len(posterior.mean)
        generator = key.generator()
        normals = torch.randn(1 + TRIES, size, generator=generator, dtype=torch.float64)
        spare = int(torch.randint(size - 1, (1,), generator=generator))
        best = gaussian_samples(posterior.mean, posterior.covariance, normals).argmax(1)
        if self.second == "variance":
            return int(best[0]), most_uncertain(posterior, int(best[0]))
        return second_best(best, spare)


def second_best(best: Tensor, spare: int) -> tuple[int, int]:
    """The best response under the first posterior sample, and the first other best one.

    Args:
        best: position of the best response under each posterior sample; int64, [samples].
        spare: number of the response to take where all samples agree, counted without the best one.
    """
    others = best[best != best[0]]
    if len(others):
        return int(best[0]), int(others[0])
    # count past the best response itself
    return int(best[0]), spare + int(spare >= int(best[0]))


def most_uncertain(posterior: Posterior, first: int) -> int:
    """Position of the response whose reward gap to ``first`` has the largest variance; never ``first``."""
    everyone = torch.arange(len(posterior.mean))
    _, variance = posterior.gap(everyone, torch.full_like(everyone, first))
    # below every variance, so that the response is not paired with itself where all variances are 0
    variance[first] = -1.0
    return int(variance.argmax())
