"""What the monitors log, against numbers worked out by hand from the toy run (see toy_run.py)."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from lightning_rlhf.callbacks import CompletionsTable, FrontierPlot, KLMonitor, RewardMonitor, StepLines, Throughput
from lightning_rlhf.callbacks.throughput import StepCost, rates


def monitors() -> list[Callback]:
    return [KLMonitor(), RewardMonitor(), Throughput()]


def fit(
    toy: ModuleType, folder: Path, module: Any = None, callbacks: list[Callback] | None = None, **options: Any
) -> Any:
    trainer = toy.trainer(folder, monitors() if callbacks is None else callbacks, **options)
    trainer.fit(toy.ToyModule() if module is None else module, datamodule=toy.ToyData())
    return trainer


def logged(folder: Path) -> dict[str, list[float]]:
    """The columns of metrics.csv, without their empty cells."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}


@pytest.fixture(scope="module")
def columns(toy: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Everything two epochs of two steps log."""
    folder = tmp_path_factory.mktemp("run")
    fit(toy, folder, logger=CSVLogger(folder, name="", version=""))
    return logged(folder)


def test_implicit_rewards_of_each_step(columns: dict[str, list[float]]) -> None:
    """Batches of pairs (0, 1) and (2, 3): chosen i, rejected 1, so margins -1, 0, 1, 2, the second one a tie."""
    assert columns["train/rewards/chosen"] == [0.5, 2.5] * 2
    assert columns["train/rewards/rejected"] == [1.0, 1.0] * 2
    assert columns["train/rewards/margins"] == [-0.5, 1.5] * 2
    assert columns["train/rewards/accuracies"] == [0.25, 1.0] * 2
    assert columns["train/logps/chosen"] == [-0.5, -2.5] * 2
    assert columns["train/logps/rejected"] == [-1.0, -5.0] * 2


def test_the_round_counts_answers_by_the_policy_only(columns: dict[str, list[float]]) -> None:
    """Policy answers have rewards 0 to 3 and k1 = 2 tokens * 0.5; reference answers have 100 and -16."""
    assert columns["train/reward"] == [1.5, 1.5]
    assert columns["train/objective/kl"] == [1.0, 1.0]


def test_held_out_figures(columns: dict[str, list[float]]) -> None:
    """After s = 2, 4 steps: rewards 0..3 plus s, so mean 1.5 + s, s^2 = 5/3; k1 = s, k3 = e^-s - 1 + s per token."""
    assert columns["val/reward"] == [3.5, 5.5]
    assert columns["val/reward_stderr"] == pytest.approx([math.sqrt(5 / 3 / 4)] * 2)
    assert columns["val/objective/kl"] == [4.0, 8.0]
    assert columns["val/kl/k1_per_token"] == [2.0, 4.0]
    assert columns["val/kl/k3_per_token"] == pytest.approx([math.exp(-s) - 1 + s for s in (2, 4)])
    assert columns["val/kl/k3"] == pytest.approx([2 * (math.exp(-s) - 1 + s) for s in (2, 4)])
    assert columns["val/objective/j"] == pytest.approx([3.5 - 0.1 * 4, 5.5 - 0.1 * 8])
    assert columns["val/response_length"] == [2.0, 2.0]
    assert columns["val/eos_rate"] == [0.5, 0.5]


def test_round_costs_and_speeds(columns: dict[str, list[float]]) -> None:
    assert columns["round/labels"] == [4.0, 4.0]
    assert columns["round/failed"] == [3.0, 3.0]
    assert columns["round/sampling_seconds"] == [1.5, 1.5]
    assert columns["round/labeling_seconds"] == [0.25, 0.25]
    # 10 tokens a pair in every step.
    pairs, tokens = columns["throughput/pairs_per_second"], columns["throughput/tokens_per_second"]
    assert len(pairs) == 4
    assert tokens == pytest.approx([10 * speed for speed in pairs], rel=1e-5)


def test_speed_is_work_over_time_not_a_mean_of_speeds() -> None:
    steps = [StepCost(items=2, tokens=100, seconds=1.0), StepCost(items=4, tokens=50, seconds=3.0)]
    assert rates(steps) == {"pairs_per_second": 1.5, "tokens_per_second": 37.5}


def test_tokens_so_far_outlive_a_restart(toy: ModuleType, tmp_path: Path) -> None:
    trainer = toy.trainer(tmp_path, [first := Throughput()], max_epochs=2)
    trainer.fit(toy.ToyModule(), datamodule=toy.ToyData())
    # 4 steps of 2 pairs with 10 tokens each
    assert trainer.callback_metrics["throughput/num_tokens"] == 80
    again = Throughput()
    again.load_state_dict(first.state_dict())
    trainer = toy.trainer(tmp_path / "again", [again], max_epochs=1)
    trainer.fit(toy.ToyModule(), datamodule=toy.ToyData())
    assert trainer.callback_metrics["throughput/num_tokens"] == 120


def test_parts_of_the_held_out_reward_have_curves(toy: ModuleType, tmp_path: Path) -> None:
    class Parts(toy.ToyModule):  # type: ignore[misc, name-defined]
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            output = super().validation_step(batch, batch_idx)
            # rewards 4 to 7 after four steps; the first part applies to those above 5 alone
            high = torch.where(output["rewards"] > 5, output["rewards"], torch.nan)
            return {**output, "reward_parts": {"high": high, "half": output["rewards"] / 2}}

    logged = fit(toy, tmp_path, Parts()).callback_metrics
    assert logged["val/rewards/high/mean"] == 6.5
    assert logged["val/rewards/half/mean"] == 2.75
    assert logged["val/reward"] == 5.5


def test_a_line_for_each_logged_step_and_validation(
    toy: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = toy.trainer(tmp_path, [*monitors(), StepLines()], max_epochs=2, log_every_n_steps=2)
    trainer.fit(toy.ToyModule(), datamodule=toy.ToyData())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.partition(":")[0] for line in lines] == [f"step {n}, epoch {n // 2 - 1}" for n in (2, 2, 4, 4)]
    assert "val/reward 3.5, val/objective/kl 4, val/objective/j 3.1" in lines[0]
    # pairs 0 to 3 with rewards i and 1: one of two right twice, a tie counts 1/2
    assert "train/rewards/accuracies 0.625" in lines[1] and "train/reward " in lines[1]
    assert lines[1].endswith("lr 0.1")


def test_a_trainer_that_never_logs_keeps_no_steps(toy: ModuleType, tmp_path: Path) -> None:
    kept = []
    for every in (1, 0):
        throughput = Throughput(window=3)
        trainer = toy.trainer(tmp_path, [throughput], log_every_n_steps=every, max_epochs=3)
        trainer.fit(toy.ToyModule(), datamodule=toy.ToyData())
        assert trainer.global_step == 6
        kept.append(len(throughput._steps))
    assert kept == [3, 0]


def test_without_rewards_or_log_probabilities_their_figures_are_absent(toy: ModuleType, tmp_path: Path) -> None:
    trainer = fit(toy, tmp_path, toy.ToyModule(rewards=False))
    assert not {"val/reward", "val/reward_stderr", "val/objective/j"} & trainer.callback_metrics.keys()
    assert trainer.callback_metrics["val/objective/kl"] == 8.0
    trainer = fit(toy, tmp_path, toy.ToyModule(logps=False))
    assert not {"val/objective/kl", "val/kl/k3", "val/objective/j"} & trainer.callback_metrics.keys()
    assert trainer.callback_metrics["val/reward"] == 5.5


def test_a_module_that_decodes_nothing_logs_nothing_held_out(toy: ModuleType, tmp_path: Path) -> None:
    class Mute(toy.ToyModule):  # type: ignore[misc, name-defined]
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            return None

    trainer = fit(toy, tmp_path, Mute())
    assert not [name for name in trainer.callback_metrics if name.startswith("val/")]


def test_the_sanity_check_is_not_a_validation(toy: ModuleType, tmp_path: Path) -> None:
    frontier = FrontierPlot()
    fit(toy, tmp_path, callbacks=[*monitors(), frontier], num_sanity_val_steps=-1, max_epochs=1)
    assert [point.step for point in frontier.points] == [2]


def test_plain_dataloaders_are_refused_with_a_remedy(toy: ModuleType, tmp_path: Path) -> None:
    trainer = toy.trainer(tmp_path, [KLMonitor()], max_epochs=1)
    loader = torch.utils.data.DataLoader(torch.arange(2), batch_size=2)
    with pytest.raises(ValueError, match=r"trainer.fit\(module, datamodule=...\)"):
        trainer.fit(toy.ToyModule(), train_dataloaders=loader)


ALL = {
    "train/rewards/accuracies": 1.0,
    "train/reward": 1.5,
    "val/reward": 5.5,
    "val/objective/kl": 8.0,
    "round/labels": 4.0,
}


def test_csv_tensorboard_and_wandb_get_the_same(
    toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb = WandbLogger(save_dir=tmp_path, offline=True)
    loggers = [
        CSVLogger(tmp_path / "csv", name="", version=""),
        TensorBoardLogger(str(tmp_path / "tb"), name="", version=""),
        wandb,
    ]
    fit(toy, tmp_path, callbacks=[*monitors(), FrontierPlot(), CompletionsTable()], logger=loggers)

    columns = logged(tmp_path / "csv")
    assert {name: columns[name][-1] for name in ALL} == ALL

    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert {name: events.Scalars(name)[-1].value for name in ALL} == ALL
    assert len(events.Images("val/frontier")) == 2
    assert "val/completions/text_summary" in events.Tags()["tensors"]

    summary = dict(wandb.experiment.summary)
    wandb.experiment.finish()
    assert {name: summary[name] for name in ALL} == ALL
    assert summary["val/frontier"]["_type"] == "images/separated"
    assert summary["val/completions"]["_type"] == "table-file"
