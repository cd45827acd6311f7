"""Callbacks that write files, stop the run, or keep state over a restart."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_rlhf.callbacks import CompletionsTable, FrontierPlot, HFExport, LabelBudget, RewardAgreement, Summary
from lightning_rlhf.callbacks.completions import cell, markdown
from lightning_rlhf.callbacks.summary import closing_line
from lightning_rlhf.commands.fit import RLHFTrainer
from lightning_rlhf.evaluation import read_frontier
from lightning_rlhf.rewards import AbstractReward, RewardOutput
from lightning_rlhf.types import Prompt, Response


def run(toy: ModuleType, folder: Path, callbacks: list[Callback], validate: bool = True, **options: Any) -> Any:
    """Validate, then fit, as the command line does."""
    trainer = toy.trainer(folder, callbacks, **options)
    module, data = toy.ToyModule(), toy.ToyData()
    if validate:
        trainer.validate(module, datamodule=data, verbose=False)
    trainer.fit(module, datamodule=data)
    return trainer


def cut_and_resume(toy: ModuleType, folder: Path, make: Any, **options: Any) -> list[Callback]:
    """Run one epoch, and go on from its checkpoint with new objects; return the new callbacks."""
    saver = ModelCheckpoint(dirpath=folder / "ckpt", filename="one", save_top_k=-1)
    run(toy, folder, [*make(), saver], max_epochs=1, enable_checkpointing=True)
    callbacks: list[Callback] = make()
    trainer = toy.trainer(folder, callbacks, **options)
    trainer.fit(toy.ToyModule(), datamodule=toy.ToyData(), ckpt_path=folder / "ckpt" / "one.ckpt")
    return callbacks


def test_frontier_has_a_point_per_validation_and_survives_a_restart(toy: ModuleType, tmp_path: Path) -> None:
    """After s steps: reward 1.5 + s, KL 2 s, J = reward - 0.1 KL, 4 labels per two steps."""
    cut_and_resume(toy, tmp_path, lambda: [FrontierPlot()])
    points = read_frontier(tmp_path / "frontier.csv")
    assert [(p.step, p.labels, p.reward, p.kl) for p in points] == [
        (0, 0, 1.5, 0.0),
        (2, 4, 3.5, 4.0),
        (4, 8, 5.5, 8.0),
    ]
    assert [p.j for p in points] == pytest.approx([1.5, 3.1, 4.7])
    assert [p.reward_stderr for p in points] == pytest.approx([math.sqrt(5 / 12)] * 3)
    assert [p.kl_stderr for p in points] == [0.0] * 3
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_a_step_validated_twice_is_one_point(toy: ModuleType, tmp_path: Path) -> None:
    frontier = FrontierPlot()
    trainer = run(toy, tmp_path, [frontier])
    trainer.validate(trainer.lightning_module, datamodule=trainer.datamodule, verbose=False)
    assert [point.step for point in frontier.points] == [0, 2, 4]


def test_a_validation_alone_leaves_the_files_of_the_run(toy: ModuleType, tmp_path: Path) -> None:
    run(toy, tmp_path, [FrontierPlot(), CompletionsTable()])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert {path.name for path in before} == {"frontier.csv", "frontier.png", "completions.md", "completions.csv"}
    trainer = toy.trainer(tmp_path, [FrontierPlot(), CompletionsTable()])
    trainer.validate(toy.ToyModule(), datamodule=toy.ToyData(), verbose=False)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_no_rewards_no_frontier(toy: ModuleType, tmp_path: Path) -> None:
    toy.trainer(tmp_path, [FrontierPlot()]).fit(toy.ToyModule(rewards=False), datamodule=toy.ToyData())
    assert not (tmp_path / "frontier.csv").exists()


def test_completions_before_and_after_survive_a_restart(toy: ModuleType, tmp_path: Path) -> None:
    cut_and_resume(toy, tmp_path, lambda: [CompletionsTable(num_prompts=2)])
    with (tmp_path / "completions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [list(row.values()) for row in rows] == [
        ["prompt 0", "answer 0 | 0", "answer 0 | 4", "0.0", "4.0"],
        ["prompt 1", "answer 1 | 0", "answer 1 | 4", "1.0", "5.0"],
    ]
    lines = (tmp_path / "completions.md").read_text().splitlines()
    assert lines[0] == "| prompt | before | after | reward before | reward after |"
    assert lines[2] == r"| prompt 0 | answer 0 \| 0 | answer 0 \| 4 | 0.000 | 4.000 |"
    assert len(lines) == 4


def test_before_any_training_there_is_no_after(toy: ModuleType, tmp_path: Path) -> None:
    run(toy, tmp_path, [CompletionsTable(num_prompts=1)], validate=False, max_epochs=1)
    assert (tmp_path / "completions.md").read_text().splitlines()[2] == r"| prompt 0 | answer 0 \| 2 |  | 2.000 |  |"


def test_markdown_cells_hold_what_would_break_the_table() -> None:
    assert cell("a|b\nc\\d") == r"a\|b<br>c\\d"
    assert cell("<script> & *x* `y` [z]") == r"&lt;script&gt; &amp; \*x\* \`y\` \[z\]"
    assert cell("one\r\ntwo\n") == "one<br>two"
    table = markdown(["p", "q"], [["x\n|", None]])
    assert table == "| p | q |\n| --- | --- |\n| x<br>\\| |  |\n"


def test_the_budget_cuts_the_last_round_and_stops_after_its_epoch(toy: ModuleType, tmp_path: Path) -> None:
    """Rounds of 4 with 6 labels: 2 steps on the first round, 1 on the rest."""
    trainer = run(toy, tmp_path, [LabelBudget(labels=6)], max_epochs=50)
    assert trainer.datamodule.num_labels == 6
    assert trainer.lightning_module.steps_run == [0, 1, 2]
    assert trainer.current_epoch == 2


def test_the_last_round_gets_as_many_epochs_as_the_others(toy: ModuleType, tmp_path: Path) -> None:
    """Rounds of 4 pairs, 3 epochs each, 2 steps an epoch; a round that is never sampled again is left to max_epochs."""
    for epochs_per_round, steps in ((3, 6), (None, 14)):
        data = toy.ToyData(epochs_per_round=epochs_per_round)
        trainer = toy.trainer(tmp_path, [LabelBudget(4)], max_epochs=7)
        trainer.fit(toy.ToyModule(), datamodule=data)
        assert (trainer.global_step, data.num_labels) == (steps, 4)


def test_a_spent_budget_stays_spent_after_a_restart(toy: ModuleType, tmp_path: Path) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path, filename="end", save_on_train_epoch_end=True)
    run(toy, tmp_path, [LabelBudget(4), saver], max_epochs=50, enable_checkpointing=True)
    for labels, steps in ((4, []), (8, [2, 3])):
        module, data = toy.ToyModule(), toy.ToyData()
        trainer = toy.trainer(tmp_path, [LabelBudget(labels)], max_epochs=50)
        trainer.fit(module, datamodule=data, ckpt_path=tmp_path / "end.ckpt")
        assert (module.steps_run, data.num_labels) == (steps, labels)


def test_a_run_cut_off_in_its_last_round_finishes_it(toy: ModuleType, tmp_path: Path) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    run(toy, tmp_path, [LabelBudget(8), saver], max_epochs=50, enable_checkpointing=True)
    module, data = toy.ToyModule(), toy.ToyData()
    # After step 3 of 4 all 8 labels are bought, but half of the second round is not trained on.
    trainer = toy.trainer(tmp_path, [LabelBudget(8)], max_epochs=50)
    trainer.fit(module, datamodule=data, ckpt_path=tmp_path / "step=3.ckpt")
    assert (trainer.global_step, data.num_labels) == (4, 8)
    assert len(module.steps_run) >= 1


def test_rounds_without_a_label_are_counted_over_a_restart(
    toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three idle rounds in a row end the run: two before the restart and one after it."""
    monkeypatch.setattr("lightning_rlhf.callbacks.budget.PATIENCE", 3)

    class Collapsed(toy.ToyData):  # type: ignore[name-defined,misc]
        """Buys its labels in round 0 only."""

        @property
        def num_labels(self) -> int:
            return min(self.bought, 4)

    saver = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_on_train_epoch_end=True, save_top_k=-1)
    trainer = toy.trainer(tmp_path, [LabelBudget(100), saver], max_epochs=3, enable_checkpointing=True)
    trainer.fit(toy.ToyModule(), datamodule=Collapsed())
    resumed = toy.trainer(tmp_path, [LabelBudget(100)], max_epochs=50)
    with pytest.warns(UserWarning, match="last 3 rounds brought 0 labels"):
        resumed.fit(toy.ToyModule(), datamodule=Collapsed(), ckpt_path=tmp_path / "epoch=2.ckpt")
    assert resumed.current_epoch == 4


@pytest.mark.parametrize(("ties", "ends"), [(20, True), (18, False)])
def test_a_policy_that_hardly_ever_differs_has_collapsed(
    toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ties: int, ends: bool
) -> None:
    """One label per round beside so many free ties: below and above a twentieth."""
    monkeypatch.setattr("lightning_rlhf.callbacks.budget.PATIENCE", 3)

    class Trickling(toy.ToyData):  # type: ignore[name-defined,misc]
        """Each round of four pairs counts as one label and as some free ties."""

        @property
        def num_labels(self) -> int:
            return int(self.bought // 4)

        num_ties = property(lambda self: ties * (self.bought // 4), lambda self, value: None)

    trainer = toy.trainer(tmp_path, [LabelBudget(100)], max_epochs=6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(toy.ToyModule(), datamodule=Trickling())
    assert trainer.current_epoch == (3 if ends else 6)
    assert any("last 3 rounds brought 3 labels" in str(warning.message) for warning in caught) == ends


def test_two_budgets_are_one_too_many(toy: ModuleType, tmp_path: Path) -> None:
    data = toy.ToyData()
    data.label_budget = 7
    with pytest.raises(ValueError, match="label_budget=7 and the LabelBudget callback has labels=6"):
        toy.trainer(tmp_path, [LabelBudget(6)]).fit(toy.ToyModule(), datamodule=data)
    with pytest.raises(ValueError, match="at least one label"):
        LabelBudget(0)


def test_export_calls_the_module_once_the_fit_is_over(toy: ModuleType, tmp_path: Path) -> None:
    trainer = run(toy, tmp_path, [HFExport("export/model")])
    exported = torch.load(tmp_path / "export" / "model" / "weights.pt")
    # Four steps of SGD with learning rate 0.1 on 0.01 * weight.
    assert exported["weight"].item() == pytest.approx(1 - 4 * 0.001)
    assert trainer.global_step == 4


def test_the_summary_is_the_last_line_and_a_file(
    toy: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rewards 0..3, then 4 more each: errors sqrt(5/12) = 0.65 alone, yet 0 paired."""
    run(toy, tmp_path, [Summary()])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(
        "held-out reward 1.50 ± 0.65 -> 5.50 ± 0.65 (+4.00 ± 0.00 paired), KL 8.00 nats/sequence, J 1.50 -> 4.70, "
        "8 labels, 3.0 passes per pair, "
    )
    result = json.loads((tmp_path / "summary.json").read_text())
    assert result.pop("seconds") > 0
    assert result.pop("cpu_seconds") > 0
    assert result == {
        "beta": 0.1,
        "step_before": 0,
        "reward_before": 1.5,
        "reward_before_stderr": pytest.approx(math.sqrt(5 / 12)),
        "kl_before": 0.0,
        "kl_before_stderr": 0.0,
        "j_before": 1.5,
        "step_after": 4,
        "reward_after": 5.5,
        "reward_after_stderr": pytest.approx(math.sqrt(5 / 12)),
        "kl_after": 8.0,
        "kl_after_stderr": 0.0,
        "j_after": pytest.approx(4.7),
        "reward_difference": 4.0,
        "reward_difference_stderr": 0.0,
        "prompts": 4,
        "steps": 4,
        "labels": 8,
        "passes_per_pair": 3.0,
    }


def test_a_run_without_pairs_has_no_passes_and_still_writes_json(toy: ModuleType, tmp_path: Path) -> None:
    data = toy.ToyData()
    data.passes_per_pair = math.nan
    toy.trainer(tmp_path, [Summary()]).fit(toy.ToyModule(), datamodule=data)
    assert json.loads((tmp_path / "summary.json").read_text())["passes_per_pair"] is None


def test_the_summary_of_a_resumed_run_looks_back_to_its_first_start(toy: ModuleType, tmp_path: Path) -> None:
    (summary,) = cut_and_resume(toy, tmp_path, lambda: [Summary()])
    result = json.loads((tmp_path / "summary.json").read_text())
    assert (result["step_before"], result["reward_before"], result["reward_difference"]) == (0, 1.5, 4.0)
    first = torch.load(tmp_path / "ckpt" / "one.ckpt")["callbacks"]["Summary"]
    assert result["seconds"] > first["seconds"] > 0
    assert result["cpu_seconds"] > first["cpu_seconds"] > 0
    assert isinstance(summary, Summary)


@pytest.mark.parametrize(
    ("module", "validate", "start"),
    [
        ({"rewards": False}, True, "KL 8.00 nats/sequence, 8 labels, 3.0 passes"),
        ({"logps": False}, True, "held-out reward 1.50 ± 0.65 -> 5.50 ± 0.65 (+4.00 ± 0.00 paired), 8 labels, 3.0"),
        ({}, False, "held-out reward 5.50 ± 0.65 (validated once, at step 4), KL 8.00 nats/sequence, 8 labels"),
    ],
)
def test_the_summary_leaves_out_what_it_cannot_know(
    toy: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    module: dict[str, bool],
    validate: bool,
    start: str,
) -> None:
    model, data = toy.ToyModule(**module), toy.ToyData()
    trainer = toy.trainer(tmp_path, [Summary()], check_val_every_n_epoch=2)
    if validate:
        trainer.validate(model, datamodule=data, verbose=False)
    trainer.fit(model, datamodule=data)
    assert capsys.readouterr().out.splitlines()[-1].startswith(start)
    json.loads((tmp_path / "summary.json").read_text())


def test_the_last_line_of_a_run_without_held_out_rows_has_the_training_loss() -> None:
    unknown = dict.fromkeys(["step_before", "step_after", "reward_before", "reward_after", "kl_after", "j_before"])
    result = {**unknown, "steps": 13, "train_loss": 0.25, "labels": 199, "cost": 0.0, "passes_per_pair": 0.0}
    line = closing_line({**result, "seconds": 3.2})
    assert line == "training loss 0.250 in step 13, no held-out rows, 199 labels, 3 s"
    # sampled pairs have passes, and their labels a price
    sampled = {**result, "train_loss": None, "passes_per_pair": 3.0, "cost": 0.0, "seconds": 3.2}
    assert closing_line(sampled) == "199 labels, cost 0, 3.0 passes per pair, 3 s"


@pytest.mark.slow
def test_two_processes_write_what_one_would(toy: ModuleType, tmp_path: Path) -> None:
    """Five prompts on two ranks: the sampler repeats one, which must not count twice; files and figures agree."""
    environment = {key: value for key, value in os.environ.items() if "PYTEST" not in key}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    for devices in (1, 2):
        command = [sys.executable, toy.__file__, str(tmp_path / str(devices)), str(devices)]
        subprocess.run(command, check=True, timeout=300, env=environment, capture_output=True)
    one, two = tmp_path / "1", tmp_path / "2"
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, two)]
    assert summaries[0]["prompts"] == summaries[1]["prompts"] == 5
    for name in ("reward_before", "reward_before_stderr", "kl_before", "reward_difference_stderr"):
        assert summaries[0][name] == summaries[1][name]
    assert read_frontier(one / "frontier.csv")[0] == read_frontier(two / "frontier.csv")[0]
    # One process takes two steps per epoch, two take one: pairs (0, 2 | 1, 3) together are all four pairs of the round.
    with (two / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["train/rewards/chosen"]) for row in rows if row["train/rewards/chosen"]] == [1.5, 1.5]
    assert [float(row["round/labels"]) for row in rows if row["round/labels"]] == [4.0, 4.0]
    assert [path.name for path in sorted(two.iterdir())] == [path.name for path in sorted(one.iterdir())]


def test_reward_agreement_has_a_point_per_validation_and_survives_a_restart(toy: ModuleType, tmp_path: Path) -> None:
    """The truth ranks answers by their prompt's number; a reward that forgets the last digits of it gets worse."""

    class Forgetful(AbstractReward):
        def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
            # the answers of step s are "answer NUMBER | s": from step 2 on the last of four answers is ranked first
            steps = [int(response.text.split()[-1]) for response in responses]
            return RewardOutput(
                torch.tensor([p.index - 10.0 * (p.index == 3 and s >= 2) for p, s in zip(prompts, steps, strict=True)])
            )

    class OnePrompt(toy.ToyData):  # type: ignore[misc,name-defined]
        reward, heldout_reward = Forgetful(), Forgetful()

        def val_dataloader(self) -> Any:
            prompts = [Prompt(i, (1,), "prompt") for i in range(4)]
            return torch.utils.data.DataLoader(prompts, batch_size=3, collate_fn=list)  # type: ignore[arg-type]

    other = SimpleNamespace(trainer=toy.trainer, ToyModule=toy.ToyModule, ToyData=OnePrompt)
    cut_and_resume(other, tmp_path, lambda: [RewardAgreement()])  # type: ignore[arg-type]
    with (tmp_path / "agreement.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["step"]), int(row["pairs"])) for row in rows] == [(0, 6), (2, 6), (4, 6)]
    # three of six pairs hold the answer that is ranked wrongly
    assert [float(row["agreement"]) for row in rows] == [1.0, 0.5, 0.5]
    other.ToyData.heldout_reward = other.ToyData.reward
    with pytest.raises(ValueError, match=r"set data\.heldout_reward"):
        run(other, tmp_path / "same", [RewardAgreement()])  # type: ignore[arg-type]
    assert [float(row["training_reward"]) for row in rows] == [1.5, -1.0, -1.0]


def test_the_budget_that_comes_last_counts() -> None:
    saver = ModelCheckpoint()
    # as a comparison appends one to `scarce_labels`
    trainer = RLHFTrainer(accelerator="cpu", logger=False, callbacks=[LabelBudget(4), saver, LabelBudget(6)])
    assert [callback.labels for callback in trainer.callbacks if isinstance(callback, LabelBudget)] == [6]
    assert saver in trainer.callbacks
