"""Ending a run when it is asked to: SIGTERM is noted, and acted on where nothing is half done.

Cluster schedulers send SIGTERM, and SIGKILL some seconds later. Rounds look at the note between chunks, training
between steps; `lightning_rlhf.checkpoints.StopOnSignal` writes the checkpoint. And ending it with its launcher.

Imports nothing that takes time.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from types import FrameType


STATUS = 128 + signal.SIGTERM
"""Exit status of a run that was asked to end; what a shell reports of a process that SIGTERM ended."""

_asked = threading.Event()


class Stopped(SystemExit):
    """The run was asked to end, and does."""

    def __init__(self) -> None:
        super().__init__(STATUS)


def listen() -> None:
    """Note SIGTERM from now on, in place of whoever listened before; only a main thread can."""
    _asked.clear()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _note)


def asked() -> bool:
    """Whether this process was asked to end."""
    return _asked.is_set()


def check() -> None:
    """End here if this process was asked to.

    Raises:
        Stopped: if it was.
    """
    if _asked.is_set():
        raise Stopped


def _note(number: int, frame: FrameType | None) -> None:
    del number, frame
    _asked.set()


def end_with_parent() -> None:
    """Let the system kill this process when the one that started it dies; Linux alone has a way.

    A launcher that is killed leaves its ranks behind otherwise, which hold the ledger and the GPUs.
    """
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died in between
            os.kill(os.getpid(), signal.SIGKILL)


def is_worker(environment: dict[str, str] | None = None) -> bool:
    """Whether this process is a rank that torchrun, or rank zero of Lightning, has started."""
    env = os.environ if environment is None else environment
    return "TORCHELASTIC_RUN_ID" in env or env.get("LOCAL_RANK", "0") != "0"
