"""Losses: pure functions of log-probabilities, and thin classes so that YAML can name them."""

from __future__ import annotations

from lightning_rlhf.losses.base import (
    AbstractPreferenceLoss,
    CDPOLoss,
    HingeLoss,
    IPOLoss,
    PairLogps,
    RobustLoss,
    SigmoidLoss,
    XPOLoss,
)
from lightning_rlhf.losses.preference import (
    cdpo_loss,
    hinge_loss,
    implicit_rewards,
    ipo_loss,
    reward_accuracy,
    robust_loss,
    sigmoid_loss,
    xpo_bonus,
)
from lightning_rlhf.losses.reward import bradley_terry_loss, centering_penalty, nuclear_norm_ratio


__all__ = [
    "AbstractPreferenceLoss",
    "CDPOLoss",
    "HingeLoss",
    "IPOLoss",
    "PairLogps",
    "RobustLoss",
    "SigmoidLoss",
    "XPOLoss",
    "bradley_terry_loss",
    "cdpo_loss",
    "centering_penalty",
    "hinge_loss",
    "implicit_rewards",
    "ipo_loss",
    "nuclear_norm_ratio",
    "reward_accuracy",
    "robust_loss",
    "sigmoid_loss",
    "xpo_bonus",
]
