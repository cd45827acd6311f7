"""The trained model as a folder that transformers opens."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_rlhf.callbacks.average import WeightAverage
from lightning_rlhf.callbacks.reporting import root
from lightning_rlhf.protocols import TrainedModule, module_of


class HFExport(Callback):
    """Writes the policy as a Hugging Face folder when the run ends.

    It holds the tokenizer too; ``AutoModelForCausalLM.from_pretrained`` opens it (``PeftModel`` for a LoRA policy).

    Args:
        folder: where to write it, relative to ``trainer.default_root_dir``, or an absolute path.
    """

    def __init__(self, folder: str = "model") -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export; all ranks take part, since a sharded policy must be gathered, and rank zero writes."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        # the averaged weights, wherever that callback is listed
        for callback in callbacks:
            if isinstance(callback, WeightAverage):
                callback.finish(pl_module)
        # a trial writes into its own folder, whatever this one is
        folder: Path = root(trainer) / (Path(self.folder).name if trainer.fast_dev_run else self.folder)  # type: ignore[attr-defined]
        module_of(trainer, TrainedModule, "HFExport").save_pretrained(folder)
