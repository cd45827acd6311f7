"""Ending a run when it is asked to: SIGTERM is noted, and acted on where nothing is half done.

Cluster schedulers send SIGTERM, and SIGKILL some seconds later. Rounds look at the note between chunks, training
between steps; `lightning_rlhf.checkpoints.StopOnSignal` writes the checkpoint.
"""

from __future__ import annotations

import signal
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
