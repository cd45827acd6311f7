"""Group-relative advantages: the return standardized within the responses to one prompt."""

from __future__ import annotations

from torch import Tensor

from lightning_rlhf.advantages.base import AbstractAdvantage, Episodes
from lightning_rlhf.estimators.returns import group_relative, token_mask


class GRPO(AbstractAdvantage):
    """Return of a response standardized within its prompt, the same for all its tokens.

    GRPO, Shao et al. 2024 (arXiv 2402.03300, section 4.1.2). The paper puts the KL into the loss
    (``model.kl.placement=loss_k3``), averages over the tokens of a response (``model.aggregation=sequence_mean``) and
    clips (``model.loss.clip=0.2``).

    Args:
        divide_by_std: divide by the std of the group; false is Dr. GRPO (arXiv 2503.20783).
        epsilon: added to the std, > 0.

    Raises:
        ValueError: if epsilon is not positive.
    """

    min_responses = 2

    def __init__(self, divide_by_std: bool = True, epsilon: float = 1e-4) -> None:
        if epsilon <= 0:
            raise ValueError(f"GRPO needs epsilon > 0; got {epsilon}")
        self.divide_by_std, self.epsilon = divide_by_std, epsilon

    def __call__(self, episodes: Episodes) -> Tensor:
        # A_t = (R_i - mean_group R) / (std_group R + epsilon) for every token t of response i
        advantages = group_relative(episodes.totals(), episodes.groups, self.divide_by_std, self.epsilon)
        # [responses, 1] * [responses, tokens]: the padding gets 0
        return advantages[:, None] * token_mask(episodes.lengths, episodes.rewards.shape[1])
