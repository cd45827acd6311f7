"""The command line: ``lightning-rlhf fit --config quickstart``, and the other verbs.

Configs are found by name in the package (``--config dpo_online``, overlays such as ``--config sampler/best_of_n``) or
by path; several merge from left to right, and a file may name its bases under ``defaults``. The rest is LightningCLI.
"""

from __future__ import annotations

import atexit
import inspect
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import lightning as L
import yaml
from jsonargparse import (  # type: ignore[attr-defined]
    ActionConfigFile,
    ArgumentParser,
    Namespace,
    auto_cli,
    set_parsing_settings,
)
from lightning.fabric.plugins.precision.precision import _PRECISION_INPUT  # has no public name
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.callbacks import ProgressBar as AbstractProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
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
from lightning_rlhf import ranks
from lightning_rlhf.callbacks import ProgressBar
from lightning_rlhf.checkpoints import (
    ExplicitCheckpoints,
    NotedSignals,
    RunCheckpoint,
    StopOnSignal,
    check_writable,
    checked,
    meta,
)
from lightning_rlhf.comparison import CompareRun
from lightning_rlhf.datamodule_base import AbstractRoundDataModule, AbstractStepDataModule
from lightning_rlhf.evaluation_run import EvaluationRun
from lightning_rlhf.export import export_comparisons, export_ledger
from lightning_rlhf.label_run import LabelRun
from lightning_rlhf.models.precision import bf16_instructions, choose_precision, device_type_of
from lightning_rlhf.modules.base import AbstractStepModule
from lightning_rlhf.pipeline import Pipeline
from lightning_rlhf.plan import plan
from lightning_rlhf.plugins import check_built, constructor_error
from lightning_rlhf.run_record import RunRecord, check_settings
from lightning_rlhf.stopping import Stopped


# `${model.init_args.beta}` in a config means the value of this run, wherever it was set
set_parsing_settings(omegaconf_absolute_to_relative_paths=True)


def config_names() -> list[str]:
    """Names of the configs that come with the package."""
    root = resources.files("lightning_rlhf.configs")
    names = [entry.name[:-5] for entry in root.iterdir() if entry.name.endswith(".yaml")]
    for folder in ("labeler", "sampler", "trainer", "worlds"):
        names += [f"{folder}/{e.name[:-5]}" for e in root.joinpath(folder).iterdir() if e.name.endswith(".yaml")]
    return sorted(names)


def find_config(name: str) -> Path:
    """Find a config by path or by name.

    Raises:
        TypeError: if there is none; the message lists the names that exist.
    """
    if Path(name).is_file():
        return Path(name)
    packaged = resources.files("lightning_rlhf.configs").joinpath(f"{name}.yaml")
    if packaged.is_file():
        return Path(str(packaged))
    raise TypeError(f"no config {name!r}: neither a file, nor one of {', '.join(config_names())}")


class NamedConfig(ActionConfigFile):
    """Reads configs by name or path, and their ``defaults`` first."""

    def __call__(self, parser: Any, cfg: Any, value: Any, option_string: str | None = None) -> None:
        """Merge one ``--config`` value into the configuration."""
        inline = "\n" in value or value.lstrip().startswith("{")
        if inline:
            super().__call__(parser, cfg, value, option_string)  # type: ignore[no-untyped-call]
        else:
            self._merge(parser, cfg, find_config(value), option_string, ())

    def _merge(self, parser: Any, cfg: Any, path: Path, option: str | None, above: tuple[Path, ...]) -> None:
        if path in above:
            raise TypeError(f"config {path} names itself among its defaults")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise TypeError(f"config {path} is no YAML: {error}") from None
        if not isinstance(content, dict):
            raise TypeError(f"config {path} must map settings to values; it holds {content!r:.80}")
        bases = content.pop("defaults", None)
        if bases is not None and not (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
            raise TypeError(f"config {path}: defaults must be a list of configs; it is {bases!r:.80}")
        if bases is None:
            # by path, so that files it names are looked up beside it
            super().__call__(parser, cfg, str(path), option)  # type: ignore[no-untyped-call]
            return
        for base in bases:
            beside = path.parent / f"{base}.yaml"
            self._merge(parser, cfg, beside if beside.is_file() else find_config(base), option, (*above, path))
        super().__call__(parser, cfg, yaml.safe_dump(content), option)  # type: ignore[no-untyped-call]


class RLHFTrainer(L.Trainer):
    """Lightning's Trainer with the verbs of this package, and with ``precision: auto``.

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
            precision, reason = choose_precision(device_type, bf16_instructions(device_type))
            rank_zero_info(f"precision: {precision}, {reason}")
        super().__init__(accelerator=accelerator, precision=precision, **kwargs)
        self._signal_connector = NotedSignals(self)
        self._checkpoint_connector = ExplicitCheckpoints(self)

    def sample(
        self,
        model: L.LightningModule,
        datamodule: AbstractRoundDataModule | None = None,
        out: str | None = None,
    ) -> None:
        """Draw one round of comparisons or rollouts from any policy into the ledger; no labels, no training.

        Args:
            model: the policy.
            datamodule: prompts, and a sampler where there is one.
            out: also write what was drawn to this file (.jsonl or .parquet).
        """
        assert datamodule is not None
        self.predict(model, datamodule=datamodule, return_predictions=False)
        if self.is_global_zero:
            ledger = datamodule.ledger
            print(f"{datamodule.DRAWN} are in {ledger}")
            if out is not None:
                print(f"wrote {export_comparisons(str(ledger), out)} {datamodule.DRAWN} to {out}")


class RLHFCLI(LightningCLI):
    """LightningCLI with configs by name, a run folder, and runs that continue where they were stopped."""

    def __init__(self, args: list[str] | None = None) -> None:
        super().__init__(
            model_class=L.LightningModule,
            datamodule_class=L.LightningDataModule,
            save_config_kwargs={"overwrite": True},
            trainer_class=RLHFTrainer,
            parser_kwargs={"parser_mode": "omegaconf+"},
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=args,
            auto_configure_optimizers=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Verbs that run on a Trainer, with the arguments that are objects of the CLI."""
        verbs = LightningCLI.subcommands()
        return {
            "fit": verbs["fit"],
            "validate": verbs["validate"],
            "sample": {"model", "datamodule"},
        }

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make the parser, with ``--config`` by name."""
        parser = LightningArgumentParser(**kwargs)
        parser.epilog = "Other verbs: compare, evaluate, export, label, plan, run; each explains itself with --help."
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

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and report a failed interpolation as an error of the command line."""
        try:
            super().parse_arguments(parser, args)
        except OmegaConfBaseException as error:
            parser.error(str(error))

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration alone: what the command line says wins over what a checkpoint remembers."""

    def instantiate_classes(self) -> None:
        """Build the objects of the configuration.

        Raises:
            TypeError: if one would not be built, because the argument that it is given to has no type.
            ValueError: what a constructor said, and which.
        """
        with told_by_constructors(self.config[self.subcommand]):
            super().instantiate_classes()

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return Path(self._get(self.config, "run_dir"))

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Make the Trainer; logs and a checkpoint per epoch go to the run folder unless said otherwise."""
        if self._get(self.config_init, "trainer.logger") in (None, True):
            kwargs["logger"] = [
                CSVLogger(self.run_dir, name="metrics"),
                TensorBoardLogger(self.run_dir, name="", version="tensorboard"),
            ]
        callbacks = self._get(self.config_init, "trainer.callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if self._get(self.config_init, "trainer.logger") is False:
            # of the configs; Lightning refuses it without a logger
            callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
        shows_progress = self._get(self.config_init, "trainer.enable_progress_bar") is not False
        if shows_progress and not any(isinstance(callback, AbstractProgressBar) for callback in callbacks):
            callbacks = [*callbacks, ProgressBar()]
        if self._get(self.config_init, "trainer.barebones"):
            raise ValueError(
                "trainer.barebones=true switches off checkpoints, logs and the checks of a run: leave it out, or try a "
                "config with --trainer.fast_dev_run=true"
            )
        own = None
        if self._get(self.config_init, "trainer.enable_checkpointing") is not False:
            own = self._run_checkpoint(callbacks)
            # always there, and behind those of the user: its state then holds theirs
            callbacks = [*(callback for callback in callbacks if callback is not own), own]
        callbacks = [*callbacks, StopOnSignal(own.save_now if own else None)]
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def _run_checkpoint(self, callbacks: list[L.Callback]) -> RunCheckpoint:
        """What keeps the checkpoints that the run continues from: of the run's own settings, or given among callbacks.

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
        """Say what the settings of the Trainer take from a run, in a line each."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, RunCheckpoint) for callback in callbacks):
            rank_zero_info(
                "trainer.enable_checkpointing=false: this run keeps no checkpoints; one that is stopped begins its "
                "training again, on what the ledger holds"
            )
        names = {type(callback).__name__ for callback in callbacks}
        missing = [name for name in ("FinalValidation", "HFExport", "Summary") if name not in names]
        if "Summary" in missing and names & {"PairSummary", "LossSummary"}:
            missing.remove("Summary")
        if missing:
            rank_zero_info(
                f"trainer.callbacks replaces the callbacks of the configs, and leaves out {', '.join(missing)}"
                + (": no model/ folder is written at the end" if "HFExport" in missing else "")
                + "; --trainer.callbacks+=NAME adds to them instead"
            )

    def before_fit(self) -> None:
        """Continue a run that was stopped, or measure the policy once before training."""
        settings = self.config[self.subcommand]
        self.datamodule.fingerprint = fingerprint(settings, self.model, self.datamodule)
        check_writable(self.run_dir)
        record = RunRecord(self.run_dir, _plain(settings), self.datamodule.fingerprint)
        self.trainer.callbacks.insert(0, record)  # type: ignore[attr-defined]
        self._name_what_is_missing()
        last = self.run_dir / "checkpoints" / "last.ckpt"
        if self.config_init.fit.ckpt_path == "last":
            # ours, whatever other callbacks keep
            self.config_init.fit.ckpt_path = str(last) if last.exists() or last.is_symlink() else None
        # a link to nothing is a checkpoint that is gone, not a run that begins
        tries = self.trainer.fast_dev_run  # type: ignore[attr-defined]
        found = not tries and (last.exists() or last.is_symlink())
        if self.config_init.fit.ckpt_path is None and found:
            print(f"continuing from {last}; use another --run_dir to start afresh")
            self.config_init.fit.ckpt_path = str(last)
        continued = self.config_init.fit.ckpt_path
        if continued in LIGHTNINGS_CHECKPOINTS or "://" in str(continued):
            return
        if continued is not None:
            path = Path(continued)
            checked(path, self.trainer.global_rank, self.trainer.world_size)
            if path.is_dir() and not isinstance(self.trainer.strategy, ModelParallelStrategy):
                raise ValueError(
                    f"checkpoint {path} is sharded: continue with --config trainer/fsdp; or start another run, "
                    f"from <its run_dir>/model once it has ended"
                )
            check_settings(meta(path), path, self.datamodule.fingerprint)
        elif self.datamodule.heldout_source is not None:
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)

    def before_sample(self) -> None:
        """Tie the ledger to the settings."""
        self.datamodule.fingerprint = fingerprint(self.config[self.subcommand], self.model, self.datamodule)


@contextmanager
def told_by_constructors(config: Namespace) -> Iterator[None]:
    """Check that a configuration can be built, and make errors of its constructors short.

    Raises:
        TypeError: if an object would not be built.
        ValueError: what a constructor said, and which.
    """
    check_built(config)
    try:
        yield
    except (ValueError, TypeError) as error:
        message = constructor_error(error, config)
        if message is None:
            raise
        # what jsonargparse adds holds the whole configuration
        raise ValueError(message) from None


LIGHTNINGS_CHECKPOINTS = ("best", "hpc", "last", "registry")
"""Values of ``--ckpt_path`` that Lightning itself resolves."""


def fingerprint(config: Namespace, model: L.LightningModule, datamodule: L.LightningDataModule) -> dict[str, Any]:
    """Settings that decide what is drawn, labelled and learnt, as plain data; the classes name those that do not."""
    settings = {name: _plain(config[name]) for name in ("model", "data")}
    for name, part in (("model", model), ("data", datamodule)):
        free = part.FREE_SETTINGS if isinstance(part, AbstractStepModule | AbstractStepDataModule) else frozenset()
        settings[name]["init_args"] = {k: v for k, v in settings[name]["init_args"].items() if k not in free}
    settings["data"]["init_args"].get("decoding", {}).pop("rows", None)
    settings["data"] = _without(settings["data"], FREE_OF_SERVERS)
    return {**settings, "seed_everything": config.get("seed_everything")}


VERBS: dict[str, type[LabelRun] | type[EvaluationRun] | type[CompareRun]] = {
    "compare": CompareRun,
    "evaluate": EvaluationRun,
    "label": LabelRun,
}
"""Verbs that need no Trainer: classes whose constructor is the configuration, and whose ``run`` does the work."""

FREE_OF_SERVERS = {
    *("base_url", "api_key_env", "concurrency", "timeout", "retries", "max_wait", "journal", "price_in", "price_out")
}
"""Settings of a `JudgeServer` that may change within a run: where, how and at what price a model is asked."""

FREE_OF_VERBS = {
    *FREE_OF_SERVERS,
    *("run_dir", "out", "rows", "label_attempts", "chunk", "config"),  # where results go, and how much is asked for
    *("limit", "device", "tokens_per_batch", "compile"),
}
"""Settings of a verb, or of the objects it is given, that may change when it is called again."""


def run_verb(verb: str, args: list[str]) -> None:
    """Run one of `VERBS`."""
    kind = VERBS[verb]
    description = (kind.__doc__ or "").strip().partition("\n\n    Args:")[0]
    parser = ArgumentParser(prog=f"lightning-rlhf {verb}", description=description, parser_mode="omegaconf+")
    parser.add_argument("-c", "--config", action=NamedConfig, help="A file with these settings.")
    if verb == "compare" and args and not args[0].startswith("-"):
        args = ["--config", *args]
    parser.add_class_arguments(kind, as_group=False)
    config = parser.parse_args(args)
    settings = _without(_plain(config), FREE_OF_VERBS)
    with told_by_constructors(config):
        values = parser.instantiate(config).as_dict()
    values.pop("config")
    kind(**values).run(settings)


def run_pipeline(args: list[str]) -> None:
    """Run a pipeline file."""
    description = inspect.cleandoc(Pipeline.__doc__ or "").partition("\n\nArgs:")[0]
    parser = ArgumentParser(prog="lightning-rlhf run", description=description)
    parser.add_argument("pipeline", type=str, help="The pipeline, a YAML file.")
    parser.add_argument("--run_dir", type=str, default=None, help="Folder of all stages, in place of the file's.")
    parser.add_argument("--set", nargs="*", type=str, default=[], help="Variables that differ: NAME=VALUE ...")
    config = parser.parse_args(args)
    changed = [entry.partition("=") for entry in config.set]
    if not all(sign for _, sign, _ in changed):
        parser.error(f"--set takes NAME=VALUE; got {' '.join(config.set)}")
    Pipeline(config.pipeline, config.run_dir, {name: value for name, _, value in changed}).run()


def _without(value: Any, names: set[str]) -> Any:
    """A tree of plain data without the branches of some names."""
    if isinstance(value, dict):
        return {name: _without(inner, names) for name, inner in value.items() if name not in names}
    return [_without(inner, names) for inner in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    if hasattr(value, "as_dict"):
        value = value.as_dict()
    return json.loads(json.dumps(value, default=str))


def hush() -> None:
    """Silence what other libraries say to their own developers, so that what is left concerns the user."""
    for message in (
        r".*is_gradient_checkpointing.* is deprecated",
        r".*isinstance\(treespec, LeafSpec\).* is deprecated",
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in str(record.msg))


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    hush()
    argv = sys.argv[1:] if args is None else args
    if "" not in sys.path and os.getcwd() not in sys.path:
        # a user's own classes are found in the folder she works in, as with ``python -m``
        sys.path.insert(0, os.getcwd())
    try:
        _run(argv, args)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C (SIGINT); what was kept before stays, and the same command goes on", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None


def _run(argv: list[str], args: list[str] | None) -> None:
    if argv[:1] == ["export"]:
        written = auto_cli(export_ledger, args=argv[1:], as_positional=False)
        print(f"wrote {written} rows")
        return
    if argv[:1] == ["plan"]:
        print(auto_cli(plan, args=argv[1:], as_positional=False))
        return
    if argv[:1] == ["run"]:
        run_pipeline(argv[1:])
        return
    if argv and argv[0] in VERBS:
        run_verb(argv[0], argv[1:])
        return
    try:
        RLHFCLI(args=args)
    except Stopped:
        atexit.register(ranks.leave)
        if os.environ.get("LOCAL_RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" not in os.environ:
            # a rank that Lightning's rank zero has started: it would kill itself over another status than 0
            raise SystemExit(0) from None
        raise
    # at the exit, because another run may follow; and not after an error, when ranks may be left in a collective
    atexit.register(ranks.leave)
