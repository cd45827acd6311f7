"""A run small enough to work out by hand: a module and a DataModule that keep the contract of the callbacks.

Imported by the tests through the `toy` fixture, and run as a script by the two-process test:
``python toy_run.py FOLDER DEVICES``.

A round has four pairs, an epoch is one pass over them in two batches of two. On the batch of pairs ``i``: implicit
rewards of chosen and rejected are i and 1, logps -i and -2 i, the label is 1. Held-out answers after ``s`` steps to
prompt ``i``: reward i + s, two tokens with policy logps -1 and reference logps -1 - s (so k1 = 2 s), ended by EOS if i
is even.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_rlhf.runtime import distributed
from lightning_rlhf.types import Comparison, Label, Preference, Prompt, Response


@dataclass
class ToyRound:
    """The round of a DataModule."""

    index: int
    preferences: list[Preference]
    failed: dict[str, int] = field(default_factory=lambda: {"invalid": 2, "timeout": 1})
    sampling_seconds: float = 1.5
    labeling_seconds: float = 0.25
    labels_bought: int = 4
    ties: int = 0


def answer(text: str, policy: float, reference: float, source: str = "policy", eos: bool = True) -> Response:
    """A response of two tokens with equal log-probabilities."""
    return Response((5, 6), text, "eos" if eos else "length", (policy, policy), (reference, reference), source)


def preference(index: int, number: int) -> Preference:
    """Pair ``index``: policy answer of reward ``index`` (k1 = 1) against a reference answer of reward 100."""
    a, b = answer("a", -1.0, -1.5), answer("b", -9.0, -1.0, source="reference")
    comparison = Comparison(Prompt(index, (1,), f"prompt {index}"), a, b)
    return Preference(comparison, Label(1.0, meta={"reward_a": float(index), "reward_b": 100.0}), number)


class ToyData(L.LightningDataModule):
    """Samples a round of four pairs per epoch, within the budget."""

    UNIT = "pair"

    def __init__(self, held_out: int = 4, epochs_per_round: int | None = 1) -> None:
        super().__init__()
        self.held_out = held_out
        self.round: ToyRound | None = None
        self.bought = 0
        self.epochs_per_round: int | None = epochs_per_round
        self.label_budget: int | None = None
        self.passes_per_pair = 3.0
        self.num_ties = 0
        self.num_silver_pairs = 0

    def ends_round(self, epoch: int) -> bool:
        """As the base of the real DataModules says it."""
        return self.epochs_per_round is not None and (epoch + 1) % self.epochs_per_round == 0

    @property
    def num_labels(self) -> int:
        """As in the real DataModule, a collective: it hangs unless every rank asks."""
        return distributed.from_rank_zero(lambda: self.bought)

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.trainer.reload_dataloaders_every_n_epochs = 1

    def train_dataloader(self) -> DataLoader[Any]:
        number = self.trainer.current_epoch // self.epochs_per_round if self.epochs_per_round else 0
        if self.round is None or number > self.round.index:
            left = 4 if self.label_budget is None else min(4, self.label_budget - self.bought)
            pairs = [preference(i, number) for i in range(left)]
            # As in the real DataModule, only rank zero buys.
            self.round = ToyRound(number, pairs, labels_bought=left if distributed.rank() == 0 else 0)
            self.bought += left
        return DataLoader(torch.arange(len(self.round.preferences)), batch_size=2)

    def val_dataloader(self) -> DataLoader[Any]:
        prompts = [Prompt(i, (1,), f"prompt {i}") for i in range(self.held_out)]
        return DataLoader(prompts, batch_size=3, collate_fn=list)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Lightning would copy prompts field by field, which frozen dataclasses refuse."""
        return batch.to(device) if isinstance(batch, Tensor) else batch

    def state_dict(self) -> dict[str, Any]:
        return {"round": -1 if self.round is None else self.round.index, "bought": self.bought}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.round = ToyRound(state["round"], [preference(i, state["round"]) for i in range(4)])
        self.bought = state["bought"]


class ToyModule(L.LightningModule):
    """Returns the keys of a preference module from its steps."""

    beta = 0.1

    def __init__(self, rewards: bool = True, logps: bool = True) -> None:
        super().__init__()
        self.rewards, self.logps = rewards, logps
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.steps_run: list[int] = []
        self.step_metrics: dict[str, Tensor] = {}

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        self.steps_run.append(self.global_step)
        pairs = batch.float()
        return {
            "loss": self.weight * 0.01,
            "chosen_rewards": pairs,
            "rejected_rewards": torch.ones_like(pairs),
            "chosen_logps": -pairs,
            "rejected_logps": -2 * pairs,
            "label": torch.ones_like(pairs),
            "num_items": len(pairs),
            "num_tokens": 10 * len(pairs),
        }

    def validation_step(self, batch: list[Prompt], batch_idx: int) -> dict[str, Any]:
        step = self.trainer.global_step
        reference = -1.0 - step
        responses = [answer(f"answer {p.index} | {step}", -1.0, reference, eos=p.index % 2 == 0) for p in batch]
        if not self.logps:
            responses = [Response(r.ids, r.text, r.finish_reason) for r in responses]
        rewards = torch.tensor([float(p.index + step) for p in batch], dtype=torch.float64)
        return {"prompts": batch, "responses": responses, "rewards": rewards if self.rewards else None}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        torch.save(self.state_dict(), folder / "weights.pt")


def trainer(folder: Path, callbacks: list[L.Callback], **options: Any) -> L.Trainer:
    """A quiet Trainer on the CPU."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return L.Trainer(default_root_dir=folder, callbacks=callbacks, **{**defaults, **options})


if __name__ == "__main__":
    from lightning.pytorch.loggers import CSVLogger

    from lightning_rlhf.callbacks import CompletionsTable, FrontierPlot, KLMonitor, RewardMonitor, Summary, Throughput

    folder, devices = Path(sys.argv[1]), int(sys.argv[2])
    callbacks = [KLMonitor(), RewardMonitor(), Throughput(), FrontierPlot(), CompletionsTable(), Summary()]
    # Five prompts on two ranks: the sampler repeats one of them.
    data, logger = ToyData(held_out=5), CSVLogger(folder, name="", version="")
    run = trainer(folder, callbacks, logger=logger, devices=devices, strategy="ddp" if devices > 1 else "auto")
    module = ToyModule()
    run.validate(module, datamodule=data, verbose=False)
    run.fit(module, datamodule=data)
