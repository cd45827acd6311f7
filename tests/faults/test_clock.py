"""A system clock that jumps, by days and while a run is going on: nothing is ordered or timed by it."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.fault_drill import PAIRS, Scene, descendants, tiny_model


# Stands before the C library's: half of the seconds lie three days in the past, the others 400 days in the future.
CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>

static int (*real)(clockid_t, struct timespec *);

int clock_gettime(clockid_t id, struct timespec *t) {
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(id, t);
    if (status == 0 && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) {
        struct timespec steady;
        real(CLOCK_MONOTONIC, &steady);
        t->tv_sec += steady.tv_sec % 2 ? -3 * 86400L : 400 * 86400L;
    }
    return status;
}

int gettimeofday(struct timeval *restrict t, void *restrict zone) {
    struct timespec now;
    int status = clock_gettime(CLOCK_REALTIME, &now);
    t->tv_sec = now.tv_sec;
    t->tv_usec = now.tv_nsec / 1000;
    return status;
}

time_t time(time_t *t) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (t) *t = now.tv_sec;
    return now.tv_sec;
}
"""


@pytest.fixture(scope="module")
def jumping(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables under which a process sees a clock that jumps."""
    compiler = shutil.which("cc")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("needs Linux and a C compiler")
    folder = tmp_path_factory.mktemp("clock")
    (folder / "clock.c").write_text(CLOCK)
    library = folder / "clock.so"
    command = [compiler, "-shared", "-fPIC", "-o", str(library), str(folder / "clock.c"), "-ldl"]
    subprocess.run(command, check=True)
    return {"LD_PRELOAD": str(library)}


def test_the_clock_of_these_tests_jumps(jumping: dict[str, str]) -> None:
    script = (
        "import time, datetime as d\n"
        "end = time.monotonic() + 2.2\n"
        "while time.monotonic() < end: print(time.time(), d.datetime.now().timestamp())"
    )
    environment = {**os.environ, **jumping}
    command = [sys.executable, "-c", script]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    for column in zip(*(map(float, line.split()) for line in said.splitlines()), strict=True):
        steps = [b - a for a, b in itertools.pairwise(column)]
        assert max(steps) > 400 * 86400
        assert min(steps) < -400 * 86400


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, jumping: dict[str, str]) -> None:
    """The judge fails one time in three, and is asked again; the run is killed in the middle."""
    model = tiny_model(tmp_path / "model")
    straight = Scene(tmp_path / "straight", model, 6, 1, 0)
    jumped = Scene(tmp_path / "jumped", model, 6, 1, 0, jumping)
    try:
        assert straight.start().wait() == 0, straight.said()
        run = jumped.start()
        while run.poll() is None and len(jumped.labels()) < 3 * PAIRS:
            time.sleep(0.05)
        for process in descendants(run.pid):
            os.kill(process, signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL, jumped.said()
        assert jumped.start().wait() == 0, jumped.said()
    finally:
        straight.close()
        jumped.close()
    assert jumped.labels() == straight.labels()
    assert len(jumped.labels()) == 6 * PAIRS
    one, other = straight.weights(), jumped.weights()
    assert all(torch.equal(one[name], other[name]) for name in one)
    with sqlite3.connect(jumped.ledger) as db:
        rows = db.execute(
            "SELECT c.round, a.time FROM attempts a JOIN comparisons c ON c.id = a.comparison ORDER BY a.id"
        )
        rounds, times = zip(*rows.fetchall(), strict=True)
    assert list(rounds) == sorted(rounds)
    assert list(times) != sorted(times)  # the clock did jump
