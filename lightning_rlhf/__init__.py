"""Preference learning on PyTorch Lightning: which pair of responses to label, and the training around it.

The flow, and where to read it::

    prompts/  ->  samplers/  ->  labelers/  ->  ledger/  ->  batching/  ->  modules/  ->  losses/  ->  callbacks/
                  generation/    rewards/       (collectors/ and datamodules/ run it round by round)

A `PreferenceDataModule` collects preferences in rounds, with the current policy; a `DPOModule` learns from them. A
`RolloutDataModule` samples and scores responses; a `PolicyGradientModule` learns from those. Callbacks report KL and
reward. The command line puts the parts together: ``lightning-rlhf fit --config quickstart``.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from lightning_rlhf.batching.batches import PreferenceBatch, ResponseBatch
    from lightning_rlhf.datamodules import (
        CompletionDataModule,
        PreferenceDataModule,
        PrincipleDataModule,
        RolloutDataModule,
    )
    from lightning_rlhf.experiments import FitExperiment, StagedExperiment, TabularExperiment
    from lightning_rlhf.generation.base import Decoding, Request
    from lightning_rlhf.ledger.store import PreferenceStore
    from lightning_rlhf.models.options import ModelOptions
    from lightning_rlhf.modules import (
        BCOModule,
        DifferenceModule,
        DPOModule,
        DRLAIFModule,
        EfficientExplorationModule,
        GenerativeRewardModule,
        KTOModule,
        PolicyGradientModule,
        RewardModule,
        SFTModule,
    )
    from lightning_rlhf.randomness import Key
    from lightning_rlhf.types import Comparison, Label, Preference, Prompt, Response, Rollout

__version__ = "0.2.0"

__all__ = [
    "BCOModule",
    "Comparison",
    "CompletionDataModule",
    "DPOModule",
    "DRLAIFModule",
    "Decoding",
    "DifferenceModule",
    "EfficientExplorationModule",
    "FitExperiment",
    "GenerativeRewardModule",
    "KTOModule",
    "Key",
    "Label",
    "ModelOptions",
    "PolicyGradientModule",
    "Preference",
    "PreferenceBatch",
    "PreferenceDataModule",
    "PreferenceStore",
    "PrincipleDataModule",
    "Prompt",
    "Request",
    "Response",
    "ResponseBatch",
    "RewardModule",
    "Rollout",
    "RolloutDataModule",
    "SFTModule",
    "StagedExperiment",
    "TabularExperiment",
]

_MODULES = {
    "batching.batches": ("PreferenceBatch", "ResponseBatch"),
    "datamodules": ("CompletionDataModule", "PreferenceDataModule", "PrincipleDataModule", "RolloutDataModule"),
    "experiments": ("FitExperiment", "StagedExperiment", "TabularExperiment"),
    "generation.base": ("Decoding", "Request"),
    "ledger.store": ("PreferenceStore",),
    "models.options": ("ModelOptions",),
    "modules": (
        "BCOModule",
        "DPOModule",
        "DRLAIFModule",
        "DifferenceModule",
        "EfficientExplorationModule",
        "GenerativeRewardModule",
        "KTOModule",
        "PolicyGradientModule",
        "RewardModule",
        "SFTModule",
    ),
    "randomness": ("Key",),
    "types": ("Comparison", "Label", "Preference", "Prompt", "Response", "Rollout"),
}


def __getattr__(name: str) -> Any:
    """Import a name at its first use: importing all of them takes seconds, which the command line uses otherwise."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, also those that are not imported yet, and the packages that are."""
    return sorted(
        {*__all__, "__version__", *(name for name, value in globals().items() if isinstance(value, ModuleType))}
    )
