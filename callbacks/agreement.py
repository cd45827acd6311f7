"""Whether the reward that a policy is trained for still agrees with the held-out reward."""

from __future__ import annotations

import csv
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lightning_rlhf.callbacks.base import HeldOut, HeldOutCallback
from lightning_rlhf.callbacks.reporting import log_known, preference_source, root
from lightning_rlhf.evaluation.concordance import pair_agreement
from lightning_rlhf.evaluation.heldout import HeldOutRow
from lightning_rlhf.evaluation.metrics import mean_with_error
from lightning_rlhf.rewards import checked_score


COLUMNS = ("step", "agreement", "pairs", "training_reward")


class RewardAgreement(HeldOutCallback):
    """Compares the training reward with the held-out one on the policy's own answers: a stale one is seen here.

    A reward model knows the answers it was trained on; a policy that climbs it leaves them (RLAIF vs. RLHF, arXiv
    2309.00267, calls this staleness). At each validation of a reinforcement learning run whose ``heldout_reward`` is
    another one than its ``reward``, it logs ``val/agreement``, the share of pairs of answers to the same prompt that
    both order alike, and ``val/training_reward``, the mean of the training reward; both go to ``agreement.csv`` in
    ``trainer.default_root_dir``. It takes no arguments, and needs held-out prompts that are answered more than once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._scored = HeldOut()
        self._points: dict[int, dict[str, float]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look for two rewards.

        Raises:
            ValueError: if the run has no training reward, or no other one for held-out answers.
        """
        super().setup(trainer, pl_module, stage)
        source: Any = preference_source(trainer)
        training, heldout = getattr(source, "reward", None), source.heldout_reward
        # with one reward there is nothing to compare
        if training is None or heldout is None or heldout is training:
            raise ValueError(
                "RewardAgreement compares the reward of reinforcement learning with another one on held-out answers; "
                "set data.heldout_reward, or leave the callback out"
            )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with no rows."""
        super().on_validation_epoch_start(trainer, pl_module)
        self._scored.reset()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score the answers with the training reward."""
        super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        # sanity batches are no held-out metrics
        if outputs is None or trainer.sanity_checking:
            return
        source: Any = preference_source(trainer)
        rewards = checked_score(source.reward, outputs["prompts"], outputs["responses"])
        self._scored.update({**outputs, "rewards": rewards}, dataloader_idx)

    def on_held_out(self, trainer: Trainer, pl_module: LightningModule, rows: list[HeldOutRow]) -> None:
        """Report on a validation epoch."""
        # in the order of the keys, as `rows`: entry i of both is the same answer
        scored = self._scored.gather()
        # pairs are formed within a prompt, so prompts are numbered
        places = {text: place for place, text in enumerate(dict.fromkeys(row.prompt for row in rows))}
        truth, scores = (torch.tensor([row.reward for row in each], dtype=torch.float64) for each in (rows, scored))
        # (1 + mean of sign(r_i - r_j) sign(s_i - s_j)) / 2 over pairs of a prompt; r held-out, s training
        agreement, pairs = pair_agreement(truth, scores, torch.tensor([places[row.prompt] for row in rows]))
        mean, _ = mean_with_error(scores)
        log_known(pl_module, {"val/agreement": agreement if pairs else None, "val/training_reward": mean})
        self._points[trainer.global_step] = {"agreement": agreement, "pairs": pairs, "training_reward": mean}
        # one process writes; `validate` alone leaves the file of the run alone
        if trainer.is_global_zero and trainer.state.fn == TrainerFn.FITTING:
            with (root(trainer) / "agreement.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows({"step": step, **self._points[step]} for step in sorted(self._points))

    def state_dict(self) -> dict[str, object]:
        """The points so far, as plain data."""
        return {"points": [[step, point] for step, point in self._points.items()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of `state_dict`."""
        self._points = dict(state_dict["points"])
