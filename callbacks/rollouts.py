"""What the policy does for its reward: figures of each round, and the responses that earned most."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_rlhf.callbacks.completions import markdown, write_csv
from lightning_rlhf.callbacks.reporting import log_known, preference_source, root, show_table
from lightning_rlhf.collectors.rollouts import RolloutRound
from lightning_rlhf.evaluation.rollouts import repetition, round_figures


COLUMNS = ["round", "prompt", "response", "reward", "log ratio", "tokens", "repetition"]


class RolloutMonitor(Callback):
    """Logs what each round of rollouts earned, and shows the responses that earned most: reward hacking is seen there.

    At the end of each epoch, for the round it trained on, under ``rollout/``: what
    `lightning_rlhf.evaluation.rollouts.round_figures` computes (reward, KL, length, share ended by EOS, repetition, and
    others). After each round ``top_rollouts.md`` and ``.csv`` in ``trainer.default_root_dir`` hold the most rewarded
    responses of the rounds since the run was last started, the newest round first; TensorBoard and W&B show them too.

    Args:
        top: responses shown per round, >= 1.
        rounds: newest rounds shown, >= 1.
    """

    def __init__(self, top: int = 5, rounds: int = 20) -> None:
        if top < 1 or rounds < 1:
            raise ValueError(f"RolloutMonitor needs top and rounds of at least 1; got {top} and {rounds}")
        self.top, self.rounds = top, rounds
        self._shown: dict[int, list[list[Any]]] = {}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the most rewarded responses before they are trained on."""
        drawn = rollout_round(trainer)
        if drawn.index in self._shown or not trainer.is_global_zero:
            return
        self._shown[drawn.index] = top_rows(drawn, self.top)
        for old in sorted(self._shown)[: -self.rounds]:
            del self._shown[old]
        rows = [row for index in sorted(self._shown, reverse=True) for row in self._shown[index]]
        text = markdown(COLUMNS, rows)
        (root(trainer) / "top_rollouts.md").write_text(text, encoding="utf-8")
        write_csv(root(trainer) / "top_rollouts.csv", COLUMNS, rows)
        show_table(trainer, "rollout/top", COLUMNS, rows, text)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the figures of the round."""
        drawn = rollout_round(trainer)
        figures = round_figures(drawn.groups, drawn.rewards)
        log_known(pl_module, {f"rollout/{k}": None if math.isnan(v) else v for k, v in figures.items()})


def rollout_round(trainer: Trainer) -> RolloutRound:
    """The newest round of rollouts."""
    drawn = preference_source(trainer).round
    if not isinstance(drawn, RolloutRound):
        raise ValueError("RolloutMonitor reports on rollouts; use it with RolloutDataModule, or leave it out")
    return drawn


def top_rows(drawn: RolloutRound, count: int) -> list[list[Any]]:
    """Rows of the most rewarded responses of a round, the best first."""
    best = sorted(drawn.rollouts, key=lambda rollout: -(rollout.reward or 0.0))[:count]
    return [
        [
            str(drawn.index),
            rollout.prompt.messages[-1]["content"] if rollout.prompt.messages else rollout.prompt.text,
            rollout.response.text,
            rollout.reward,
            rollout.response.log_ratio(),
            str(len(rollout.response.ids)),
            repetition(rollout.response.ids),
        ]
        for rollout in best
    ]
