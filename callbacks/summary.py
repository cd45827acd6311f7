"""The result of the run, in one line and in one file."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_rlhf.callbacks.base import HeldOutCallback
from lightning_rlhf.callbacks.reporting import last_validation, preference_source, root
from lightning_rlhf.evaluation.feedback import Feedback, feedback_lines
from lightning_rlhf.evaluation.heldout import HeldOutMeans, HeldOutRow, optional_mean, summarize
from lightning_rlhf.protocols import PricedSource, beta_of
from lightning_rlhf.types import State


RowKey = tuple[int, int, int]
PAIR_METRICS = {"pairs": "pairs", "accuracy": "accuracy", "loss": "loss", "margin": "rewards/margins"}
"""Names in the result, and those under ``val/``, of the metrics of held-out pairs."""


@dataclass(frozen=True)
class Validation:
    """The results of one validation.

    Args:
        step: optimizer steps taken before it.
        means: its means.
        rewards: reward of each held-out answer, by row, for the paired difference.
    """

    step: int
    means: HeldOutMeans
    rewards: dict[RowKey, float]


class Summary(HeldOutCallback):
    """Prints the result of the run as its last line, and writes it to ``summary.json``.

    The result: held-out mean reward before and after training with standard errors, the paired difference over the same
    prompts with its standard error (smaller than the two errors suggest, since hard prompts are hard both times), KL in
    nats per sequence, J = reward - beta * KL before and after, labels bought, model passes per pair, seconds; and the
    free ties (pairs of equal responses), where there are any. The file has ``cost``, the price of all label attempts,
    and the CPU seconds of this process, too. Where people or several labelers gave the labels, lines above the last one
    say how far they agree, and the file has ``sources``, ``alignment`` and ``people``. The first validation of the run
    counts as before, the latest as after; both are kept in the checkpoint, as are the seconds. Of recorded held-out
    pairs the line has accuracy and loss before and after, and the file the mean margin too. Unknown metrics, such as
    rewards without a reward function, are left out of the line and null in the file.

    It writes into ``trainer.default_root_dir`` on rank zero, and takes no arguments. List it last, so that no other
    callback prints after it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._before: Validation | None = None
        self._after: Validation | None = None
        self._pairs_before: dict[str, float] = {}
        self._pairs_after: dict[str, float] = {}
        self._seconds_before = 0.0  # In earlier fits of the run.
        self._started: float | None = None
        self._cpu_before = 0.0
        self._cpu_started = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks."""
        self._started, self._cpu_started = time.perf_counter(), time.process_time()

    def on_held_out(self, trainer: Trainer, pl_module: LightningModule, rows: list[HeldOutRow]) -> None:
        """Keep the first and the latest validation."""
        rewards = {row.key: row.reward for row in rows if row.reward is not None}
        self._after = Validation(trainer.global_step, summarize(rows), rewards)
        self._before = self._before or self._after

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the first and the latest metrics of held-out pairs."""
        found = {name: trainer.callback_metrics.get(f"val/{key}") for name, key in PAIR_METRICS.items()}
        # a module without pairs logs none of them
        if trainer.sanity_checking or found["pairs"] is None:
            return
        metrics = {name: value.item() for name, value in found.items() if value is not None}
        self._pairs_after = {"step": trainer.global_step, **metrics}
        self._pairs_before = self._pairs_before or self._pairs_after

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write and print the result."""
        # a second fit with this object goes on counting from here
        self._seconds_before, self._cpu_before, self._started = self._seconds(), self._cpu_seconds(), None
        source = preference_source(trainer)
        passes = source.passes_per_pair
        ties, silver = source.num_ties, source.num_silver_pairs
        priced: dict[str, Any] = {}
        if isinstance(source, PricedSource):
            priced = {"cost": source.cost(), **source.feedback()}
        result = {
            **result_of(self._before, self._after, beta_of(pl_module)),
            **pair_result_of(self._pairs_before, self._pairs_after),
            "steps": trainer.global_step,
            # of the last step: nothing is held out in many offline runs
            **({} if self._after or self._pairs_after else {"train_loss": logged(trainer, "train/loss")}),
            "labels": source.num_labels,
            **({"ties": ties} if ties else {}),
            **({"silver_pairs": silver} if silver else {}),
            **priced,
            "passes_per_pair": None if math.isnan(passes) else passes,
            "seconds": self._seconds(),
            "cpu_seconds": self._cpu_seconds(),
        }
        # only now: all ranks ask the ledger for the number of labels
        if not trainer.is_global_zero:
            return
        (root(trainer) / "summary.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(*feedback_lines(cast(Feedback, priced)), closing_line(result), sep="\n", flush=True)

    def _seconds(self) -> float:
        """Seconds spent in fit, restarts included."""
        return self._seconds_before + (0.0 if self._started is None else time.perf_counter() - self._started)

    def _cpu_seconds(self) -> float:
        """CPU seconds of all threads of this process spent in fit, restarts included."""
        return self._cpu_before + (0.0 if self._started is None else time.process_time() - self._cpu_started)

    def state_dict(self) -> State:
        """Both validations and the seconds so far, as plain data."""
        return {
            "pairs_before": self._pairs_before,
            "pairs_after": self._pairs_after,
            "before": None if self._before is None else asdict(self._before),
            "after": None if self._after is None else asdict(self._after),
            "seconds": self._seconds(),
            "cpu_seconds": self._cpu_seconds(),
        }

    def load_state_dict(self, state_dict: State) -> None:
        """Restore the state of `state_dict`."""
        self._before, self._after = (restored(state_dict[name]) for name in ("before", "after"))
        self._seconds_before, self._started = state_dict["seconds"], None
        # checkpoints of 0.1 lack these
        self._pairs_before, self._pairs_after = (state_dict.get(f"pairs_{name}", {}) for name in ("before", "after"))
        self._cpu_before = state_dict.get("cpu_seconds", 0.0)


def restored(state: dict[str, Any] | None) -> Validation | None:
    """A validation from its plain data."""
    return None if state is None else Validation(state["step"], HeldOutMeans(**state["means"]), state["rewards"])


def result_of(before: Validation | None, after: Validation | None, beta: float) -> dict[str, Any]:
    """Compare two validations of a run; unknown metrics are None."""
    early = {} if before is None else before.rewards
    late = {} if after is None else after.rewards
    # paired by prompt: hard prompts are hard both times, so that the error is smaller
    differences = [late[key] - reward for key, reward in early.items() if key in late]
    difference, difference_stderr = optional_mean(differences)
    result: dict[str, Any] = {"beta": beta}
    for name, validation in (("before", before), ("after", after)):
        means = None if validation is None else validation.means
        result |= {
            f"step_{name}": None if validation is None else validation.step,
            f"reward_{name}": None if means is None else means.reward,
            f"reward_{name}_stderr": None if means is None else means.reward_stderr,
            f"kl_{name}": None if means is None else means.kl,
            f"kl_{name}_stderr": None if means is None else means.kl_stderr,
            f"j_{name}": None if means is None else means.j(beta),
        }
    return {
        **result,
        "reward_difference": difference,
        "reward_difference_stderr": difference_stderr,
        "prompts": len(differences),
    }


def pair_result_of(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Compare the held-out pairs of two validations of a run; empty without pairs."""
    if not before or not after:
        return {}
    result = {"pairs": after["pairs"]}
    for name in ("accuracy", "loss", "margin"):
        result |= {f"{name}_before": before[name], f"{name}_after": after[name]}
    return {**result, "pairs_step_before": before["step"], "pairs_step_after": after["step"]}


def logged(trainer: Trainer, name: str) -> float | None:
    """The last value of a metric; None if it was not logged."""
    value = trainer.callback_metrics.get(name)
    return None if value is None else value.item()


def closing_line(result: Mapping[str, Any]) -> str:
    """Put the result of a run into one line."""
    parts = []
    trained = result["step_before"] != result["step_after"]
    if not trained and result["reward_after"] is not None:
        reward = measured(result["reward_after"], result["reward_after_stderr"])
        parts.append(f"held-out reward {reward} (validated once, at step {result['step_after']})")
    elif result["reward_before"] is not None and result["reward_after"] is not None:
        early = measured(result["reward_before"], result["reward_before_stderr"])
        late = measured(result["reward_after"], result["reward_after_stderr"])
        change = measured(result["reward_difference"], result["reward_difference_stderr"], sign="+")
        parts.append(f"held-out reward {early} -> {late} ({change} paired)")
    if "pairs" in result:
        parts.append(pair_line(result))
    if result["kl_after"] is not None:
        parts.append(f"KL {rounded(result['kl_after'])} nats/sequence")
    if trained and result["j_before"] is not None and result["j_after"] is not None:
        parts.append(f"J {rounded(result['j_before'])} -> {rounded(result['j_after'])}")
    if not parts and result.get("train_loss") is not None:
        parts.append(f"training loss {result['train_loss']:.3f} in step {result['steps']}, no held-out rows")
    parts.append(f"{result['labels']} labels")
    recorded = result["passes_per_pair"] == 0
    # a price of 1 per label says nothing new, nor does that of recorded labels
    if result.get("cost") not in (None, float(result["labels"])) and not (recorded and result["cost"] == 0):
        parts.append(f"cost {result['cost']:.6g}")
    if result.get("ties"):
        parts.append(f"{result['ties']} free ties (equal responses)")
    if result.get("silver_pairs"):
        parts.append(f"{result['silver_pairs']} silver pairs")
    if result["passes_per_pair"] is not None and not recorded:
        parts.append(f"{result['passes_per_pair']:.1f} passes per pair")
    return ", ".join([*parts, f"{result['seconds']:.0f} s"])


def pair_line(result: Mapping[str, float]) -> str:
    """Put the held-out pairs of a run into words."""
    accuracy, loss, pairs = result["accuracy_after"], result["loss_after"], result["pairs"]
    # binomial standard error
    error = math.sqrt(accuracy * (1 - accuracy) / pairs)
    trained = result["pairs_step_before"] != result["pairs_step_after"]
    earlier = [f"{result[f'{name}_before']:.3f} -> " if trained else "" for name in ("accuracy", "loss")]
    return (
        f"held-out accuracy {earlier[0]}{accuracy:.3f} ± {error:.3f} on {pairs:.0f} pairs, loss {earlier[1]}{loss:.3f}"
    )


def measured(value: float, error: float | None, sign: str = "") -> str:
    """Write a number with its standard error, two decimals each."""
    return rounded(value, sign) + ("" if error is None else f" ± {error:.2f}")


def rounded(value: float, sign: str = "-") -> str:
    """Two decimals, and never a zero with a minus."""
    # -0.0 + 0.0 = 0.0
    return f"{round(value, 2) + 0.0:{sign}.2f}"


class LossSummary(Callback):
    """Prints the held-out loss as the last line, and writes all metrics of the last validation to ``summary.json``.

    It writes into ``trainer.default_root_dir`` on rank zero, and takes no arguments. List it last.
    """

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write and print the metrics."""
        metrics = last_validation(trainer)
        if metrics is None:
            return
        if "loss" not in metrics:
            print(f"{trainer.global_step} steps; no held-out rows", flush=True)
            return
        print(
            f"held-out loss {metrics['loss']:.3f} nats per token (perplexity {metrics['perplexity']:.2f}), "
            f"token accuracy {metrics['token_accuracy']:.3f}, {trainer.global_step} steps",
            flush=True,
        )


class PairSummary(Callback):
    """Prints held-out accuracy, its baseline and calibration as the last line; all metrics go to ``summary.json``.

    It writes into ``trainer.default_root_dir`` on rank zero, and takes no arguments. List it last.
    """

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write and print the metrics of the last validation."""
        metrics = last_validation(trainer)
        if metrics is None:
            return
        if "accuracy" not in metrics:
            print(f"{trainer.global_step} steps; no held-out pairs", flush=True)
            return
        accuracy, pairs = metrics["accuracy"], metrics["pairs"]
        # binomial standard error
        error = math.sqrt(accuracy * (1 - accuracy) / pairs)
        # whichever of "the longer" and "the shorter is better" is right more often on these pairs
        by_length = max(metrics["longer_accuracy"], 1 - metrics["longer_accuracy"])
        print(
            f"held-out accuracy {accuracy:.3f} ± {error:.3f} on {pairs:.0f} pairs (by length alone: "
            f"{by_length:.3f}), Brier {metrics['brier']:.3f}, ECE {metrics['ece']:.3f}, "
            f"{trainer.global_step} steps",
            flush=True,
        )
