"""Preference learning on PyTorch Lightning: which pair of responses to label, and the training around it.

The flow, and where to read it::

    prompts/  ->  samplers/  ->  labelers/  ->  store.py  ->  collate.py  ->  modules/  ->  losses/  ->  callbacks/
                  generation/    rewards/

A `PreferenceDataModule` collects preferences in rounds, with the current policy; a `DPOModule` learns from them. A
`RolloutDataModule` draws and scores responses; a `PolicyGradientModule` learns from those. Callbacks report KL and
reward. The command line puts the parts together: ``lightning-rlhf fit --config quickstart``.
"""

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
