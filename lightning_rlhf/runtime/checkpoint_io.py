"""A plugin of Lightning that writes checkpoints completely or not at all, and checks them before they are loaded.

It is what any callback of Lightning's writes through, such as ``ModelCheckpoint``. Under FSDP2 the strategy writes the
shards itself; `lightning_rlhf.runtime.checkpoints.RunCheckpoint` gives their folder its name when it is complete.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lightning_rlhf.runtime.checkpoints import PARTIAL, checked, explained, sync
from lightning_rlhf.types import State


class SafeCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, safe against kills, full disks and damage.

    A file is written under a hidden name beside its own, forced to the disk, and renamed in one step: a run that is
    killed meanwhile leaves the earlier file. torch keeps a checksum (CRC-32) of every part in the file; all of them are
    compared before a file is loaded. Remote paths (``s3://...``) are written as Lightning does.

    The command line uses it by default; in Python, ``Trainer(plugins=[SafeCheckpointIO()])``.
    """

    def save_checkpoint(self, checkpoint: State, path: str | Path, storage_options: object = None) -> None:
        """Write a checkpoint.

        Raises:
            OSError: naming the path and the remedy, e.g. where the disk is full.
            TypeError: with ``storage_options``, which Lightning's own plugin refuses, too.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        final = Path(path)
        partial = final.with_name(f".{final.name}{PARTIAL}")
        with explained(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            try:
                # into a file of Python, whose errors have an errno; torch's own writer has none
                with partial.open("wb") as file:
                    torch.save(checkpoint, file)
                # before the rename: after a power failure the name might be on the disk, but not the data
                sync(partial)
                os.replace(partial, final)
                sync(final.parent)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., object] | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> State:
        """Read a checkpoint.

        Raises:
            ValueError: if it is damaged, naming another one that is whole.
        """
        if "://" not in str(path) and Path(path).is_file():
            checked(Path(path))
        return super().load_checkpoint(path, map_location, weights_only)
