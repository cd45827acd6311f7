"""REINFORCE with a learned baseline, the algorithm of RLAIF vs. RLHF."""

from __future__ import annotations

from torch import Tensor

from lightning_rlhf.advantages.base import AbstractAdvantage, Episodes
from lightning_rlhf.estimators.returns import gae


class LearnedBaseline(AbstractAdvantage):
    """Return minus value, RLAIF vs. RLHF (arXiv 2309.00267v2, appendix F).

    The value model is trained on the return with a squared error.
    """

    needs_values = True

    def __call__(self, episodes: Episodes) -> Tensor:
        assert episodes.values is not None
        # A_t = Z_t - V(X_t), which is GAE at gamma = lam = 1
        return gae(episodes.rewards, episodes.values, episodes.lengths, gamma=1.0, lam=1.0)
