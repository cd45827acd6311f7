"""LightningModules: what is trained. Subclass one to change a step; keep the fixed output keys for the callbacks."""

from lightning_rlhf.modules.dpo import DPOModule


__all__ = ["DPOModule"]
