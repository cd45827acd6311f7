"""Checks of a sharded checkpoint, a folder, before torch loads it.

FSDP2 writes ``meta.pt`` with plain data, a file of tensors per rank, and ``.metadata``, a pickled index of the tensors.
torch would run any code that this pickle names, or the pickles of the optimizer's settings among the tensors. Here they
may hold plain data only, and all checksums must hold.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata


META = "meta.pt"
"""Plain data of a sharded checkpoint, beside its shards; written last."""
INDEX = ".metadata"
"""Index of the tensors in the shards."""


def shard_damage(folder: Path, rank: int = 0, world: int = 1) -> str | None:
    """Describe the damage of a sharded checkpoint; None if it can be read completely.

    Args:
        folder: the checkpoint.
        rank: number of this process; each reads its share of the tensors.
        world: number of processes that read.

    Raises:
        OSError, ValueError, RuntimeError, zipfile.BadZipFile: if a part cannot be read at all.
    """
    if not (folder / META).is_file() or not (folder / INDEX).is_file():
        return "it is incomplete: the run ended while it was written"
    with zipfile.ZipFile(folder / META) as archive:
        if (broken := archive.testzip()) is not None:
            return f"part {broken} of {META} differs from the one written"
    try:
        index = read_index(folder / INDEX)
    # a pickle that was cut or changed raises any of these
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, TypeError) as error:
        return f"its index cannot be read ({error})"
    # the files hold a zip archive per tensor, whose CRC tells whether it is as it was written
    for entry, place in list((index.storage_data or {}).items())[rank::world]:
        shard = folder / place.relative_path
        # a path out of the folder is no file of this checkpoint
        if Path(place.relative_path).name != place.relative_path or not shard.is_file():
            return f"its file {place.relative_path} is missing"
        with shard.open("rb") as file:
            file.seek(place.offset)
            part = io.BytesIO(file.read(place.length))
        if len(part.getbuffer()) != place.length:
            return f"its file {place.relative_path} is too short"
        if not zipfile.is_zipfile(part):
            return f"{entry.fqn} in {place.relative_path} differs from the one written"
        with zipfile.ZipFile(part) as archive:
            if archive.testzip() is not None:
                return f"{entry.fqn} in {place.relative_path} differs from the one written"
        # objects that are no tensors, such as settings of the optimizer, are stored as pickles
        if isinstance(index.state_dict_metadata.get(entry.fqn), BytesStorageMetadata):
            part.seek(0)
            try:
                torch.load(part, weights_only=True)  # torch itself will load it without
            except pickle.UnpicklingError:
                return f"{entry.fqn} in {place.relative_path} is more than plain data, and might be code"
    return None


def read_index(path: Path) -> Metadata:
    """Read the index of the tensors; only plain data is unpickled.

    Raises:
        pickle.UnpicklingError: if it holds anything else.
    """
    with path.open("rb") as file:
        found = _PlainUnpickler(file).load()
    if not isinstance(found, Metadata):
        raise pickle.UnpicklingError(f"a {type(found).__name__} is no index")
    return found


class _PlainUnpickler(pickle.Unpickler):
    """Knows the classes of an index, and no others."""

    def find_class(self, module: str, name: str) -> object:
        """Find a class of an index."""
        known = (
            (module == "torch.distributed.checkpoint.metadata" and name in _OF_INDEX)
            or (module, name) in _OTHERS
            # a dtype is pickled as its name in torch
            or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype))
        )
        if not known:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


_OF_INDEX = {
    *("Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata", "TensorStorageMetadata"),
    *("BytesStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
}
_OTHERS = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
    ("pathlib._local", "WindowsPath"),
    ("collections", "OrderedDict"),
}
