"""Advantages relative to the group of a prompt's responses."""

from __future__ import annotations

from torch import Tensor

from lightning_rlhf.advantages.base import AbstractAdvantage, Episodes
from lightning_rlhf.estimators.returns import group_relative, token_mask


class GRPO(AbstractAdvantage):
    """Standardised return of a response among its prompt's, for all its tokens (arXiv 2402.03300).

    The paper puts the KL into the loss (``model.kl_placement=loss_k3``), averages over the tokens of a response
    (``model.aggregation=sequence_mean``) and clips (``model.clip=0.2``).

    Args:
        divide_by_std: divide by the group's standard deviation; false is Dr. GRPO (arXiv 2503.20783).
        epsilon: added to the standard deviation, > 0.
    """

    min_responses = 2

    def __init__(self, divide_by_std: bool = True, epsilon: float = 1e-4) -> None:
        if epsilon <= 0:
            raise ValueError(f"GRPO needs epsilon > 0; got {epsilon}")
        self.divide_by_std, self.epsilon = divide_by_std, epsilon

    def __call__(self, episodes: Episodes) -> Tensor:
        advantages = group_relative(episodes.totals(), episodes.groups, self.divide_by_std, self.epsilon)
        return advantages[:, None] * token_mask(episodes.lengths, episodes.rewards.shape[1])
