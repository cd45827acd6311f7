"""A sweep with Optuna: learning rate and sampler by the objective J = E[R] - beta KL on held-out prompts, with pruning.

    python examples/optuna_sweep.py 20 --config worlds/menu --trainer.callbacks+=RewardMonitor

The number of trials, then arguments of ``lightning-rlhf fit``. All trials buy the same labels. The study is in
``runs/sweep/study.sqlite``: the same command goes on with it, and several processes may share it. Do not tune beta this
way, since J of two betas are two objectives.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import ClassVar

import lightning as L
import optuna

from lightning_rlhf.cli import main


FOLDER = Path("runs/sweep")


class Prune(L.Callback):
    """Tells Optuna J after each validation, and ends a trial that is behind the others."""

    trial: ClassVar[optuna.Trial]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report J."""
        if trainer.sanity_checking:
            return
        if "val/objective/j" not in trainer.callback_metrics:
            raise ValueError("nothing logs val/objective/j: add --trainer.callbacks+=RewardMonitor")
        j = float(trainer.callback_metrics["val/objective/j"])
        self.trial.report(j, step=trainer.global_step)
        if self.trial.should_prune():
            raise optuna.TrialPruned(f"J = {j:.2f} at step {trainer.global_step}")


def objective(trial: optuna.Trial, arguments: list[str], folder: Path = FOLDER) -> float:
    """Train with the values of a trial, and return J at the end."""
    Prune.trial = trial
    run_dir = folder / f"trial-{trial.number}"
    values = {
        "model.optimizer.lr": trial.suggest_float("lr", 1e-5, 1e-1, log=True),
        "data.sampler": trial.suggest_categorical("sampler", ["PILAFSampler", "VanillaSampler"]),
        "trainer.callbacks+": f"{__name__}.Prune",
        "run_dir": run_dir,
    }
    main(["fit", *arguments, *(f"--{name}={value}" for name, value in values.items())])
    return float(json.loads((run_dir / "summary.json").read_text())["j_after"])


def sweep(trials: int, arguments: list[str], folder: Path = FOLDER) -> optuna.Study:
    """Run trials of the study in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    storage = f"sqlite:///{folder / 'study.sqlite'}"
    # a trial ends when its best J so far is below the median of the others at that step, once there are four
    pruner = optuna.pruners.MedianPruner(n_startup_trials=4)
    study = optuna.create_study(
        storage=storage, study_name="sweep", direction="maximize", pruner=pruner, load_if_exists=True
    )
    study.optimize(lambda trial: objective(trial, arguments, folder), n_trials=trials)
    return study


if __name__ == "__main__":
    number, *given = sys.argv[1:]
    # Lightning warns of arguments beside those that it is handed
    del sys.argv[1:]
    best = sweep(int(number), given).best_trial
    print(f"best of the study: trial {best.number} with J = {best.value:.2f} at {best.params}")
