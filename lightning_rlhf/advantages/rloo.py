"""REINFORCE with the other responses to the prompt as the baseline."""

from __future__ import annotations

from torch import Tensor

from lightning_rlhf.advantages.base import AbstractAdvantage, Episodes
from lightning_rlhf.estimators.returns import leave_one_out, token_mask


class RLOO(AbstractAdvantage):
    """Return of a response minus the mean return of the prompt's others, for all its tokens (arXiv 2402.14740)."""

    min_responses = 2

    def __call__(self, episodes: Episodes) -> Tensor:
        advantages = leave_one_out(episodes.totals(), episodes.groups)
        return advantages[:, None] * token_mask(episodes.lengths, episodes.rewards.shape[1])
