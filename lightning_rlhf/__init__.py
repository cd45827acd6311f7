"""Preference learning on PyTorch Lightning: which pair of responses to label, and the training around it.

The flow, and where to read it::

    prompts/  ->  samplers/  ->  labelers/  ->  store.py  ->  collate.py  ->  modules/  ->  losses/  ->  callbacks/
                  generation/    rewards/

A `PreferenceDataModule` collects preferences in rounds, with the current policy; a `DPOModule` learns from them. A
`RolloutDataModule` draws and scores responses; a `PolicyGradientModule` learns from those. Callbacks report KL and
reward. The command line puts the parts together: ``lightning-rlhf fit --config quickstart``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from lightning_rlhf.datamodule import PreferenceDataModule
    from lightning_rlhf.generation.base import Decoding, Request
    from lightning_rlhf.modules import DPOModule, PolicyGradientModule
    from lightning_rlhf.randomness import Key
    from lightning_rlhf.rollout_datamodule import RolloutDataModule
    from lightning_rlhf.types import Comparison, Label, Preference, Prompt, Response, Rollout

__version__ = "0.1.0"

__all__ = [
    "Comparison",
    "DPOModule",
    "Decoding",
    "Key",
    "Label",
    "PolicyGradientModule",
    "Preference",
    "PreferenceDataModule",
    "Prompt",
    "Request",
    "Response",
    "Rollout",
    "RolloutDataModule",
]

_HOMES = {
    "Comparison": "types",
    "DPOModule": "modules",
    "Decoding": "generation.base",
    "Key": "randomness",
    "Label": "types",
    "PolicyGradientModule": "modules",
    "Preference": "types",
    "PreferenceDataModule": "datamodule",
    "Prompt": "types",
    "Request": "generation.base",
    "Response": "types",
    "Rollout": "types",
    "RolloutDataModule": "rollout_datamodule",
}


def __getattr__(name: str) -> Any:
    """Import a name at its first use: all of them take seconds, in which the command line must do other things."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
