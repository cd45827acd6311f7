"""The checkpoints of a run folder: written completely or not at all, and checked before a run continues from them.

`RunCheckpoint` writes them, `StopOnSignal` writes one when the run is asked to end, and `checked` refuses damaged ones.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector  # has no public name
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector  # has no public name
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from lightning_rlhf.runtime import distributed, preemption
from lightning_rlhf.runtime.sharded_checkpoints import META, shard_damage


KEPT = 2
"""Number of checkpoints that are kept: the newest, and the one before in case the newest is damaged."""
PARTIAL = ".partial"
"""Ending of the name of a checkpoint that is being written."""
REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space, or name another disk as --run_dir",
    errno.EDQUOT: "the disk quota is used up: free some space, or name another disk as --run_dir",
    errno.EFBIG: "files may not become that large here: raise the limit (ulimit -f), or name another disk as --run_dir",
    errno.EROFS: "the file system is read-only: name another --run_dir, or mount it writable",
    errno.EACCES: "this user may not write there: change the permissions, or name another --run_dir",
    errno.EPERM: "this user may not write there: change the permissions, or name another --run_dir",
    errno.EIO: "the disk reports an error: check it, and name another --run_dir",
}


class RunCheckpoint(ModelCheckpoint):
    """Keeps the two newest checkpoints, and ``last.ckpt``, a link to the newest.

    A checkpoint gets its name when it is complete, and ``last.ckpt`` is then moved to it, in one step: a run that is
    killed while it writes continues from the checkpoint before. Lightning's own callback would write each checkpoint
    twice.

    A `ModelCheckpoint` of the user that would write into this folder, as one without ``dirpath`` does in a run without
    loggers, writes into its sub-folder ``user``.

    Args:
        folder: folder of the checkpoints.
        every_n_epochs: epochs between checkpoints, >= 1.
        every_n_steps: optimizer steps between additional checkpoints, >= 1. Default: none.
        every_n_minutes: minutes between additional checkpoints, > 0. Default: none. One that is due at the last step of
            an epoch is written after the epoch.

    Raises:
        ValueError: if an interval is out of range.
    """

    def __init__(
        self,
        folder: Path,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        every_n_minutes: float | None = None,
    ) -> None:
        if every_n_epochs < 1 or (every_n_steps is not None and every_n_steps < 1):
            raise ValueError(
                f"checkpoint_every and checkpoint_every_steps must be at least 1; got {every_n_epochs} and "
                f"{every_n_steps}"
            )
        if every_n_minutes is not None and not every_n_minutes > 0:
            raise ValueError(f"checkpoint_every_minutes must be > 0, or null; got {every_n_minutes}")
        super().__init__(
            folder,
            save_last="link",
            every_n_epochs=every_n_epochs,
            save_on_train_epoch_end=True,
            # a run that continues from its first checkpoint would else write last-v1.ckpt beside an old last.ckpt
            enable_version_counter=False,
        )
        self.every_n_steps, self.every_n_minutes = every_n_steps, every_n_minutes
        self._saved_at = time.monotonic()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Keep other checkpoints out of the folder.

        Raises:
            ValueError: if checkpoints would be written in the background.
        """
        super().setup(trainer, pl_module, stage)
        if isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO):
            raise ValueError(
                "trainer.plugins has AsyncCheckpointIO, which writes a checkpoint after the run has gone on: last.ckpt "
                "would name a file that is not there yet. Take it out"
            )
        own = Path(str(self.dirpath)).resolve()
        for other in trainer.checkpoint_callbacks:
            if other is self or not isinstance(other, ModelCheckpoint):
                continue
            folder = other.dirpath
            if folder is None and not trainer.loggers:  # the default of Lightning
                folder = os.path.join(trainer.default_root_dir, "checkpoints")
            if folder is not None and Path(folder).resolve() == own:
                other.dirpath = str(own / "user")
                rank_zero_info(
                    f"{own} is where the run keeps the checkpoints that it continues from: those of your "
                    f"{type(other).__name__} go to {other.dirpath}"
                )

    def save_now(self, trainer: L.Trainer) -> Path:
        """Write a checkpoint between the regular ones, and return it; every rank calls."""
        # the step has its checkpoint, e.g. the one of the epoch: writing it again would take as long
        if self._last_global_step_saved == trainer.global_step and self.best_model_path:
            return Path(self.best_model_path)
        candidates = self._monitor_candidates(trainer)
        self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)
        return Path(self.best_model_path)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the step at which this start begins."""
        super().on_train_start(trainer, pl_module)
        self._began_at = trainer.global_step
        self._saved_at = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        """Write a checkpoint within an epoch if one is due."""
        # Lightning repeats an epoch whose checkpoint was saved before its end was counted: wait for that end
        if not trainer.is_last_batch:
            self._save_if_due(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the checkpoint of the epoch, or one that fell due at its last step."""
        super().on_train_epoch_end(trainer, pl_module)
        self._save_if_due(trainer)

    def _save_if_due(self, trainer: L.Trainer) -> None:
        if (self.every_n_steps is None and self.every_n_minutes is None) or self._should_skip_saving_checkpoint(
            trainer
        ):
            return
        due = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        if not due and self.every_n_minutes is not None:
            # the clocks of ranks differ
            due = distributed.any_rank(time.monotonic() - self._saved_at >= 60 * self.every_n_minutes)
        if due:
            self.save_now(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the end of the training, whatever ``every_n_epochs`` is."""
        # a finished run that is started again takes no step, and needs no further checkpoint
        if not self._should_skip_saving_checkpoint(trainer) and trainer.global_step != self._began_at:
            self.save_now(trainer)

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        path = Path(filepath)
        partial = path.with_name(f".{path.name}{PARTIAL}")
        with explained(path):
            if trainer.is_global_zero:
                # removed before the barrier: other ranks may write their shards right after it
                for left in path.parent.glob(f".*{PARTIAL}"):  # of a run that was killed while it wrote
                    _remove(left)
            trainer.strategy.barrier()
            try:
                trainer.save_checkpoint(partial, self.save_weights_only)
                # all shards must be there before the folder gets its name
                trainer.strategy.barrier()
                if trainer.is_global_zero:
                    if not partial.exists():
                        raise OSError(
                            errno.ENOENT,
                            f"{type(trainer.strategy.checkpoint_io).__name__} has written no checkpoint there: take it "
                            f"out of trainer.plugins",
                            str(partial),
                        )
                    aside = path.with_name(f".{path.name}.before{PARTIAL}")
                    if path.is_dir():  # shards of the same step, if the run has continued from an older checkpoint
                        # a rename cannot replace a folder that holds files
                        os.replace(path, aside)
                    os.replace(partial, path)
                    _remove(aside)
            # torch raises CheckpointException for shards, which is no Exception
            except BaseException:
                if trainer.is_global_zero:
                    _remove(partial)
                raise
        self._last_global_step_saved, self._last_checkpoint_saved = trainer.global_step, filepath
        self._saved_at = time.monotonic()
        if trainer.is_global_zero:
            # as Lightning does, but after the file has its name
            for logger in trainer.loggers:
                logger.after_save_checkpoint(self)

    def _save_last_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        # last.ckpt moves first, so that it never names a checkpoint that is removed below
        super()._save_last_checkpoint(trainer, monitor_candidates)
        for path in history(Path(str(self.dirpath)))[KEPT:]:
            trainer.strategy.remove_checkpoint(path)

    def _remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        """Keep the checkpoint before, which Lightning would remove."""

    @staticmethod
    def _link_checkpoint(trainer: L.Trainer, filepath: str, linkpath: str) -> None:
        if trainer.is_global_zero:
            target, link = Path(filepath), Path(linkpath)
            with explained(link):
                # after a power failure the link might be on the disk, but not the data that it names
                for path in [target, *target.rglob("*")] if target.is_dir() else [target]:
                    sync(path)
                if link.is_dir() and not link.is_symlink():
                    shutil.rmtree(link)
                # made under another name and moved, so that there is a link at any moment
                fresh = link.with_name(f".{link.name}.{os.getpid()}")
                fresh.unlink(missing_ok=True)
                # relative, so that the run folder can be moved
                fresh.symlink_to(os.path.relpath(target, link.parent))
                os.replace(fresh, link)
                sync(link.parent)
        trainer.strategy.barrier()


class NotedSignals(_SignalConnector):
    """Lightning's signal handling, but signals are only recorded while a run trains or samples.

    Lightning's own handlers run collectives as soon as a signal arrives, and wait for ranks that are elsewhere; its
    handler of SIGINT ends the run without a checkpoint.
    """

    def register_signal_handlers(self) -> None:
        """Register Lightning's handlers, and ours in place of some; `teardown` removes them."""
        super().register_signal_handlers()
        if self.trainer.state.fn in (TrainerFn.FITTING, TrainerFn.PREDICTING):
            preemption.listen(requeue_signal(self.trainer))
        else:
            preemption.end_at_once_on_interrupt()


class ExplicitCheckpoints(_CheckpointConnector):
    """Lightning's choice of a checkpoint, but a run that names none starts from the beginning.

    Lightning would search the folders of all callbacks for the newest file if one is an `OnExceptionCheckpoint`.
    """

    def _parse_ckpt_path(self, state_fn: TrainerFn, ckpt_path: Any, model_provided: bool, model_connected: bool) -> Any:
        # a job that SLURM has requeued continues from the checkpoint that Lightning saved for it
        requeued = SLURMEnvironment.detect() and self._hpc_resume_path is not None
        if ckpt_path is None and model_provided and not requeued:
            return None
        return super()._parse_ckpt_path(state_fn, ckpt_path, model_provided, model_connected)


def requeue_signal(trainer: L.Trainer) -> int | None:
    """The signal of SLURM before it requeues the job; None without auto-requeue."""
    environment = trainer._accelerator_connector.cluster_environment
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue or os.name != "posix":
        return None
    return int(environment.requeue_signal or signal.SIGUSR1)


class StopOnSignal(L.Callback):
    """Ends the run cleanly on a signal: a checkpoint, a message, and an exit status.

    SIGTERM, SIGINT (Ctrl-C) and SIGHUP end it, with status 143, 130 and 129; the signal of SLURM's auto-requeue also
    queues the job again. It acts after the current training step, with the validation of an epoch that ends with it, or
    after the current chunk of a round that is being sampled or labeled; earlier chunks are in the ledger. Put it last
    among the callbacks. It works with `RLHFTrainer` and with Lightning's own Trainer.

    Args:
        save: writes the checkpoint and returns its path; None if the run keeps none.
    """

    def __init__(self, save: Callable[[L.Trainer], Path] | None) -> None:
        self.save = save
        self._sampling = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record signals, if the Trainer does not yet; the Trainer restores the earlier handlers."""
        if not preemption.listens():
            preemption.listen(requeue_signal(trainer))

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record that the sampling of the round is over."""
        self._sampling = False

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        """End the run here if some rank was asked to; at the end of an epoch, once that is over."""
        if not trainer.is_last_batch:
            self._end_if_asked(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End the run here if some rank was asked to, before the next round."""
        self._end_if_asked(trainer, log_epoch)
        self._sampling = True

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save the weights from before the round that was being sampled."""
        if not isinstance(exception, preemption.Stopped) or self._told:
            return
        if self._sampling:
            self._end(trainer, exception)
        else:
            self._tell(trainer, exception, "; the same command goes on from there")

    def _end_if_asked(self, trainer: L.Trainer, before: Callable[[L.Trainer], None] = lambda _: None) -> None:
        # one rank may hear of the signal before others, but all must save together
        number = distributed.largest(preemption.asked_by())
        if number:
            stopped = preemption.Stopped(number)
            before(trainer)
            self._end(trainer, stopped)
            raise stopped

    _told = False

    def _end(self, trainer: L.Trainer, stopped: preemption.Stopped) -> None:
        self._told = True
        where = "nothing was saved, since the run keeps no checkpoints"
        if self.save is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            where = f"checkpoint {self.save(trainer)}; the same command goes on from there"
        self._tell(trainer, stopped, f" after step {trainer.global_step}: {where}")

    def _tell(self, trainer: L.Trainer, stopped: preemption.Stopped, how: str) -> None:
        if not trainer.is_global_zero:
            return
        print(f"{stopped.reason}{how}", flush=True)
        if stopped.signal == requeue_signal(trainer):
            print(preemption.requeue_job(), flush=True)


def log_epoch(trainer: L.Trainer) -> None:
    """Log the metrics of an epoch that ends, which Lightning would do after the callbacks have stopped the run."""
    # as in its `_FitLoop.on_advance_end`: metrics of an epoch stand at its last step
    trainer._logger_connector.on_epoch_end()
    progress = trainer.fit_loop.epoch_loop
    progress._batches_that_stepped -= 1
    trainer._logger_connector.update_train_epoch_metrics()
    progress._batches_that_stepped += 1


def history(folder: Path) -> list[Path]:
    """Checkpoints of a folder, the newest first; ``last.ckpt`` is not among them."""
    found = []
    for path in folder.glob("epoch=*-step=*.ckpt"):
        match = re.fullmatch(r"epoch=(\d+)-step=(\d+)(?:-v(\d+))?\.ckpt", path.name)
        if match is not None:
            found.append((int(match[2]), int(match[1]), int(match[3] or 0), path))
    return [path for *_, path in sorted(found, reverse=True)]


def damage(checkpoint: Path, rank: int = 0, world: int = 1) -> str | None:
    """Describe the damage of a checkpoint; None if it can be read completely.

    Args:
        checkpoint: a file, or a folder of shards.
        rank: number of this process; of shards each process reads a part.
        world: number of processes that read.
    """
    if not checkpoint.exists():
        return "it does not exist"
    try:
        if checkpoint.is_dir():
            return shard_damage(checkpoint, rank, world)
        # torch writes a zip archive; testzip reads every part and compares its CRC
        with zipfile.ZipFile(checkpoint) as archive:
            broken = archive.testzip()
            return None if broken is None else f"its part {broken} differs from the one written"
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError) as error:
        return f"it cannot be read ({error})"


_WHOLE: set[tuple[str, int, int]] = set()
"""Path, time of change and size of files that were found whole in this process."""


def checked(checkpoint: Path, rank: int = 0, world: int = 1) -> None:
    """Refuse a damaged checkpoint before anything is loaded, and name the one before.

    Args:
        checkpoint: a file, or a folder of shards.
        rank: number of this process; of shards each process reads a part.
        world: number of processes that read.

    Raises:
        ValueError: if it is damaged.
    """
    # reading a large file twice takes minutes: the command line checks it first, and the plugin when it is loaded
    stat = checkpoint.stat() if checkpoint.is_file() else None
    state = None if stat is None else (str(checkpoint.resolve()), stat.st_mtime_ns, stat.st_size)
    if state is not None and state in _WHOLE:
        return
    wrong = damage(checkpoint, rank, world)
    if wrong is None:
        if state is not None:
            _WHOLE.add(state)
        return
    itself = checkpoint.resolve()
    for path in history(checkpoint.parent):
        if path.resolve() != itself and damage(path) is None:
            raise ValueError(
                f"checkpoint {checkpoint} is damaged: {wrong}. The one before is whole: continue from it with "
                f"--ckpt_path={path}; nothing is labeled twice, the steps since are done again"
            )
    raise ValueError(
        f"checkpoint {checkpoint} is damaged: {wrong}, and there is no other one. Restore a copy; or delete "
        f"{checkpoint.parent} to train from the start on the labels that the ledger holds"
    )


def meta(checkpoint: Path) -> dict[str, Any]:
    """Content of a checkpoint; its tensors are mapped, not read.

    Only plain data and tensors are unpickled.
    """
    if checkpoint.is_dir():
        found = torch.load(checkpoint / META, map_location="cpu", weights_only=True)
    else:
        found = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(found, dict):
        raise ValueError(f"{checkpoint} holds no checkpoint but a {type(found).__name__}")
    return found


def check_writable(folder: Path) -> None:
    """Make a folder and write into it.

    Raises:
        OSError: naming the folder and the remedy.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            # a full disk may still let an empty file be made
            file.write(b"\0" * 4096)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn errors of writing into errors that name the path and the remedy."""
    try:
        yield
    except OSError as error:
        # a message with "; " comes from an `explained` further in, and names its remedy
        if error.errno not in REMEDIES or "; " in str(error.strerror):
            raise
        kept = "; earlier checkpoints are kept, and the same command goes on from it"
        message = f"{error.strerror}: {REMEDIES[error.errno]}{kept}"
        raise type(error)(error.errno, message, str(path)) from error
    except CheckpointException as error:
        # the errors of all ranks that wrote shards: no Exception, and the same on all ranks
        failures = [failure for failure, _ in error.failures.values()]
        found = next((failure for failure in failures if isinstance(failure, OSError)), failures[0])
        with explained(path):
            raise found from error
    except RuntimeError as error:
        # the writer of torch raises nothing more specific
        if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        # torch's zip writer fails over its own positions after the write of Python's file has failed
        if isinstance(error.__context__, OSError):
            with explained(path):
                raise error.__context__ from error
        raise OSError(
            errno.EIO,
            f"the checkpoint could not be written ({str(error).splitlines()[0]}): check that the disk has room, and "
            f"start again; the checkpoint before is kept",
            str(path),
        ) from error


def _remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Write a file or folder to the disk before the link points to it."""
    # elsewhere a folder cannot be opened for fsync
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
