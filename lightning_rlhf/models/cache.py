"""A cache of converted checkpoints: each is built once, by one process, and is there in full or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


CONVERTER = 1
"""Version of the conversion to cached folders; raise it when the conversion changes."""

_MANIFEST = "lightning_rlhf_cache.json"


def cache_folder() -> Path:
    """``$LIGHTNING_RLHF_CACHE``, or ``~/.cache/lightning_rlhf`` when that is unset."""
    return Path(os.environ.get("LIGHTNING_RLHF_CACHE") or "~/.cache/lightning_rlhf").expanduser().absolute()


def cached(name: str, digest: str, build: Callable[[Path], None]) -> Path:
    """Return a cached folder, built first if it is not there yet.

    Args:
        name: readable part of the folder's name.
        digest: hexadecimal digest of everything the content depends on.
        build: fills the empty folder it is given, with files only.
    """
    safe_name = re.sub(r"[^\w.-]", "_", name)
    folder = cache_folder() / f"{safe_name}-{digest[:16]}"
    if _complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        # another process may have built the folder while this one waited for the lock
        if _complete(folder):
            return folder
        for abandoned in (folder, *folder.parent.glob(f".{folder.name}.*.tmp")):
            # we hold the lock, so that the process that wrote there has died
            shutil.rmtree(abandoned, ignore_errors=True)
        scratch = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.tmp"
        scratch.mkdir()
        try:
            build(scratch)
            # the manifest comes last: a folder without one is incomplete
            sizes = {file.name: file.stat().st_size for file in scratch.iterdir()}
            (scratch / _MANIFEST).write_text(json.dumps(sizes, indent=1))
            # atomic: other processes see the whole folder or none
            scratch.rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _complete(folder: Path) -> bool:
    """Whether every file is there in full; after a power cut a folder can have its name without its data."""
    try:
        sizes: dict[str, int] = json.loads((folder / _MANIFEST).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return all((folder / name).exists() and (folder / name).stat().st_size == size for name, size in sizes.items())


def digest_of(*parts: str) -> str:
    """Digest of everything that a converted folder depends on: its sources and the converter."""
    return hashlib.sha256("|".join((f"converter {CONVERTER}", *parts)).encode()).hexdigest()


def file_digest(file: Path) -> str:
    """SHA-256 of a file, remembered in the cache as long as path, size and modification time stay the same."""
    status = file.stat()
    name = hashlib.sha256(f"{file.resolve()}|{status.st_size}|{status.st_mtime_ns}".encode()).hexdigest()
    memo = cache_folder() / "digests" / name
    if memo.exists():
        return memo.read_text()
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    memo.parent.mkdir(parents=True, exist_ok=True)
    scratch = memo.with_suffix(f".{uuid.uuid4().hex}.tmp")
    # atomic, since several processes may write it
    scratch.write_text(digest)
    scratch.replace(memo)
    return digest
