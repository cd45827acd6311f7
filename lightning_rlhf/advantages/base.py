"""What an advantage promises, and what it sees."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from lightning_rlhf.estimators.returns import returns_to_go
from lightning_rlhf.fingerprint import KeepsArguments


@dataclass(frozen=True)
class Episodes:
    """All responses of a round with what they earned; float64 on the CPU, equal on all ranks.

    Args:
        rewards: reward of each token, [responses, tokens], 0 behind the end: the reward of the response at its last
            token and, if the KL is in the reward, the penalty of each token.
        lengths: tokens of each response, >= 1, [responses].
        groups: number of the prompt of each response, from 0; responses of one prompt stand together, [responses].
        values: V(X_t) when the response was drawn, [responses, tokens]; None unless the advantage needs them.
    """

    rewards: Tensor
    lengths: Tensor
    groups: Tensor
    values: Tensor | None = None

    def returns(self) -> Tensor:
        """``Z_t``, the sum of the rewards of a token and all later ones; [responses, tokens]."""
        return returns_to_go(self.rewards)

    def totals(self) -> Tensor:
        """Return of each whole response; [responses]."""
        return self.rewards.sum(1)


class AbstractAdvantage(KeepsArguments, ABC):
    """Says how much better than expected each token did.

    Subclass it, implement ``__call__``, and name your class by its path: ``--model.advantage=my_file.MyAdvantage``. It
    is called once per round, on every rank, with all responses of the round, so that neither ranks nor passes matter.

    Attributes:
        needs_values: whether a value model is trained, and `Episodes.values` given. It learns ``advantages + values``.
        min_responses: fewest responses per prompt, >= 1.
    """

    needs_values: bool = False
    min_responses: int = 1

    @abstractmethod
    def __call__(self, episodes: Episodes) -> Tensor:
        """Compute the advantage of each token; [responses, tokens], 0 behind the end of a response.

        Args:
            episodes: the round.
        """
