"""Speed of training, and cost of rounds."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_rlhf.callbacks.reporting import log_known, preference_source
from lightning_rlhf.protocols import Round
from lightning_rlhf.runtime import distributed
from lightning_rlhf.runtime.metric_sums import RunningSums, logs_now
from lightning_rlhf.types import State


@dataclass(frozen=True)
class StepCost:
    """Size and duration of one training step on one rank.

    Args:
        items: pairs, or prompts with their responses.
        tokens: token positions computed.
        seconds: wall-clock time from the start of the step to its end.
    """

    items: int
    tokens: int
    seconds: float


class Throughput(Callback):
    """Logs the speed of training, and labels and time of each round.

    On logged training steps: ``throughput/pairs_per_second`` (``prompts_per_second`` for rollouts, ``rows_per_second``
    for completions) and ``throughput/tokens_per_second`` of all ranks together, over at least the steps since the last
    log, and ``throughput/num_tokens``, the token positions computed since the run began. Time between steps is left
    out, as for sampling, labeling and validation. At the end of each epoch, for the
    round it trained on: ``round/labels`` (labels bought since the last start), ``round/failed`` (comparisons without a
    verdict), ``round/ties`` (pairs of equal responses, which cost no label), ``round/sampling_seconds`` and
    ``round/labeling_seconds``.

    Args:
        window: training steps that a speed is averaged over at least, >= 1.
    """

    def __init__(self, window: int = 20) -> None:
        if window < 1:
            raise ValueError(f"Throughput needs a window of at least one step; got {window}")
        self._window = window
        self._steps: list[StepCost] = []
        self._since_log = 0
        self._started = 0.0
        self._speeds = RunningSums()
        self._new_tokens = 0
        self._num_tokens = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock, and log the speed when it is time."""
        # a Trainer that never logs asks for no speed, and its steps would pile up
        if not (trainer.log_every_n_steps or trainer.fast_dev_run):  # type: ignore[attr-defined]
            return
        log, device = logs_now(trainer), pl_module.device
        if device.type == "cuda" and (log or trainer.is_last_batch):
            # steps are queued faster than they are computed: the last one before the clock is read waits for all
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - self._started
        self._steps.append(StepCost(outputs["num_items"], outputs["num_tokens"], seconds))
        self._since_log += 1
        self._new_tokens += outputs["num_tokens"]
        if log:
            self._steps = self._steps[-max(self._window, self._since_log) :]
            self._since_log = 0
            # ranks step together, so their speeds add up
            rate = rates(self._steps, preference_source(trainer).UNIT)
            self._speeds.add({**rate, "num_tokens": float(self._new_tokens)})
            sums = self._speeds.take(trainer)
            self._new_tokens = 0
            self._num_tokens += sums["num_tokens"]
            speeds = {f"throughput/{name}": value for name, value in {**sums, "num_tokens": self._num_tokens}.items()}
            pl_module.log_dict(speeds, on_step=True, on_epoch=False, batch_size=1)

    def state_dict(self) -> State:
        """Tokens so far, as of the last logged step."""
        return {"num_tokens": self._num_tokens}

    def load_state_dict(self, state_dict: State) -> None:
        """Restore the state of `state_dict`."""
        self._num_tokens = state_dict["num_tokens"]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the cost of the round."""
        round_ = preference_source(trainer).round
        if round_ is not None:
            # labels are bought on rank zero, and only its round counts them
            log_known(pl_module, distributed.from_rank_zero(lambda: round_costs(round_)))


def rates(steps: Iterable[StepCost], unit: str = "pair") -> dict[str, float]:
    """Items and tokens per second over some steps of one rank."""
    steps = list(steps)
    # sum of items / sum of seconds: the mean of the speeds of steps would favor short steps
    seconds = sum(step.seconds for step in steps)
    return {
        f"{unit}s_per_second": sum(step.items for step in steps) / seconds,
        "tokens_per_second": sum(step.tokens for step in steps) / seconds,
    }


def round_costs(round_: Round) -> dict[str, float]:
    """Cost of a round, by names of metrics."""
    return {
        "round/labels": float(round_.labels_bought),
        "round/failed": float(sum(round_.failed.values())),
        "round/ties": float(round_.ties),
        "round/sampling_seconds": round_.sampling_seconds,
        "round/labeling_seconds": round_.labeling_seconds,
    }
