"""Advantage estimators: rewards of a round in, one advantage per token out. Subclass `AbstractAdvantage`."""

from __future__ import annotations

from lightning_rlhf.advantages.base import AbstractAdvantage, Episodes
from lightning_rlhf.advantages.gae import GAE
from lightning_rlhf.advantages.grpo import GRPO
from lightning_rlhf.advantages.learned_baseline import LearnedBaseline
from lightning_rlhf.advantages.rloo import RLOO


__all__ = ["GAE", "GRPO", "RLOO", "AbstractAdvantage", "Episodes", "LearnedBaseline"]
