"""LightningDataModules: rounds of pairs, rounds of rollouts, recorded completions."""

from lightning_rlhf.datamodules.base import AbstractStepDataModule
from lightning_rlhf.datamodules.completions import CompletionDataModule
from lightning_rlhf.datamodules.preferences import PreferenceDataModule
from lightning_rlhf.datamodules.principles import PrincipleDataModule
from lightning_rlhf.datamodules.rollouts import RolloutDataModule
from lightning_rlhf.datamodules.rounds import AbstractRoundDataModule


__all__ = [
    "AbstractRoundDataModule",
    "AbstractStepDataModule",
    "CompletionDataModule",
    "PreferenceDataModule",
    "PrincipleDataModule",
    "RolloutDataModule",
]
