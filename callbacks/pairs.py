"""The result of a reward model's run, in one line and in one file."""

from __future__ import annotations

import math

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_rlhf.callbacks._run import last_validation


class PairSummary(Callback):
    """Prints held-out accuracy, its baseline and calibration as the last line; all figures go to ``summary.json``.

    It writes into ``trainer.default_root_dir`` on rank zero, and takes no arguments. List it last.
    """

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write and print the figures of the last validation."""
        figures = last_validation(trainer)
        if figures is None:
            return
        if "accuracy" not in figures:
            print(f"{trainer.global_step} steps; no held-out pairs", flush=True)
            return
        accuracy, pairs = figures["accuracy"], figures["pairs"]
        error = math.sqrt(accuracy * (1 - accuracy) / pairs)
        # whichever of "the longer" and "the shorter is better" is right more often on these pairs
        by_length = max(figures["longer_accuracy"], 1 - figures["longer_accuracy"])
        print(
            f"held-out accuracy {accuracy:.3f} ± {error:.3f} on {pairs:.0f} pairs (by length alone: "
            f"{by_length:.3f}), Brier {figures['brier']:.3f}, ECE {figures['ece']:.3f}, "
            f"{trainer.global_step} steps",
            flush=True,
        )
