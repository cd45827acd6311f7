"""A real annotation server in its own process, and robots that judge pairs over HTTP as a browser does."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lightning_rlhf.annotation.client import Client, NoServerError
from lightning_rlhf.annotation.serve import read_secrets


ANNOTATE = [sys.executable, "-m", "lightning_rlhf", "annotate"]


class Server:
    """A server in a process of its own, on a free port unless one is given."""

    def __init__(self, run_dir: Path, port: int = 0, undo_seconds: float = 0.3) -> None:
        self.run_dir = run_dir
        command = [*ANNOTATE, f"--run_dir={run_dir}", f"--port={port}", f"--undo_seconds={undo_seconds}"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.lines = [self.process.stdout.readline() for _ in range(2)]
        found = re.search(r"http://\S+:(\d+)", self.lines[0])
        assert found is not None, self.process.communicate(timeout=20)
        self.url, self.port = found.group(), int(found.group(1))

    @property
    def client(self) -> Client:
        """A trainer's client."""
        secrets = read_secrets(self.run_dir)
        assert secrets is not None
        return Client(self.url, secrets.trainer)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the process and return its status."""
        self.process.send_signal(number)
        status = self.process.wait(timeout=20)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        return status


class Robot(threading.Thread):
    """A person who prefers the longer response, and of two equally long ones the last in the alphabet."""

    def __init__(self, server: Server, name: str, most: int | None = None) -> None:
        super().__init__(daemon=True)
        secrets = read_secrets(server.run_dir)
        assert secrets is not None
        row = Client(server.url, secrets.admin).post("/admin/annotators", {"name": name, "role": "annotator"})
        self.client = Client(server.url, str(row["token"]))
        self.most = most
        self.votes = 0
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.is_set() and (self.most is None or self.votes < self.most):
            # a server that was killed comes back
            with contextlib.suppress(NoServerError):
                self.votes += self.judge()
            time.sleep(0.02)

    def judge(self) -> bool:
        """Judge the next pair; False if there is none."""
        row = self.client.get("/api/v1/next")
        if row.get("guidelines"):
            found = re.search(r'name="hash" value="(\w+)"', self.client.text("/guidelines"))
            assert found is not None
            self.client.text("/guidelines", json.dumps({"hash": found.group(1)}).encode())
        if row["pair"] is None:
            return False
        texts = re.findall(r'<pre class="text plain"><bdi dir="auto">(.*?)</bdi></pre>', str(row["html"]), re.DOTALL)
        left, right = texts[-2:]
        side = "left" if (len(left), left) > (len(right), right) else "right"
        ballot = {"id": row["pair"]["id"], "uid": uuid.uuid4().hex, "side": side, "seconds": 1.5}  # type: ignore[index]
        self.client.post("/api/v1/votes", ballot)
        return True


@pytest.fixture
def start_server() -> Iterator[Callable[..., Server]]:
    """Starts servers, which end with the test."""
    pytest.importorskip("starlette")
    started: list[Server] = []

    def start(*args: object, **kwargs: object) -> Server:
        started.append(Server(*args, **kwargs))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.stop(signal.SIGKILL)


@pytest.fixture
def start_robot() -> Iterator[Callable[..., Robot]]:
    """Starts robots, which end with the test."""
    started: list[Robot] = []

    def start(*args: object, **kwargs: object) -> Robot:
        started.append(Robot(*args, **kwargs))  # type: ignore[arg-type]
        started[-1].start()
        return started[-1]

    yield start
    for robot in started:
        robot.ended.set()
    for robot in started:
        robot.join(timeout=10)


@pytest.fixture
def robot_class() -> type[Robot]:
    """For robots that judge when they are told to."""
    return Robot
