"""Generalized advantage estimation (GAE), the advantages of PPO."""

from __future__ import annotations

from torch import Tensor

from lightning_rlhf.advantages.base import AbstractAdvantage, Episodes
from lightning_rlhf.estimators.returns import gae


class GAE(AbstractAdvantage):
    """Generalized advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

    For PPO set ``model.loss.clip``.

    Args:
        gamma: discount per token, in [0, 1].
        lam: weight of later temporal differences, in [0, 1]; 1 is the return minus the value.

    Raises:
        ValueError: if gamma or lam is out of range.
    """

    needs_values = True

    def __init__(self, gamma: float = 1.0, lam: float = 0.95) -> None:
        if not (0 <= gamma <= 1 and 0 <= lam <= 1):
            raise ValueError(f"GAE needs gamma and lam in [0, 1]; got {gamma} and {lam}")
        self.gamma, self.lam = gamma, lam

    def __call__(self, episodes: Episodes) -> Tensor:
        assert episodes.values is not None
        # A_t = sum_l (gamma lam)^l delta_{t+l} with delta_t = rho_t + gamma V(X_{t+1}) - V(X_t)
        return gae(episodes.rewards, episodes.values, episodes.lengths, self.gamma, self.lam)
