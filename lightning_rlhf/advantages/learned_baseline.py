"""REINFORCE with a learned baseline, the algorithm of RLAIF vs. RLHF."""

from __future__ import annotations

from torch import Tensor

from lightning_rlhf.advantages.base import AbstractAdvantage, Episodes
from lightning_rlhf.estimators.returns import gae


class LearnedBaseline(AbstractAdvantage):
    """Return minus value, ``Z_t - V(X_t)`` (arXiv 2309.00267v2, appendix F).

    The value model learns the return from the squared error.
    """

    needs_values = True

    def __call__(self, episodes: Episodes) -> Tensor:
        assert episodes.values is not None
        return gae(episodes.rewards, episodes.values, episodes.lengths, gamma=1.0, lam=1.0)
