"""Ending a run on a signal, which is recorded first and acted on between steps or chunks.

Cluster schedulers send SIGTERM, and SIGKILL some seconds later; people press Ctrl-C (SIGINT) or close the terminal
(SIGHUP); SLURM sends a signal of its own before it queues a job again. Rounds check for a signal between chunks,
training between steps; `lightning_rlhf.runtime.checkpoints.StopOnSignal` writes the checkpoint. `end_with_parent` ends
a rank with its launcher.

This module imports only the standard library, so that it is fast to import.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType


STATUS = 128 + signal.SIGTERM
"""Exit status of a run that SIGTERM ended, as shells report it."""

WAITING = 75
"""Exit status of a run that waits for people: EX_TEMPFAIL of sysexits.h, try again later."""

FORWARDED = 2.0
"""Seconds within which a second SIGINT of a rank is the first one, forwarded by its launcher."""

_asked_by = 0
_asked_at = 0.0


class Stopped(SystemExit):
    """The run ends because of a signal; the exit status is 128 plus the number of the signal.

    Args:
        number: the signal. Default: the recorded one, else SIGTERM.
    """

    def __init__(self, number: int | None = None) -> None:
        self.signal = number or _asked_by or int(signal.SIGTERM)
        super().__init__(128 + self.signal)

    @property
    def reason(self) -> str:
        """Why the run ends, for a message."""
        return f"stopped by {name_of(self.signal)}"


class Waiting(Stopped):
    """The run ends because it waits for people; the exit status is `WAITING`, and the same command goes on.

    Args:
        text: what it waits for.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        # no signal was sent, so no job is queued again
        self.text, self.signal, self.code, self.args = text, 0, WAITING, (text,)

    @property
    def reason(self) -> str:
        """Why the run ends, for a message."""
        return self.text


def listen(requeue: int | None = None) -> None:
    """Record signals from now on, in place of earlier handlers; only the main thread can.

    A second SIGINT ends the process at once.

    Args:
        requeue: a signal after which the job is to be queued again, as SLURM sends it.
    """
    global _asked_by
    # a signal of an earlier run in this process does not end this one
    _asked_by = 0
    # signal.signal raises in other threads
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _note)
    # nohup ignores SIGHUP on purpose
    hang_up = getattr(signal, "SIGHUP", None)
    if hang_up is not None and signal.getsignal(hang_up) != signal.SIG_IGN:
        signal.signal(hang_up, _note)
    if requeue is not None:
        signal.signal(requeue, _note)


def listens() -> bool:
    """Whether signals are recorded."""
    return signal.getsignal(signal.SIGTERM) is _note


def end_at_once_on_interrupt() -> None:
    """Let SIGINT end the run at once, with its own exit status, since there is nothing to save."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _end)


def asked() -> bool:
    """Whether this process was asked to end."""
    return _asked_by != 0


def asked_by() -> int:
    """Number of the signal that asked this process to end; 0 if none did."""
    return _asked_by


def name_of(number: int) -> str:
    """Name of a signal for messages."""
    name = signal.Signals(number).name
    return f"Ctrl-C ({name})" if number == signal.SIGINT else name


def check() -> None:
    """End here if this process was asked to.

    Raises:
        Stopped: if it was.
    """
    if asked():
        raise Stopped


def _note(number: int, frame: FrameType | None) -> None:
    del frame
    global _asked_by, _asked_at
    if number == signal.SIGINT and not is_worker():
        # the default handler from now on: a process that waits inside a library runs no Python handler
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _say("stopping after the step, or the chunk of a round, that is going on; Ctrl-C again ends the run at once\n")
    elif number == signal.SIGINT and _asked_by == number and time.monotonic() - _asked_at > FORWARDED:
        # a terminal sends Ctrl-C to all ranks, and the launcher forwards it: only a later one is a second
        os._exit(128 + number)
    # the first signal decides the exit status, and whether SLURM queues the job again
    if not _asked_by:
        _asked_by, _asked_at = number, time.monotonic()


def _end(number: int, frame: FrameType | None) -> None:
    del frame
    raise Stopped(number)


def _say(text: str) -> None:
    """Write to standard error from a signal handler, which may have interrupted a `print`."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}".encode())


def run_child(command: Sequence[str]) -> int:
    """Run a command to its end and return its status, as `subprocess` does; signals are forwarded to it.

    The child is in a process group of its own, so that one Ctrl-C reaches it once.
    """
    child: subprocess.Popen[bytes] | None = None
    early = 0

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal early
        del frame
        if child is None:
            early = number
        else:
            child.send_signal(number)

    main = threading.current_thread() is threading.main_thread()
    numbers = [signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    # the child inherits signals that are ignored, as SIGHUP under nohup: leave them so
    numbers = [number for number in numbers if main and signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        child = subprocess.Popen(command, process_group=0 if os.name == "posix" and main else None)
        if early:  # a signal arrived before the child existed
            child.send_signal(early)
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def requeue_job() -> str:
    """Queue the SLURM job of this process again, and return a message about it."""
    # the number of the array alone would requeue all of its tasks
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")
    # the number goes to a command line
    if not re.fullmatch(r"[0-9_]+", job):
        return f"the job was not queued again: its number is {job!r}"
    try:
        status = subprocess.run(["scontrol", "requeue", job], check=False).returncode
    except OSError as error:
        return f"job {job} was not queued again ({error})"
    return f"job {job} is queued again" if status == 0 else f"scontrol requeue {job} failed with status {status}"


def end_with_parent() -> None:
    """Let the system kill this process when its parent dies; only on Linux.

    Otherwise the ranks of a killed launcher stay alive, and hold the ledger and the GPUs.
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
