"""Losses: pure functions of log-probabilities, and thin classes so that YAML can name them."""

from __future__ import annotations

from lightning_rlhf.losses.policy_gradient import (
    clipped_loss,
    clipped_share,
    clipped_value_loss,
    kl_loss,
    reinforce_loss,
    response_weights,
    value_loss,
)
from lightning_rlhf.losses.preference import (
    AbstractPreferenceLoss,
    CDPOLoss,
    DPOLoss,
    HingeLoss,
    IPOLoss,
    NudgedPreferenceLoss,
    PairLogps,
    RobustLoss,
    XPOLoss,
    cdpo_loss,
    checked_losses,
    dpo_loss,
    hinge_loss,
    implicit_rewards,
    ipo_loss,
    nudged_preference_loss,
    reward_accuracy,
    robust_loss,
    xpo_bonus,
)
from lightning_rlhf.losses.reward import bradley_terry_loss, centering_penalty, nuclear_norm_ratio


SigmoidLoss = DPOLoss
"""Name of `DPOLoss` in version 0.1."""

__all__ = [
    "AbstractPreferenceLoss",
    "CDPOLoss",
    "DPOLoss",
    "HingeLoss",
    "IPOLoss",
    "NudgedPreferenceLoss",
    "PairLogps",
    "RobustLoss",
    "SigmoidLoss",
    "XPOLoss",
    "bradley_terry_loss",
    "cdpo_loss",
    "centering_penalty",
    "checked_losses",
    "clipped_loss",
    "clipped_share",
    "clipped_value_loss",
    "dpo_loss",
    "hinge_loss",
    "implicit_rewards",
    "ipo_loss",
    "kl_loss",
    "nuclear_norm_ratio",
    "nudged_preference_loss",
    "reinforce_loss",
    "response_weights",
    "reward_accuracy",
    "robust_loss",
    "value_loss",
    "xpo_bonus",
]
