"""The trained model as a folder that transformers opens."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_rlhf.callbacks.average import WeightAverage
from lightning_rlhf.callbacks.reporting import root
from lightning_rlhf.models.card import RunFacts, card_name, write_cards
from lightning_rlhf.models.hub import HubRepo, check_login, push_folder
from lightning_rlhf.protocols import TrainedModule, module_of
from lightning_rlhf.runtime.fingerprint import described
from lightning_rlhf.runtime.run_record import last_start, versions


class HFExport(Callback):
    """Writes the policy as a Hugging Face folder when the run ends.

    It holds the tokenizer too; ``AutoModelForCausalLM.from_pretrained`` opens it (``PeftModel`` for a LoRA policy). Its
    model card says what was trained, on which data, how, at what cost and with which results, from ``run.json`` and the
    last validation; an adapter has one of its own.

    Args:
        folder: where to write it, relative to ``trainer.default_root_dir``, or an absolute path.
        license: license of the weights for the card, an SPDX identifier such as ``apache-2.0``; default: not stated.
        push_to_hub: repository to which the folder is uploaded; default: none. If that fails, the run does not: a
            warning names cause and remedy.

    Raises:
        ValueError: at the start of a run, if it is to be uploaded and there is no token.
    """

    def __init__(self, folder: str = "model", license: str | None = None, push_to_hub: HubRepo | None = None) -> None:
        self.folder, self.license, self.push_to_hub = folder, license, push_to_hub

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the model can be uploaded, before it is trained."""
        # rank zero uploads
        if self.push_to_hub is not None and stage == "fit" and not trainer.fast_dev_run and trainer.is_global_zero:  # type: ignore[attr-defined]
            check_login(self.push_to_hub)

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
        # only now: all ranks ask the ledger for the number of labels
        facts = self._facts(trainer, pl_module)
        if trainer.is_global_zero and folder.is_dir():
            write_cards(folder, facts, card_name(folder, root(trainer)))
            rank_zero_info(f"model: {folder}")
            self._push(folder, bool(trainer.fast_dev_run))  # type: ignore[attr-defined]

    def _push(self, folder: Path, trial: bool) -> None:
        """Upload the folder."""
        if self.push_to_hub is None or trial:
            return
        try:
            rank_zero_info(f"uploaded to {push_folder(folder, self.push_to_hub)}")
        except ValueError as error:
            # hours of training must not end as a failure for want of a network
            rank_zero_warn(str(error))

    def _facts(self, trainer: Trainer, pl_module: LightningModule) -> RunFacts:
        """Facts of the run for its card."""
        datamodule: object = getattr(trainer, "datamodule", None)
        start = last_start(root(trainer))
        if start is not None:
            settings, known = start["config"], start["versions"]
        else:
            settings, known = {"model": described(pl_module), "data": described(datamodule)}, versions()
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        return RunFacts(
            base=str(getattr(pl_module, "checkpoint", "an unnamed model")),
            settings=settings,
            metrics=metrics,
            steps=trainer.global_step,
            labels=getattr(datamodule, "num_labels", 0),
            cost=getattr(datamodule, "label_cost", None),
            versions=known,
            license=self.license,
        )
