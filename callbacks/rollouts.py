"""Metrics of each round of rollouts, and its most rewarded responses."""

from __future__ import annotations

import math

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_rlhf.callbacks.completions import markdown, write_csv
from lightning_rlhf.callbacks.reporting import Row, log_known, preference_source, root, show_table
from lightning_rlhf.collectors.rollouts import RolloutRound
from lightning_rlhf.evaluation.rollouts import repetition, round_metrics


COLUMNS = ["round", "prompt", "response", "reward", "log ratio", "tokens", "repetition"]


class RolloutMonitor(Callback):
    """Logs metrics of each round of rollouts, and shows its most rewarded responses, where reward hacking is seen.

    At the end of each epoch, for the round it trained on, under ``rollout/``: the metrics of
    `lightning_rlhf.evaluation.rollouts.round_metrics` (reward, KL, length, share ended by EOS, repetition, and others).
    Each part of the reward has a curve of its own, ``rollout/rewards/<name>/mean`` and ``/std``; a reward that learns
    from the responses has its metrics under ``rollout/rewards/`` too.
    After each round ``top_rollouts.md`` and ``.csv`` in ``trainer.default_root_dir`` hold the most rewarded
    responses of the rounds since the run was last started, the newest round first; TensorBoard and W&B show them too.

    Args:
        top: responses shown per round, >= 1.
        rounds: newest rounds shown, >= 1.
    """

    def __init__(self, top: int = 5, rounds: int = 20) -> None:
        if top < 1 or rounds < 1:
            raise ValueError(f"RolloutMonitor needs top and rounds of at least 1; got {top} and {rounds}")
        self.top, self.rounds = top, rounds
        self._shown: dict[int, list[Row]] = {}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the most rewarded responses before they are trained on."""
        round_ = rollout_round(trainer)
        # an epoch may train on the round of the epoch before
        if round_.index in self._shown or not trainer.is_global_zero:
            return
        self._shown[round_.index] = top_rows(round_, self.top)
        for old in sorted(self._shown)[: -self.rounds]:
            del self._shown[old]
        rows = [row for index in sorted(self._shown, reverse=True) for row in self._shown[index]]
        text = markdown(COLUMNS, rows)
        (root(trainer) / "top_rollouts.md").write_text(text, encoding="utf-8")
        write_csv(root(trainer) / "top_rollouts.csv", COLUMNS, rows)
        show_table(trainer, "rollout/top", COLUMNS, rows, text)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the metrics of the round."""
        round_ = rollout_round(trainer)
        metrics = round_metrics(round_.groups, round_.rewards)
        # a metric that a round does not have is NaN, and is left out
        known = {f"rollout/{k}": None if math.isnan(v) else v for k, v in metrics.items()}
        log_known(pl_module, known, on_bar=["rollout/reward"])
        # names as in TRL: rewards/<function>/mean
        for name, part in round_.parts.items():
            if part["count"]:
                values = {f"rollout/rewards/{name}/{kind}": part[kind] for kind in ("mean", "std")}
                log_known(pl_module, values)
        log_known(pl_module, {f"rollout/rewards/{name}": value for name, value in round_.metrics.items()})


def rollout_round(trainer: Trainer) -> RolloutRound:
    """The newest round of rollouts."""
    round_ = preference_source(trainer).round
    if not isinstance(round_, RolloutRound):
        raise ValueError("RolloutMonitor reports on rollouts; use it with RolloutDataModule, or leave it out")
    return round_


def top_rows(round_: RolloutRound, count: int) -> list[Row]:
    """Rows of the most rewarded responses of a round, the best first."""
    best = sorted(round_.rollouts, key=lambda rollout: -(rollout.reward or 0.0))[:count]
    return [
        [
            str(round_.index),
            rollout.prompt.messages[-1]["content"] if rollout.prompt.messages else rollout.prompt.text,
            rollout.response.text,
            rollout.reward,
            rollout.response.log_ratio(),
            str(len(rollout.response.ids)),
            repetition(rollout.response.ids),
        ]
        for rollout in best
    ]
