"""The record of a run, ``run.json``: settings, versions, commit, command and hashes of the data."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import cast

import lightning as L

from lightning_rlhf import __version__
from lightning_rlhf.ledger.same_run import without_arguments
from lightning_rlhf.runtime.fingerprint import Settings, comparable, differences, without_new_defaults
from lightning_rlhf.types import State


PACKAGES = ("torch", "lightning", "transformers", "peft", "tokenizers", "jsonargparse", "numpy")
SAMPLE = 64 << 20
"""Bytes at either end of a file that are hashed where it is larger than `WHOLE`."""
WHOLE = 1 << 30
KEPT_STARTS = 32
"""Newest starts that ``run.json`` keeps beside the first one."""


class RunRecord(L.Callback):
    """Writes ``run.json`` when training starts, and puts fingerprint and latest validation into checkpoints.

    A start that continues the run is appended to ``starts``, which keeps the first and the newest `KEPT_STARTS`. Rank
    zero writes.

    Args:
        folder: the run folder.
        settings: all settings, as plain data.
        fingerprint: the settings that decide the results; see `lightning_rlhf.runtime.fingerprint`.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object], fingerprint: Mapping[str, object]) -> None:
        self.folder, self.settings, self.fingerprint = folder, settings, fingerprint
        self._validation: Settings = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file."""
        if trainer.is_global_zero:
            write_record(self.folder, self.settings, trainer.world_size, trainer.ckpt_path)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the metrics, which the model card of a checkpoint states."""
        if not trainer.sanity_checking:
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            held_out = {name: value for name, value in metrics.items() if name.startswith("val/")}
            self._validation = {"step": trainer.global_step, "metrics": held_out}

    def state_dict(self) -> dict[str, str]:
        """The fingerprint, and the metrics of the latest validation if there was one, as JSON."""
        found = {"fingerprint": self.fingerprint, "validation": self._validation}
        return {name: json.dumps(value) for name, value in found.items() if value or name == "fingerprint"}

    def load_state_dict(self, state_dict: State) -> None:
        """Restore the validation of `state_dict`; the fingerprint is that of this start."""
        self._validation = json.loads(state_dict.get("validation", "{}"))


def check_settings(checkpoint: Mapping[str, object], path: Path, now: Mapping[str, object]) -> None:
    """Refuse to continue from a checkpoint that was trained with other settings.

    Args:
        checkpoint: content of the checkpoint.
        path: its path, for the message.
        now: fingerprint of the run that would continue.

    Raises:
        ValueError: naming every setting that differs, with both values.
    """
    callbacks = cast(Mapping[str, Mapping[str, str]], checkpoint.get("callbacks", {}))
    stored = callbacks.get(RunRecord.__qualname__, {}).get("fingerprint")
    # a checkpoint of a plain Trainer has no fingerprint to compare with
    if stored is None:
        return
    # through JSON, as the stored one went: tuples are lists there, and keys are strings
    old, new = comparable(json.loads(stored)), json.loads(json.dumps(dict(now)))
    # a setting that a newer version has added, and that is at its default, must not refuse older checkpoints
    new, _ = without_new_defaults(old, new)
    if any(isinstance(part, Mapping) and "rows" in part for part in checkpoint.values()):
        # the state of the DataModule knows the rows by their content
        old, new = without_arguments(old, "prompts"), without_arguments(new, "prompts")
    lines = differences(old, new, "in the checkpoint")
    if lines:
        raise ValueError(
            f"the settings differ from those that checkpoint {path} was trained with:\n"
            + "\n".join(lines)
            + "\nGo back to the old settings, or start another run in another --run_dir; it can begin with these "
            "weights by model.policy=<old run>/model."
        )


def write_record(folder: Path, settings: Mapping[str, object], processes: int, continued_from: object) -> Path:
    """Write or extend ``run.json``, and return it."""
    path = folder / "run.json"
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(sys.argv),
        "host": socket.gethostname(),
        "processes": processes,
        "continued_from": None if continued_from is None else str(continued_from),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(),
        "git": {"working_folder": commit(Path.cwd()), "lightning_rlhf": commit(Path(__file__).parent)},
        "config": settings,
        "data": [hashed(file) for file in named_files(settings)],
    }
    held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"starts": []}
    starts, left_out = [*held["starts"], start], held.get("starts_left_out", 0)
    if len(starts) > KEPT_STARTS + 1:
        # a job that is requeued again and again would let the file grow without end
        left_out += len(starts) - KEPT_STARTS - 1
        starts = [starts[0], *starts[-KEPT_STARTS:]]
    record = {"starts": starts, **({"starts_left_out": left_out} if left_out else {})}
    text = without_secrets(json.dumps(record, indent=1, default=str, ensure_ascii=False))
    # atomic: a killed process leaves the old file
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(text + "\n", encoding="utf-8")
    os.replace(fresh, path)
    return path


def last_start(folder: Path) -> Settings | None:
    """The newest start in the ``run.json`` of a run folder; None if there is no such file."""
    path = folder / "run.json"
    if not path.is_file():
        return None
    return cast(Settings, json.loads(path.read_text(encoding="utf-8"))["starts"][-1])


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    # metadata of an editable installation may be those of an earlier version
    found = {"lightning-rlhf": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit(folder: Path) -> dict[str, str | bool] | None:
    """Git commit of a folder, and whether files that git knows were changed since; None outside of a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "changed": bool(git("status", "--porcelain", "--untracked-files=no", "--", ".")),
        }
    # without git, outside of a repository, or on a slow disk the run starts all the same
    except (OSError, subprocess.SubprocessError):
        return None


def named_files(settings: object) -> Iterator[Path]:
    """Files that settings name, each once; folders of models give their files."""
    seen: set[Path] = set()
    for text in _strings(settings):
        try:
            path = Path(text).expanduser()
            files = sorted(path.iterdir()) if path.is_dir() and (path / "config.json").is_file() else [path]
            for file in files:
                if file.is_file() and file not in seen:
                    seen.add(file)
                    yield file
        # the text is no path: too long, with a null byte, or the home folder of nobody
        except (OSError, RuntimeError, ValueError):
            continue


def hashed(file: Path) -> dict[str, str | int]:
    """Name, size and SHA-256 of a file; of a very large one, of the beginning and the end only."""
    size = file.stat().st_size
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        if size <= WHOLE:
            digest = hashlib.file_digest(stream, "sha256")
            return {"path": str(file), "bytes": size, "sha256": digest.hexdigest()}
        # all of a file of many GB would take long to hash at each start
        digest.update(stream.read(SAMPLE))
        stream.seek(size - SAMPLE)
        digest.update(stream.read(SAMPLE))
    return {"path": str(file), "bytes": size, "sha256_of_both_ends": digest.hexdigest()}


def without_secrets(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Replace the values of environment variables that are called key, token, secret or password."""
    env = os.environ if environment is None else environment
    secrets = [
        value
        for name, value in env.items()
        # a short value, as of USE_KEY=1, would be replaced wherever its characters occur
        if len(value) >= 8 and re.search(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", name, re.IGNORECASE)
    ]
    # the longest first: where one secret holds another, a part of it would stay readable
    for secret in sorted(secrets, key=len, reverse=True):
        # in the JSON text quotes and backslashes of a secret are escaped
        for written in {secret, json.dumps(secret)[1:-1]}:
            text = text.replace(written, "[secret]")
    return text


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        # a longer string is no path, and no path holds a NUL
        if 0 < len(value) < 4096 and "\0" not in value and "\n" not in value:
            yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for inner in value:
            yield from _strings(inner)
