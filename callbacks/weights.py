"""How much the pairs of a round count."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_rlhf.callbacks.reporting import log_known, preference_source
from lightning_rlhf.collectors.preferences import Round
from lightning_rlhf.estimators.difference import effective_sample_size


class WeightMonitor(Callback):
    """Logs how unequal the weights of the pairs of a round are, as those of Reward Difference Optimization.

    At the end of each epoch, for the newest round, under ``weights/``: ``effective_sample_size``, (sum w)^2 / sum w^2
    in pairs; ``effective_share``, the same divided by the pairs of the round; ``mean``; and ``zero_share``, the share
    of pairs with weight 0. Warns at the start of an epoch whose pairs all have weight 0. It takes no arguments.
    """

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if nothing would be learned."""
        weights = round_weights(trainer)
        if len(weights) and not weights.any():
            rank_zero_warn(
                "all pairs of this round have weight 0, and nothing is learned from them: the difference model "
                "contradicts every label; check data.labeler.path, or set data.labeler.rule=sigmoid"
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the metrics of the round."""
        weights = round_weights(trainer)
        if not len(weights):
            return
        size = effective_sample_size(weights)
        values = {
            "effective_sample_size": size,
            "effective_share": size / len(weights),
            "mean": weights.mean(),
            "zero_share": (weights == 0).double().mean(),
        }
        log_known(pl_module, {f"weights/{name}": value.item() for name, value in values.items()})


def round_weights(trainer: Trainer) -> torch.Tensor:
    """Weights of the pairs of the newest round, float64, [pairs]."""
    round_ = preference_source(trainer).round
    if not isinstance(round_, Round):
        raise ValueError("WeightMonitor reports on pairs; use it with PreferenceDataModule, or leave it out")
    return torch.tensor([preference.weight for preference in round_.preferences], dtype=torch.float64)
