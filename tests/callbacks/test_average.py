"""WeightAverage: the recursion, which weights are evaluated, exported and trained on, and exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_rlhf.callbacks import HFExport, WeightAverage


class Counter(L.LightningModule):
    """A weight that is t after t optimizer steps, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.frozen = nn.Parameter(torch.zeros(())), nn.Parameter(torch.ones(()), requires_grad=False)
        self.validated: list[float] = []
        self.trained: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.trained.append(float(self.weight.detach()))
        return -self.weight

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validated.append(float(self.weight.detach()))

    @property
    def step_metrics(self) -> dict[str, Tensor]:
        return {}

    def save_pretrained(self, folder: Path) -> None:
        folder.write_text(repr(float(self.weight.detach())))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], lr=1.0)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.arange(2))

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.arange(1))


def expected(steps: int, decay: float) -> float:
    """The recursion on the weights 1, 2, ..., from 0."""
    average = 0.0
    for t in range(1, steps + 1):
        d = min(decay, (1 + t) / (10 + t))
        average = d * average + (1 - d) * t
    return average


def fit(folder: Path, epochs: int, *callbacks: Callback, **options: Any) -> Counter:
    module = Counter()
    trainer = L.Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, ModelCheckpoint(folder, save_last=True)],
    )
    trainer.fit(module, **options)
    return module


def test_validation_and_the_end_see_the_average_and_training_the_weights(tmp_path: Path) -> None:
    module = fit(tmp_path, 3, WeightAverage(0.4))
    # the first entry is the sanity check, before training
    assert module.validated == pytest.approx([0.0, expected(2, 0.4), expected(4, 0.4), expected(6, 0.4)])
    assert module.trained == [0, 1, 2, 3, 4, 5]
    assert float(module.weight.detach()) == pytest.approx(expected(6, 0.4))
    # the checkpoint has the weights that training goes on with
    assert float(torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]["weight"]) == 6


def test_a_run_continues_with_the_same_average(tmp_path: Path) -> None:
    fit(tmp_path, 2, WeightAverage(0.4))
    module = fit(tmp_path, 3, WeightAverage(0.4), ckpt_path=tmp_path / "last.ckpt")
    assert module.trained == [4, 5]
    assert float(module.weight.detach()) == pytest.approx(expected(6, 0.4))


def test_the_export_has_the_average_wherever_it_is_listed(tmp_path: Path) -> None:
    fit(tmp_path, 1, HFExport(), WeightAverage(0.4))
    assert float((tmp_path / "model").read_text()) == pytest.approx(expected(2, 0.4))


def test_decay_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"WeightAverage.decay must lie in \[0, 1\)"):
        WeightAverage(1.0)
