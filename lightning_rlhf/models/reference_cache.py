"""Reference log-probabilities on disk: a second run on the same recorded pairs computes none of them again.

Used when a round is sampled, for recorded responses under the initial reference. There is one SQLite file per set of
weights; the key of an entry is the precision of the forward pass and the ids of prompt and response. Attention kernel,
batch layout and device are not part of the key: they change the last bits only.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lightning_rlhf.models.cache import cache_folder
from lightning_rlhf.models.dropout import saved_dropout
from lightning_rlhf.models.reference import AbstractReference, AdapterOffReference
from lightning_rlhf.types import Prompt, Response


VARIABLE = "LIGHTNING_RLHF_REFERENCE_CACHE"


class ReferenceCache:
    """Remembers the reference log-probabilities of recorded responses.

    Rank-local: every process reads and writes by itself, and processes may share the folder. If the folder cannot be
    used, a warning gives the reason and all values are computed.

    Args:
        folder: folder of the files. Default: ``reference_logps`` in `cache_folder`.
    """

    def __init__(self, folder: Path | str | None = None) -> None:
        self.folder = Path(folder).expanduser() if folder is not None else cache_folder() / "reference_logps"
        self._usable = True

    @classmethod
    def from_environment(cls) -> ReferenceCache | None:
        """The cache that ``$LIGHTNING_RLHF_REFERENCE_CACHE`` names: a folder, or ``off``; the default when unset."""
        value = os.environ.get(VARIABLE, "")
        return None if value in ("off", "0") else cls(value or None)

    def complete(
        self,
        reference: AbstractReference,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        score: Callable[[Sequence[Prompt], Sequence[Response]], list[Response]],
    ) -> list[Response]:
        """Give every response its reference log-probabilities, from the cache where it has them.

        Args:
            reference: the reference.
            prompts: the prompt of each response.
            responses: the responses.
            score: computes those that are missing, in order.
        """
        asked = [i for i, r in enumerate(responses) if r.source == "dataset" and r.reference_logps is None]
        # the digest is remembered per reference: after an update it would still name the initial weights
        digest = weights_digest(reference) if asked and self._usable and reference.version == 0 else None
        if digest is None:
            return score(prompts, responses)
        with reference.active() as model:
            # float32 would lose digits where the model computes in float64
            precision, dtype = _precision(model), "<f8" if model.dtype == torch.float64 else "<f4"
        keys = {i: entry_key(precision, prompts[i].ids, responses[i].ids) for i in asked}
        file = CacheFile(self.folder / f"{digest}.sqlite", "reference", VARIABLE)
        found = file.get(list(keys.values()))
        known = list(responses)
        for i, key in keys.items():
            # a truncated entry counts as missing
            logps = np.frombuffer(found.get(key, b""), dtype)
            if len(logps) == len(responses[i].ids):
                known[i] = replace(known[i], reference_logps=tuple(logps.tolist()))
        scored = score(prompts, known)
        fresh = {
            key: np.asarray(scored[i].reference_logps, dtype).tobytes()
            for i, key in keys.items()
            if known[i].reference_logps is None
        }
        file.put(fresh)
        # the next round makes a new CacheFile, which must not try a failed disk again
        self._usable = file.usable
        return scored


class LogpsFile:
    """Values under keys, in one SQLite file.

    Each call is one transaction on a connection of its own: forked processes share no connection, and a killed process
    leaves all that it had committed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """Values of the keys that are stored."""
        # connecting would create an empty file, and fail where the folder does not exist
        if not self.path.exists():
            return {}
        with self._open() as db:
            rows = [(key, db.execute("SELECT value FROM logps WHERE key = ?", (key,)).fetchone()) for key in keys]
        return {key: row[0] for key, row in rows if row is not None}

    def put(self, values: Mapping[bytes, bytes], replace: bool = False) -> None:
        """Add values; an existing key keeps its value, unless ``replace`` is True."""
        if not values:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._open() as db:
            # without a transaction each row would be committed, and written to disk, by itself
            db.execute("BEGIN IMMEDIATE")
            # IGNORE: another process may have added the key since
            how = "REPLACE" if replace else "IGNORE"
            db.executemany(f"INSERT OR {how} INTO logps VALUES (?, ?)", values.items())
            db.execute("COMMIT")

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        # a rollback journal, not WAL: home folders lie on network file systems, where WAL does not work
        with closing(sqlite3.connect(self.path, timeout=60, isolation_level=None)) as db:
            db.execute("CREATE TABLE IF NOT EXISTS logps (key BLOB PRIMARY KEY, value BLOB NOT NULL)")
            yield db


class CacheFile(LogpsFile):
    """The same as a cache: a failing disk is a warning, once, and does not end the run.

    Args:
        path: the file.
        kind: kind of the log-probabilities, for the warning.
        variable: environment variable that names the folder, for the warning.
    """

    def __init__(self, path: Path, kind: str, variable: str) -> None:
        super().__init__(path)
        self.kind, self.variable = kind, variable
        self.usable = True

    def get(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """Values of the keys that are stored, if they can be read and no call has failed before."""
        if self.usable:
            with self._forgiving():
                return super().get(keys)
        # also after an error in `get`, which has become a warning: all keys count as missing
        return {}

    def put(self, values: Mapping[bytes, bytes], replace: bool = False) -> None:
        """Add values, if they can be written and no call has failed before."""
        if self.usable:
            with self._forgiving():
                super().put(values, replace)

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            self.usable = False
            warnings.warn(
                f"no {self.kind} log-probabilities are kept in {self.path} ({error}): delete the file if it is "
                f"damaged, or set {self.variable} to another folder or to 'off'",
                stacklevel=4,
            )


def entry_key(precision: str, prompt: Sequence[int], response: Sequence[int]) -> bytes:
    """Key of the log-probabilities of a response, under the weights of its file."""
    # the length of the prompt, since (1, 2) + (3,) and (1,) + (2, 3) are the same ids in a row
    digest = hashlib.blake2b(f"{precision}|{len(prompt)}|".encode(), digest_size=16)
    digest.update(np.asarray((*prompt, *response), "<i8").tobytes())
    return digest.digest()


def weights_digest(reference: AbstractReference) -> str | None:
    """Digest of everything that the log-probabilities of a reference depend on; None for sharded weights.

    Takes a second per GB, once per reference; ask only while ``reference.version`` is 0. A LoRA reference is named by
    its base alone, so that LoRA and full fine-tuning from one checkpoint share entries.
    """
    if reference not in _DIGESTS:
        with reference.active() as model:
            digest = model_digest(model, without_adapter=isinstance(reference, AdapterOffReference))
        if digest is None:
            return None
        _DIGESTS[reference] = digest
    return _DIGESTS[reference]


def model_digest(model: PreTrainedModel, *, without_adapter: bool = False) -> str | None:
    """Digest of weights and config; None for weights that are sharded.

    Args:
        model: the model.
        without_adapter: leave a LoRA adapter out, and name the base as if it stood alone.
    """
    tensors = _persistent_tensors(model)
    if without_adapter:
        tensors = {n.replace(".base_layer.", "."): t for n, t in tensors.items() if ".lora_" not in n}
    if any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        return None
    with saved_dropout(model):  # a reference never uses dropout, so that its setting must not matter
        config = {k: v for k, v in model.config.to_diff_dict().items() if k not in _CHANGES_NOTHING}
    return _digest(f"{type(model).__qualname__} {json.dumps(config, sort_keys=True, default=str)}", tensors)


# weak, so that a digest keeps no model in memory
_DIGESTS: WeakKeyDictionary[AbstractReference, str] = WeakKeyDictionary()

_CHANGES_NOTHING = ("_name_or_path", "architectures", "dtype", "use_cache")
"""Entries of a config that loading, saving and training change, and the log-probabilities do not depend on."""


def _persistent_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of ``state_dict``, without a call of it, which would shard a gathered FSDP model."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(path, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                tensors[name] = buffer
    return tensors


def _digest(kind: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(kind.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"|{name} {tensor.dtype} {tuple(tensor.shape)}|".encode())
        # bytes, since numpy has no bfloat16; reshape(-1), since torch cannot view a scalar as bytes
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _precision(model: PreTrainedModel) -> str:
    """Data types of a forward pass: of the weights, and of autocast if it is on."""
    device = model.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return f"{model.dtype} {autocast}"
