"""The recipe for sweeps: three trials of a tiny model in one study, one of which is pruned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


optuna = pytest.importorskip("optuna")

EXAMPLE = Path(__file__).parents[1] / "examples" / "optuna_sweep.py"
ARGUMENTS = [
    *("--config", "worlds/menu", "--trainer.max_epochs=3", "--trainer.check_val_every_n_epoch=1"),
    *("--data.heldout.repeats=2", "--trainer.enable_progress_bar=false"),
    *("--model.lr_scheduler.warmup_steps=0", "--trainer.callbacks+=RewardMonitor"),
]


@pytest.mark.slow
def test_a_trial_that_is_behind_is_pruned(tmp_path: Path, load_module: Callable[[Path], Any]) -> None:
    example = load_module(EXAMPLE)
    folder = tmp_path / "sweep"
    folder.mkdir()
    storage = f"sqlite:///{folder / 'study.sqlite'}"
    pruner = optuna.pruners.MedianPruner(n_startup_trials=2)
    study = optuna.create_study(storage=storage, study_name="sweep", direction="maximize", pruner=pruner)
    # at a rate of 0.1 nothing is left of the model
    for rate in (1e-4, 3e-4, 0.1):
        study.enqueue_trial({"lr": rate, "sampler": "VanillaSampler"})
    # the first by the script: it finds the study and its queue
    example.sweep(1, ARGUMENTS, folder)
    study.optimize(lambda trial: example.objective(trial, ARGUMENTS, folder), n_trials=2)

    first, second, third = study.trials
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE", "PRUNED"]
    assert study.best_trial in (first, second)
    for trial in (first, second):
        summary = json.loads((folder / f"trial-{trial.number}" / "summary.json").read_text())
        assert trial.value == summary["j_after"]
        assert list(trial.intermediate_values.values())[-1] == pytest.approx(trial.value)
    assert len(third.intermediate_values) < len(first.intermediate_values), "it did not train to its end"
    assert not (folder / "trial-2" / "summary.json").exists()
