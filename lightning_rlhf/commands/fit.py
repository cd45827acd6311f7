"""The commands that run on a Trainer: ``fit``, ``validate`` and ``sample``."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from jsonargparse import (
    Namespace,
)
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.precision.precision import _PRECISION_INPUT  # has no public name
from lightning.pytorch.accelerators import Accelerator, CUDAAccelerator
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.callbacks import ProgressBar as AbstractProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from omegaconf.errors import OmegaConfBaseException

import lightning_rlhf.advantages
import lightning_rlhf.callbacks
import lightning_rlhf.labelers
import lightning_rlhf.losses
import lightning_rlhf.modules
import lightning_rlhf.prompts
import lightning_rlhf.rewards
import lightning_rlhf.samplers
import lightning_rlhf.worlds  # noqa: F401  imported so that short class names are found
from lightning_rlhf.callbacks import LabelBudget, ProgressBar, StepLines
from lightning_rlhf.commands.config_files import (
    NamedConfig,
    classes_in_configs,
    config_names,
    nested_nulls,
    note_once,
    with_heldout_class,
)
from lightning_rlhf.commands.errors import RunParser
from lightning_rlhf.commands.export import export_comparisons
from lightning_rlhf.commands.loggers import forget_repeated, keep_in_run_folder, loggers_of, tell_settings
from lightning_rlhf.commands.settings import _plain, fingerprint
from lightning_rlhf.datamodules.rounds import AbstractRoundDataModule
from lightning_rlhf.renamed import renamed_arguments
from lightning_rlhf.runtime.checkpoint_io import SafeCheckpointIO
from lightning_rlhf.runtime.checkpoints import (
    ExplicitCheckpoints,
    NotedSignals,
    RunCheckpoint,
    StopOnSignal,
    check_writable,
    checked,
    meta,
)
from lightning_rlhf.runtime.plugins import check_built, constructor_error
from lightning_rlhf.runtime.precision import bf16_instructions, check_precision, choose_precision, device_type_of
from lightning_rlhf.runtime.run_record import RunRecord, check_settings


def with_last_budget(callbacks: list[L.Callback]) -> list[L.Callback]:
    """Callbacks with the last `LabelBudget` alone: a config that appends one replaces that of an overlay."""
    budgets = [callback for callback in callbacks if isinstance(callback, LabelBudget)]
    return [callback for callback in callbacks if callback not in budgets[:-1]]


class RLHFTrainer(L.Trainer):
    """Lightning's Trainer with the commands of this package, and with ``precision: auto``.

    Args:
        accelerator: as in Lightning: ``auto``, ``cpu``, ``gpu``, ...
        precision: as in Lightning, or ``auto``: ``bf16-mixed`` where the device multiplies bfloat16 fast, else
            ``32-true``.
    """

    def __init__(
        self,
        *,
        accelerator: str | Accelerator = "auto",
        precision: _PRECISION_INPUT | Literal["auto"] | None = None,
        **kwargs: Any,
    ) -> None:
        if precision == "auto":
            # before the Trainer is built: its strategy and its precision are made in one piece
            device_type = device_type_of(accelerator)
            if device_type == "cuda" and not CUDAAccelerator.is_available():
                raise ValueError(
                    f"trainer.accelerator={accelerator}: PyTorch {torch.__version__} sees no GPU on this machine; set "
                    f"--trainer.accelerator=cpu, or install a build of PyTorch for the GPU and its driver"
                )
            precision, reason = choose_precision(device_type, bf16_instructions(device_type))
            rank_zero_info(f"precision: {precision}, {reason}")
        check_precision(str(precision))
        if isinstance(callbacks := kwargs.get("callbacks"), list):
            kwargs["callbacks"] = with_last_budget(callbacks)
        super().__init__(accelerator=accelerator, precision=precision, **kwargs)
        # in place of the connectors that the constructor of Lightning has made
        self._signal_connector = NotedSignals(self)
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:  # a plugin of the user's own stays
            self.strategy.checkpoint_io = SafeCheckpointIO()
        self._checkpoint_connector = ExplicitCheckpoints(self)

    def sample(
        self,
        model: L.LightningModule,
        datamodule: AbstractRoundDataModule[Any] | None = None,
        out: str | None = None,
    ) -> None:
        """Sample one round of comparisons or rollouts from any policy into the ledger; no labels, no training.

        Args:
            model: the policy.
            datamodule: prompts, and a sampler where there is one.
            out: also write the samples to this file (.jsonl or .parquet).
        """
        assert datamodule is not None
        self.predict(model, datamodule=datamodule, return_predictions=False)
        if self.is_global_zero:
            ledger = datamodule.ledger
            print(f"{datamodule.ROUND_ITEMS} are in {ledger}")
            if out is not None:
                print(f"wrote {export_comparisons(str(ledger), out)} {datamodule.ROUND_ITEMS} to {out}")


class RLHFCLI(LightningCLI):
    """LightningCLI with configs by name, a run folder, and runs that continue where they were stopped."""

    def __init__(self, args: list[str] | None = None) -> None:
        super().__init__(
            model_class=L.LightningModule,
            datamodule_class=L.LightningDataModule,
            # a continued run finds the config of its first start, which Lightning would refuse to replace
            save_config_kwargs={"overwrite": True},
            trainer_class=RLHFTrainer,
            # configs hold interpolations, such as ${model.init_args.policy}
            parser_kwargs={"parser_mode": "omegaconf+"},
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=args,
            # the modules make their own optimizers
            auto_configure_optimizers=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Commands that run on a Trainer, with the arguments that are objects of the CLI."""
        commands = LightningCLI.subcommands()
        return {
            "fit": commands["fit"],
            "validate": commands["validate"],
            "sample": {"model", "datamodule"},
        }

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make the parser, with ``--config`` by name."""
        parser = RunParser(**{"prog": "lightning-rlhf", **kwargs})
        parser.epilog = (
            "Other commands: annotate, compare, evaluate, export, import, label, plan, run; each explains itself with "
            "--help."
        )
        parser.add_argument(
            "-c", "--config", action=NamedConfig, help=f"A file, or one of: {', '.join(config_names())}."
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run folder."""
        parser.add_argument("--run_dir", type=str, default="runs/default", help="Folder of everything the run leaves.")
        parser.add_argument("--checkpoint_every", type=int, default=1, help="Epochs between checkpoints.")
        parser.add_argument(
            "--checkpoint_every_steps", type=int | None, default=None, help="Steps between checkpoints, besides."
        )
        parser.add_argument(
            "--checkpoint_every_minutes",
            type=float | None,
            default=20.0,
            help="Minutes after which a checkpoint is written within an epoch; null writes none.",
        )
        parser.link_arguments("run_dir", "trainer.default_root_dir")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, with old names of arguments; report a failed interpolation as an error of the command line."""
        # old names and nulls are rewritten in texts; a dict or Namespace has none
        if args is None or isinstance(args, list):
            args = sys.argv[1:] if args is None else args
            args = nested_nulls(renamed_arguments(args, note_once, classes_in_configs(args)))
            args = with_heldout_class(args, classes_in_configs(args))
        try:
            super().parse_arguments(parser, args)
        except OmegaConfBaseException as error:
            parser.error(str(error))
        if isinstance(args, list):
            self._seed_everything(args)

    def _seed_everything(self, args: list[str]) -> None:
        """Let ``--seed_everything=N`` on the command line decide the seed of the DataModule, unless that is given."""
        given = {arg.partition("=")[0] for arg in args}
        config = self.config[self.config["subcommand"]]
        seed, arguments = config.get("seed_everything"), config.get("data.init_args")
        if "--seed_everything" not in given or given & {"--data.seed", "--data.init_args.seed"}:
            return
        # True asks Lightning for a random seed, which a run could not be continued with
        if isinstance(seed, int) and not isinstance(seed, bool) and arguments is not None and "seed" in arguments:
            arguments["seed"] = seed

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration alone: the command line wins over the settings in a checkpoint."""

    def instantiate_classes(self) -> None:
        """Build the objects of the configuration.

        Raises:
            TypeError: if one would not be built, because the argument that it is given to has no type.
            ValueError: with the message of a constructor and its name.
        """
        keep_in_run_folder(self._get(self.config, "trainer.logger"), self.run_dir)
        with told_by_constructors(self.config[self.subcommand]):
            super().instantiate_classes()

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return Path(self._get(self.config, "run_dir"))

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Make the Trainer; logs and a checkpoint per epoch go to the run folder unless said otherwise."""
        kwargs["logger"] = loggers_of(self._get(self.config_init, "trainer.logger"), self.run_dir)
        callbacks = self._get(self.config_init, "trainer.callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if self._get(self.config_init, "trainer.logger") is False:
            # of the configs; Lightning refuses it without a logger
            callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
        shows_progress = self._get(self.config_init, "trainer.enable_progress_bar") is not False
        if shows_progress and not any(isinstance(callback, AbstractProgressBar) for callback in callbacks):
            callbacks = [*callbacks, ProgressBar()]
        if not shows_progress and not any(isinstance(callback, StepLines) for callback in callbacks):
            callbacks = [*callbacks, StepLines()]
        # Lightning would switch off the parts that a run needs, without a word
        if self._get(self.config_init, "trainer.barebones"):
            raise ValueError(
                "trainer.barebones=true switches off checkpoints, logs and the checks of a run: leave it out, or try a "
                "config with --trainer.fast_dev_run=true"
            )
        own = None
        if self._get(self.config_init, "trainer.enable_checkpointing") is not False:
            own = self._run_checkpoint(callbacks)
            for callback in callbacks:
                # else Lightning takes the folder of the first logger, another one at each start
                if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                    callback.dirpath = str(self.run_dir / "checkpoints" / "user")
            # always there, and behind those of the user: its state then holds theirs
            callbacks = [*(callback for callback in callbacks if callback is not own), own]
        callbacks = [*callbacks, StopOnSignal(own.save_now if own else None)]
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def _run_checkpoint(self, callbacks: list[L.Callback]) -> RunCheckpoint:
        """The callback with the checkpoints that the run continues from: given among callbacks, or from the settings.

        Raises:
            ValueError: if one is given that writes elsewhere, where nobody would look.
        """
        folder = self.run_dir / "checkpoints"
        for callback in callbacks:
            if isinstance(callback, RunCheckpoint):
                if Path(str(callback.dirpath)).resolve() != folder.resolve():
                    raise ValueError(
                        f"trainer.callbacks has a RunCheckpoint for {callback.dirpath}, but the run continues from "
                        f"{folder}: take it out and set --run_dir; for further checkpoints use Lightning's "
                        f"ModelCheckpoint"
                    )
                return callback
        epochs, steps, minutes = (
            self._get(self.config_init, f"checkpoint_every{unit}") for unit in ("", "_steps", "_minutes")
        )
        return RunCheckpoint(folder, epochs, steps, minutes)

    def _name_what_is_missing(self) -> None:
        """Name the parts of a run that the settings of the Trainer switch off, in a line each."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        # a run of hours without checkpoints is rarely meant
        if not any(isinstance(callback, RunCheckpoint) for callback in callbacks):
            rank_zero_info(
                "trainer.enable_checkpointing=false: this run keeps no checkpoints; one that is stopped begins its "
                "training again, on the pairs or rollouts in the ledger"
            )
        names = {type(callback).__name__ for callback in callbacks}
        missing = [name for name in ("FinalValidation", "HFExport", "Summary") if name not in names]
        if "Summary" in missing and names & {"PairSummary", "LossSummary"}:
            missing.remove("Summary")
        if missing:
            rank_zero_info(
                f"trainer.callbacks replaces the callbacks of the configs, and leaves out {', '.join(missing)}"
                + (": no model/ folder is written at the end" if "HFExport" in missing else "")
                + "; --trainer.callbacks+=NAME, or callbacks+: in a config, adds to them instead"
            )

    def before_fit(self) -> None:
        """Continue a run that was stopped, or measure the policy once before training."""
        settings = self.config[self.subcommand]
        self.datamodule.fingerprint = fingerprint(settings, self.model, self.datamodule)
        # a trial run must neither continue nor mark the run folder
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._leave_nothing_behind()
            return
        # before the first epoch, whose checkpoint could not be written
        check_writable(self.run_dir)
        tell_settings(self.trainer.loggers, _plain(settings))
        record = RunRecord(self.run_dir, _plain(settings), self.datamodule.fingerprint)
        self.trainer.callbacks.insert(0, record)  # type: ignore[attr-defined]
        self._name_what_is_missing()
        last = self.run_dir / "checkpoints" / "last.ckpt"
        if self.config_init.fit.ckpt_path == "last":
            # ours, whatever other callbacks keep
            self.config_init.fit.ckpt_path = str(last) if last.exists() or last.is_symlink() else None
        # a link to nothing is a checkpoint that is gone, not a run that begins
        dry_run = self.trainer.fast_dev_run  # type: ignore[attr-defined]
        found = not dry_run and (last.exists() or last.is_symlink())
        if self.config_init.fit.ckpt_path is None and found:
            print(f"continuing from {last}; use another --run_dir to start afresh")
            self.config_init.fit.ckpt_path = str(last)
        continued = self.config_init.fit.ckpt_path
        # no local path to check: Lightning resolves the name, or reads from remote storage
        if continued in LIGHTNINGS_CHECKPOINTS or "://" in str(continued):
            return
        path = None if continued is None else Path(continued)
        if path is not None:
            checked(path, self.trainer.global_rank, self.trainer.world_size)
            # a sharded checkpoint is read by the strategy that wrote it
            if path.is_dir() and not isinstance(self.trainer.strategy, ModelParallelStrategy):
                raise ValueError(
                    f"checkpoint {path} is sharded: continue with --config trainer/fsdp; or start another run, "
                    f"from <its run_dir>/model once it has ended"
                )
            check_settings(meta(path), path, self.datamodule.fingerprint)
        if self.trainer.is_global_zero:
            steps = 0 if path is None else meta(path)["global_step"]
            forget_repeated(self.run_dir, self.trainer.loggers, steps)
        # the point at step 0 of every curve
        if path is None and self.datamodule.heldout_source is not None:
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)

    def _leave_nothing_behind(self) -> None:
        """Let a trial run of a few batches neither go on from a checkpoint nor write one, nor be recorded."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, StopOnSignal):
                callback.save = None

    def before_sample(self) -> None:
        """Tie the ledger to the settings."""
        self.datamodule.fingerprint = fingerprint(self.config[self.subcommand], self.model, self.datamodule)


@contextmanager
def told_by_constructors(config: Namespace) -> Iterator[None]:
    """Check that a configuration can be built, and make errors of its constructors short.

    Raises:
        TypeError: if an object would not be built.
        ValueError: with the message of a constructor and its name.
    """
    check_built(config)
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        # None: an error of ours, with its whole traceback
        message = constructor_error(error, config)
        if message is None:
            raise
        # the message of jsonargparse repeats the whole configuration
        raise ValueError(message) from None


LIGHTNINGS_CHECKPOINTS = ("best", "hpc", "last", "registry")
"""Values of ``--ckpt_path`` that Lightning itself resolves."""


def hush() -> None:
    """Silence messages of other libraries to their own developers, so that the rest concerns the user."""
    for message in (
        r".*is_gradient_checkpointing.* is deprecated",
        r".*isinstance\(treespec, LeafSpec\).* is deprecated",
        # of the table of layers, which estimates megabytes
        r"Precision .* is not supported by the model summary",
        # the arguments are handed over after old names in them were replaced
        r"LightningCLI's args parameter is intended to run from within Python",
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in str(record.msg))
