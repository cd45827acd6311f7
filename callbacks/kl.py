"""How far the policy has moved from its reference."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer

from lightning_rlhf.callbacks.base import HeldOutCallback
from lightning_rlhf.callbacks.reporting import log_known, preference_source
from lightning_rlhf.evaluation.heldout import HeldOutRow, summarise
from lightning_rlhf.protocols import Round


class KLMonitor(HeldOutCallback):
    """Logs KL(policy || reference), in nats, on held-out answers and on the answers drawn for training.

    On each validation: ``val/objective/kl`` (k1: the log ratio of whole answers, unbiased), ``val/kl/k3`` (the estimate
    that is never negative, summed over the tokens of an answer), and both per token, ``val/kl/k1_per_token`` and
    ``val/kl/k3_per_token``. At the end of each epoch: ``train/objective/kl``, k1 over the answers of the round that the
    policy itself gave and that carry both log-probabilities, as they were when the round was drawn. Log-probabilities
    are untempered, so the figures are KLs of the policy where answers are decoded at temperature 1 and top_p 1.

    It writes to whatever loggers the Trainer has, and takes no arguments.
    """

    def on_held_out(self, trainer: Trainer, pl_module: LightningModule, rows: list[HeldOutRow]) -> None:
        """Log the estimates over the held-out answers."""
        means = summarise(rows)
        values = {
            "val/objective/kl": means.kl,
            "val/kl/k3": means.k3,
            "val/kl/k1_per_token": means.k1_per_token,
            "val/kl/k3_per_token": means.k3_per_token,
        }
        log_known(pl_module, values)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the estimate over the answers of the round."""
        drawn = preference_source(trainer).round
        if drawn is not None:
            log_known(pl_module, {"train/objective/kl": round_kl(drawn)})


def round_kl(drawn: Round) -> float | None:
    """Mean log ratio of the round's answers by the policy, nats per answer; None if none carries log-probabilities."""
    ratios = [
        response.log_ratio()
        for preference in drawn.preferences
        for response in (preference.comparison.a, preference.comparison.b)
        if response.source == "policy" and response.policy_logps is not None and response.reference_logps is not None
    ]
    return sum(ratios) / len(ratios) if ratios else None
