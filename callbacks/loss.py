"""The result of supervised fine-tuning, in one line and in one file."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_rlhf.callbacks._run import last_validation


class LossSummary(Callback):
    """Prints the held-out loss as the last line, and writes all figures of the last validation to ``summary.json``.

    It writes into ``trainer.default_root_dir`` on rank zero, and takes no arguments. List it last.
    """

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write and print the figures."""
        figures = last_validation(trainer)
        if figures is None:
            return
        if "loss" not in figures:
            print(f"{trainer.global_step} steps; no held-out rows", flush=True)
            return
        print(
            f"held-out loss {figures['loss']:.3f} nats per token (perplexity {figures['perplexity']:.2f}), "
            f"token accuracy {figures['token_accuracy']:.3f}, {trainer.global_step} steps",
            flush=True,
        )
