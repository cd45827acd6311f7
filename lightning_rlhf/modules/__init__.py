"""LightningModules: what is trained. Subclass one to change a step; keep the fixed output keys for the callbacks."""

from lightning_rlhf.modules.base import AbstractPreferenceModule, AbstractStepModule
from lightning_rlhf.modules.dpo import DPOModule
from lightning_rlhf.modules.policy import AbstractPolicyModule
from lightning_rlhf.modules.policy_gradient import PolicyGradientModule
from lightning_rlhf.modules.reward import RewardModule
from lightning_rlhf.modules.sft import SFTModule


__all__ = [
    "AbstractPolicyModule",
    "AbstractPreferenceModule",
    "AbstractStepModule",
    "DPOModule",
    "PolicyGradientModule",
    "RewardModule",
    "SFTModule",
]
