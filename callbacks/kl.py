"""KL of the policy to its reference."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer

from lightning_rlhf.callbacks.base import HeldOutCallback
from lightning_rlhf.callbacks.reporting import log_known, preference_source
from lightning_rlhf.collectors.recorded import sampled
from lightning_rlhf.evaluation.heldout import HeldOutRow, summarize
from lightning_rlhf.protocols import Round


class KLMonitor(HeldOutCallback):
    """Logs KL(policy || reference), in nats, on held-out responses and on the responses of training.

    On each validation: ``val/objective/kl`` (k1, the log ratio of whole responses, unbiased), ``val/kl/k3`` (the
    estimate that is never negative, summed over the tokens of a response), and both per token,
    ``val/kl/k1_per_token`` and ``val/kl/k3_per_token``. At the end of each epoch: ``train/objective/kl``, k1 over the
    responses of the round that were sampled from the policy, with their log-probabilities at sampling time.
    Log-probabilities are untempered: the metrics are KLs of the policy at temperature 1 and top-p 1 only.

    It logs to all loggers of the Trainer, and takes no arguments.
    """

    def on_held_out(self, trainer: Trainer, pl_module: LightningModule, rows: list[HeldOutRow]) -> None:
        """Log the estimates over the held-out responses."""
        means = summarize(rows)
        values = {
            "val/objective/kl": means.kl,
            "val/kl/k3": means.k3,
            "val/kl/k1_per_token": means.k1_per_token,
            "val/kl/k3_per_token": means.k3_per_token,
        }
        log_known(pl_module, values)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the estimate over the responses of the round."""
        round_ = preference_source(trainer).round
        if round_ is not None:
            log_known(pl_module, {"train/objective/kl": round_kl(round_)})


def round_kl(round_: Round) -> float | None:
    """Mean log ratio of the policy's responses in a round, nats per response; None without log-probabilities."""
    # k1 = log pi_theta(y|x) - log pi_ref(y|x), y ~ pi_theta
    ratios: list[float] = []
    for preference in sampled(round_.preferences):
        for response in (preference.comparison.a, preference.comparison.b):
            known = response.policy_logps is not None and response.reference_logps is not None
            # the mean log ratio of responses of another source does not estimate this KL
            if response.source == "policy" and known:
                ratios.append(response.log_ratio())
    return sum(ratios) / len(ratios) if ratios else None
