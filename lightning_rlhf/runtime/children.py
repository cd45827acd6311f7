"""Processes that belong to another one."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import wait


def follow_parent() -> None:
    """End this process when its parent does, however it ends: an orphan would hold files and memory.

    Call it in a thread of its own.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)
