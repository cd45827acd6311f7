"""Modules whose DataModule collects rounds: an engine for sampling, and a hook at the start of a round."""

from __future__ import annotations

from abc import ABC
from typing import TYPE_CHECKING

from lightning_rlhf.generation import PolicyEngine
from lightning_rlhf.generation.base import Decoding
from lightning_rlhf.modules.base import AbstractStepModule, Batch
from lightning_rlhf.protocols import RoundData, RoundModule, SilverModule, datamodule_of


class AbstractRoundModule(AbstractStepModule[Batch], ABC):
    """A module that may be trained on rounds."""

    def engine(self, decoding: Decoding) -> PolicyEngine | None:
        """Make the engine that samples responses; default: None, pairs must be recorded ones."""
        del decoding
        return None

    def start_round(self, index: int) -> None:
        """Prepare for round ``index``; the DataModule calls this before it samples. Default: nothing."""
        del index

    def predict_step(self, batch: list[int], batch_idx: int) -> None:
        """Sample rounds into the ledger without labels (``lightning-rlhf sample``).

        Args:
            batch: numbers of the rounds.
            batch_idx: not used.
        """
        del batch_idx
        datamodule_of(self.trainer, RoundData, type(self).__name__).sample_only(batch)


if TYPE_CHECKING:

    def _fulfils(module: AbstractRoundModule[Batch]) -> RoundModule:
        return module

    def _is_labeled_by_a_model(module: AbstractRoundModule[Batch]) -> SilverModule:
        return module
