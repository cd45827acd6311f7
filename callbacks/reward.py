"""Implicit rewards of training pairs, and rewards of held-out responses."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_rlhf.callbacks.base import HeldOutCallback
from lightning_rlhf.callbacks.reporting import log_known, preference_source
from lightning_rlhf.collectors.recorded import sampled
from lightning_rlhf.evaluation.heldout import HeldOutRow, part_means, summarize
from lightning_rlhf.losses import reward_accuracy
from lightning_rlhf.protocols import Round, beta_of
from lightning_rlhf.runtime.metric_sums import RunningSums, logs_now


class RewardMonitor(HeldOutCallback):
    """Logs implicit rewards while training, and the reward function's rewards of the policy's responses.

    On logged training steps, as means over the pairs of all ranks since the last log: ``train/rewards/chosen``,
    ``train/rewards/rejected`` and ``train/rewards/margins`` (implicit rewards, beta times log ratio),
    ``train/rewards/accuracies`` (agreement with the label; a tie of either counts 0.5), ``train/logps/chosen`` and
    ``train/logps/rejected`` (nats per response). At the end of each epoch: ``train/reward``, the mean reward of the
    policy's responses of the round, if the labeler keeps rewards, and ``train/reward/<part>`` for each part of the
    reward. On each validation: ``val/reward`` and ``val/reward_stderr``, ``val/rewards/<part>/mean``,
    ``val/objective/j`` (mean reward - beta * KL, the objective of RLHF), ``val/response_length`` (tokens)
    and ``val/eos_rate`` (share of responses that ended with EOS).

    It logs to all loggers of the Trainer, and takes no arguments.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sums = RunningSums()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add up the implicit rewards of the step, and log them when it is time."""
        if "chosen_rewards" not in outputs:  # a policy that learns from rewards has none
            return
        self._sums.add(implicit_reward_sums(outputs))
        if not logs_now(trainer):
            return
        sums = self._sums.take(trainer)
        pairs = sums.pop("pairs")
        values = {f"train/{name}": value / pairs for name, value in sums.items()}
        for name, value in values.items():
            on_bar = name == "train/rewards/accuracies"
            pl_module.log(name, value, prog_bar=on_bar, on_step=True, on_epoch=False, batch_size=int(pairs))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the mean reward of the round."""
        round_ = preference_source(trainer).round
        if round_ is not None:
            rewards = {"train/reward": round_reward(round_), **part_rewards(round_)}
            log_known(pl_module, rewards, on_bar=["train/reward"])

    def on_held_out(self, trainer: Trainer, pl_module: LightningModule, rows: list[HeldOutRow]) -> None:
        """Log the held-out metrics."""
        means = summarize(rows)
        values = {
            "val/reward": means.reward,
            "val/reward_stderr": means.reward_stderr,
            "val/objective/j": means.j(beta_of(pl_module)),
            "val/response_length": means.response_length,
            "val/eos_rate": means.eos_rate,
            **{f"val/rewards/{name}/mean": mean for name, mean in part_means(rows).items()},
        }
        log_known(pl_module, values)


def implicit_reward_sums(outputs: dict[str, Any]) -> dict[str, Tensor | float]:
    """Sums over the pairs of a training step by the names they are logged under, and ``"pairs"``, their number."""
    first, second, label = outputs["chosen_rewards"], outputs["rejected_rewards"], outputs["label"]
    # the second is the reference point of a single response: with P(desirable) < 1/2 it is the better one
    swapped = label < 0.5
    chosen, rejected = torch.where(swapped, second, first), torch.where(swapped, first, second)
    # implicit reward of a response: beta (log pi(y|x) - log pi_ref(y|x))
    # sums and a number of pairs: in the mean over ranks, one with more pairs must weigh more
    return {
        "rewards/chosen": chosen.sum(),
        "rewards/rejected": rejected.sum(),
        "rewards/margins": (chosen - rejected).sum(),
        "rewards/accuracies": reward_accuracy(first - second, label).sum(),
        "logps/chosen": outputs["chosen_logps"].sum(),
        "logps/rejected": outputs["rejected_logps"].sum(),
        "pairs": float(label.numel()),
    }


def round_reward(round_: Round, part: str = "") -> float | None:
    """Mean reward of the policy's responses in a round; None if the labeler keeps no rewards.

    Args:
        round_: the round.
        part: ``/<name>`` of a part of the reward; default: the reward itself.
    """
    rewards: list[float] = []
    for preference in sampled(round_.preferences):
        comparison, meta = preference.comparison, preference.label.meta
        for name, response in ((f"reward_a{part}", comparison.a), (f"reward_b{part}", comparison.b)):
            if response.source == "policy" and name in meta:
                rewards.append(float(meta[name]))
    return sum(rewards) / len(rewards) if rewards else None


def part_rewards(round_: Round) -> dict[str, float | None]:
    """Means of the parts of the reward in a round, ``train/reward/<name>``; empty for a reward without parts."""
    names: set[str] = set()
    for preference in sampled(round_.preferences):
        names |= {key.partition("/")[2] for key in preference.label.meta if key.startswith(("reward_a/", "reward_b/"))}
    return {f"train/reward/{name}": round_reward(round_, f"/{name}") for name in sorted(names)}
