"""The best and the worst of a pool by a preference model."""

from __future__ import annotations

from lightning_rlhf.preference_models.base import Posterior
from lightning_rlhf.randomness import Key
from lightning_rlhf.samplers.model_based import AbstractModelSampler


class PosteriorBestWorstSampler(AbstractModelSampler):
    """Pairs the two of n policy samples with the highest and the lowest posterior mean.

    Silver pairs are chosen in this way, so labels of such pairs tell whether silver labels are too sure
    (`SilverOptions.kappa_labels`): their predicted gaps are large, so that few labels say much.

    Args:
        n: responses per prompt, >= 2.
        references: how many of the n are samples of the reference, from 0 to n. See `AbstractModelSampler`.

    Raises:
        ValueError: if n is smaller than 2, or ``references`` is not from 0 to n.
    """

    first_distribution, second_distribution = "best of n π_θ by posterior mean", "worst of n π_θ"

    def __init__(self, n: int = 4, references: int = 0) -> None:
        super().__init__(n, references)
        self.method = f"Posterior best-worst, N={n}"

    def choose(self, posterior: Posterior, key: Key) -> tuple[int, int]:
        """Highest and lowest posterior mean; of equal means the first response as best, and the last as worst."""
        del key
        order = posterior.mean.argsort(descending=True, stable=True)
        return int(order[0]), int(order[-1])
