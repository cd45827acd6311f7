"""REINFORCE leave-one-out (RLOO): the other responses to the prompt are the baseline."""

from __future__ import annotations

from torch import Tensor

from lightning_rlhf.advantages.base import AbstractAdvantage, Episodes
from lightning_rlhf.estimators.returns import leave_one_out, token_mask


class RLOO(AbstractAdvantage):
    """Return of a response minus the mean return of the other responses to its prompt, the same for all its tokens.

    RLOO, Ahmadian et al. 2024 (arXiv 2402.14740, eq. 7).
    """

    min_responses = 2

    def __call__(self, episodes: Episodes) -> Tensor:
        # A_t = R_i - 1/(k-1) sum_{j != i} R_j for every token t of response i
        advantages = leave_one_out(episodes.totals(), episodes.groups)
        # [responses, 1] * [responses, tokens]: the padding gets 0
        return advantages[:, None] * token_mask(episodes.lengths, episodes.rewards.shape[1])
