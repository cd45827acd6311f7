"""LightningModules. Subclass one to change its step; keep the fixed output keys for the callbacks."""

from lightning_rlhf.models.options import GenerationServer, ModelOptions
from lightning_rlhf.modules.base import AbstractPreferenceModule, AbstractStepModule, ItemLosses
from lightning_rlhf.modules.difference import DifferenceModule
from lightning_rlhf.modules.dpo import DPOModule
from lightning_rlhf.modules.drlaif import DRLAIFModule
from lightning_rlhf.modules.efficient_exploration import Anchor, EfficientExplorationModule
from lightning_rlhf.modules.generative_reward import GenerativeRewardModule
from lightning_rlhf.modules.kto import BCOModule, KTOModule
from lightning_rlhf.modules.policy import AbstractAlignedPolicyModule, AbstractPolicyModule, ReferenceUpdate
from lightning_rlhf.modules.policy_gradient import KLControl, PolicyGradientModule, PolicyLoss, ValueModel
from lightning_rlhf.modules.reward import RewardLoss, RewardModule
from lightning_rlhf.modules.rounds import AbstractRoundModule
from lightning_rlhf.modules.schedules import ConstantWithWarmup, CosineWithWarmup, LinearWithWarmup, WarmupStableDecay
from lightning_rlhf.modules.sft import SFTModule


__all__ = [
    "AbstractAlignedPolicyModule",
    "AbstractPolicyModule",
    "AbstractPreferenceModule",
    "AbstractRoundModule",
    "AbstractStepModule",
    "Anchor",
    "BCOModule",
    "ConstantWithWarmup",
    "CosineWithWarmup",
    "DPOModule",
    "DRLAIFModule",
    "DifferenceModule",
    "EfficientExplorationModule",
    "GenerationServer",
    "GenerativeRewardModule",
    "ItemLosses",
    "KLControl",
    "KTOModule",
    "LinearWithWarmup",
    "ModelOptions",
    "PolicyGradientModule",
    "PolicyLoss",
    "ReferenceUpdate",
    "RewardLoss",
    "RewardModule",
    "SFTModule",
    "ValueModel",
    "WarmupStableDecay",
]
