"""Executors of independent tasks: processes of this machine, and the workers of a Ray cluster.

The interface is `concurrent.futures.Executor`, so that executors of other libraries fit as well. Tasks return their
errors: an exception of a future means that the worker was lost, and the task may be given to another one.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import ParamSpec, TypeVar

from lightning_rlhf.runtime.children import follow_parent


P = ParamSpec("P")
T = TypeVar("T")

ATTEMPTS = 3
"""Workers that a task is given to, one after another, before it is reported as failed."""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class ProcessExecutor(ThreadPoolExecutor):
    """Runs each task in a process of its own, with one thread for arithmetic; a result is an exit status.

    Args:
        processes: tasks at a time, >= 1.
        preload: modules that are imported once: tasks are forked from a process that has loaded them.
    """

    def __init__(self, processes: int, preload: tuple[str, ...] = ("lightning_rlhf.commands.fit",)) -> None:
        # a thread waits for each process
        super().__init__(max_workers=processes)
        self.preload = preload
        self._alive: set[BaseProcess] = set()
        self._ended = False

    def submit(self, fn: Callable[P, object], /, *args: P.args, **kwargs: P.kwargs) -> Future[int]:  # type: ignore[override]
        """Start the task when a process is free."""
        return super().submit(self._run, fn, args, kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the executor; with ``cancel_futures`` the processes that still run are killed."""
        if cancel_futures:
            with _STARTS:
                self._ended = True
                for process in self._alive:
                    process.kill()
        super().shutdown(wait, cancel_futures=cancel_futures)

    def _run(self, fn: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]) -> int:
        # set before the fork server starts: libraries read these variables when they are loaded
        with _STARTS, one_thread():
            if self._ended:
                raise CancelledError
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(list(self.preload))
            process = context.Process(target=_followed, args=(fn, args, kwargs))
            process.start()
            self._alive.add(process)
        wait([process.sentinel])
        # a start reads the status of all processes that have ended, and a status can be read once
        with _STARTS:
            process.join()
            self._alive.remove(process)
            return int(process.exitcode or 0)


_STARTS = threading.Lock()


def isolated(fn: Callable[P, object], /, *args: P.args, **kwargs: P.kwargs) -> int:
    """Run a function in a process of its own, as `ProcessExecutor` does, and return its exit status.

    This is the task of other executors, whose workers are threads or serve several tasks.
    """
    with ProcessExecutor(1) as executor:
        return executor.submit(fn, *args, **kwargs).result()


class RayExecutor(Executor):
    """Runs tasks on a Ray cluster (extra ``ray``).

    Run folders must be on a file system that all nodes share.

    Args:
        address: address of the cluster; default: ``$RAY_ADDRESS``, else a cluster that runs here, else a new one.
        cpus: CPUs of a task, >= 0.
        gpus: GPUs of a task, >= 0; a part of one shares it.

    Raises:
        ImportError: if Ray is not installed.
    """

    def __init__(self, address: str | None = None, cpus: float = 1.0, gpus: float = 0.0) -> None:
        if cpus < 0 or gpus < 0:
            raise ValueError(f"RayExecutor.cpus and RayExecutor.gpus must be >= 0; got {cpus} and {gpus}")
        try:
            import ray  # imported here: an extra
        except ImportError as error:
            raise ImportError("RayExecutor needs Ray: pip install 'lightning-rlhf[ray]'") from error
        self.address, self.cpus, self.gpus = address, cpus, gpus
        self._ray = ray

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Give the task to the cluster."""
        if not self._ray.is_initialized():
            # only now: a run that is refused, or has nothing left to do, starts no cluster
            variables = {"PYTHONPATH": os.pathsep.join(own_paths())}
            self._ray.init(address=self.address, log_to_driver=False, runtime_env={"env_vars": variables})
        # no retries by Ray: the caller counts them, for all executors alike
        task = self._ray.remote(_called).options(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=0)
        # the function is an argument: Ray takes no builtin one as a task
        future: Future[T] = task.remote(fn, *args, **kwargs).future()
        return future


def own_paths() -> list[str]:
    """Folders from which this process imports modules, without those of the Python installation.

    Workers elsewhere import plug-ins of the user from the same ones.
    """
    installed = (sys.prefix, sys.base_prefix)
    paths = [os.path.abspath(path) for path in sys.path]
    return list(dict.fromkeys(path for path in paths if not path.startswith(installed)))


def _called(fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    return fn(*args, **kwargs)


def submitted(submit: Callable[P, Future[T]], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
    """Submit a task; where the executor takes no more of them, its future has that error."""
    try:
        return submit(*args, **kwargs)
    except BrokenExecutor as error:
        future: Future[T] = Future()
        future.set_exception(error)
        return future


def worker_error(future: Future[T]) -> BaseException | None:
    """The error by which a task that has ended lost its worker; None if it has a result."""
    return CancelledError("the task was cancelled") if future.cancelled() else future.exception()


def _followed(fn: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    threading.Thread(target=follow_parent, daemon=True).start()
    fn(*args, **kwargs)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let processes that are started inside use one thread for arithmetic."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
