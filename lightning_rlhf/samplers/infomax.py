"""Infomax: the pair whose choice the preference model is most uncertain about."""

from __future__ import annotations

import torch

from lightning_rlhf.estimators import choice_variance
from lightning_rlhf.preference_models.base import Posterior
from lightning_rlhf.randomness import Key
from lightning_rlhf.samplers.model_based import AbstractModelSampler


class InfomaxSampler(AbstractModelSampler):
    """Pairs the two of n samples whose choice probability has the largest variance over the posterior.

    The information-directed choice of "Efficient Exploration at Scale" (arXiv 2603.17378): of all pairs of a pool of 16
    the one with the largest variance of ``sigma(r(y) - r(y'))``. There the variance is over an epistemic index, here
    over a Gaussian posterior. The noise of a label, which is largest between equal rewards, does not count. Left out:
    diversity between the pairs of a round.

    Args:
        n: responses per prompt, >= 2; the paper uses 16.
        references: how many of the n are samples of the reference, from 0 to n; the paper has none. See
            `AbstractModelSampler`.

    Raises:
        ValueError: if n is smaller than 2, or ``references`` is not from 0 to n.
    """

    second_distribution = "most uncertain choice"

    def __init__(self, n: int = 16, references: int = 0) -> None:
        super().__init__(n, references)
        self.method = f"Infomax, N={n}"
        self.first_distribution = f"pair of {n - references} π_θ, {references} π_ref" if references else "pair of n π_θ"

    def choose(self, posterior: Posterior, key: Key) -> tuple[int, int]:
        """The pair with the largest variance of the choice probability, in the order of the pool."""
        del key
        first, second = torch.triu_indices(len(posterior.mean), len(posterior.mean), offset=1)
        # argmax over pairs of Var[sigma(r(y) - r(y'))]
        best = int(choice_variance(*posterior.gap(first, second)).argmax())
        return int(first[best]), int(second[best])
