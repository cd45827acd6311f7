"""The interface of advantage estimators, and their input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from lightning_rlhf.estimators.returns import returns_to_go
from lightning_rlhf.runtime.fingerprint import KeepsArguments


@dataclass(frozen=True)
class Episodes:
    """All responses of a round with their rewards; float64 on the CPU, equal on all ranks.

    Args:
        rewards: reward rho_t of each token, [responses, tokens], 0 in the padding: the reward of the response at its
            last token and, if the KL is in the reward, the KL penalty of each token.
        lengths: tokens of each response, >= 1, [responses].
        groups: index of the prompt of each response, from 0; the responses to one prompt are adjacent, [responses].
        values: V(X_t) at sampling time, [responses, tokens]; None unless the advantage needs values.
    """

    rewards: Tensor
    lengths: Tensor
    groups: Tensor
    values: Tensor | None = None

    def returns(self) -> Tensor:
        """Return of each token, the sum of its reward and all later ones; [responses, tokens]."""
        # Z_t = sum_{s >= t} rho_s
        return returns_to_go(self.rewards)

    def totals(self) -> Tensor:
        """Return of each whole response; [responses]."""
        # R_i = sum_t rho_{i,t}; the padding adds 0
        return self.rewards.sum(1)


class AbstractAdvantage(KeepsArguments, ABC):
    """Estimates the advantage of each token: its return relative to a baseline.

    Subclass it, implement ``__call__``, and name your class by its path: ``--model.advantage=my_file.MyAdvantage``. It
    is called once per round, on every rank, with all responses of the round, so that the result does not depend on the
    number of ranks or micro-batches.

    Attributes:
        needs_values: train a value model and pass `Episodes.values`. Its targets are ``advantages + values``.
        min_responses: minimum number of responses per prompt, >= 1.
    """

    needs_values: bool = False
    min_responses: int = 1

    @abstractmethod
    def __call__(self, episodes: Episodes) -> Tensor:
        """Compute the advantage of each token; [responses, tokens], 0 in the padding.

        Args:
            episodes: the round.
        """
