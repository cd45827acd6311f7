"""Load of the annotation server: robots judge pairs over HTTP, and every request is timed.

    python -m benchmarks.annotation_load --robots 8 --think 1 --seconds 120

The server is a process of its own. Each robot asks for the next pair, thinks, and votes. Printed are the medians and
99th percentiles of both requests in milliseconds, and the server's memory at the beginning and at the end.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

from lightning_rlhf.annotation.client import Client
from lightning_rlhf.annotation.queues import Item, QueueOptions
from lightning_rlhf.annotation.serve import read_secrets


WORDS = "The bridge carries more than it was built for, and nobody has asked the river. "


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least a share of all values do not exceed; NaN without values."""
    if not values:
        return float("nan")
    # rank ceil(share * n), counted from 1
    return sorted(values)[max(-int(-share * len(values) // 1), 1) - 1]


class Robot(threading.Thread):
    """Judges pairs until a time, and keeps how long each request took, in milliseconds."""

    def __init__(self, client: Client, think: float, until: float) -> None:
        super().__init__(daemon=True)
        self.client, self.think, self.until = client, think, until
        self.next_ms: list[float] = []
        self.vote_ms: list[float] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        """Judge pairs."""
        try:
            while time.monotonic() < self.until and self.judge():
                pass
        except BaseException as error:  # a thread's error would be lost
            self.error = error

    def judge(self) -> bool:
        """Judge one pair; False if there is none."""
        start = time.perf_counter()
        pair = self.client.get("/api/v1/next")["pair"]
        self.next_ms.append(1000 * (time.perf_counter() - start))
        if not isinstance(pair, dict):
            return False
        time.sleep(self.think)
        ballot = {"id": pair["id"], "uid": uuid.uuid4().hex, "side": "left", "seconds": self.think}
        start = time.perf_counter()
        self.client.post("/api/v1/votes", ballot)
        self.vote_ms.append(1000 * (time.perf_counter() - start))
        return True


def memory_mb(process: int) -> float:
    """Resident memory of a process in MB; NaN where /proc does not say."""
    status = Path(f"/proc/{process}/status")
    found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found.group(1)) / 1000 if found else float("nan")


def measure(folder: Path, robots: int, think: float, seconds: float, pairs: int, words: int) -> dict[str, float]:
    """Run the load and return the measurements."""
    command = [sys.executable, "-m", "lightning_rlhf", "annotate", f"--run_dir={folder}", "--port=0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = re.search(r"http://\S+:\d+", server.stdout.readline())
        secrets = read_secrets(folder)
        assert url is not None and secrets is not None
        text = WORDS * max(words // len(WORDS.split()), 1)
        items = [
            Item(f"pair-{n}", ({"role": "user", "content": f"question {n}"},), f"{n} {text}", f"{text} {n}")
            for n in range(pairs)
        ]
        trainer, admin = Client(url.group(), secrets.trainer), Client(url.group(), secrets.admin)
        trainer.push("load", items, QueueOptions(overlap=0.0))
        people = [admin.post("/admin/annotators", {"name": f"robot-{n}", "role": "annotator"}) for n in range(robots)]
        before, until = memory_mb(server.pid), time.monotonic() + seconds
        workers = [Robot(Client(url.group(), str(row["token"])), think, until) for row in people]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        for worker in workers:
            if worker.error is not None:
                raise worker.error
        after = memory_mb(server.pid)
    finally:
        server.terminate()
        server.wait(timeout=20)
    asked = [value for worker in workers for value in worker.next_ms]
    voted = [value for worker in workers for value in worker.vote_ms]
    return {
        "votes": len(voted),
        "next_p50_ms": percentile(asked, 0.5),
        "next_p99_ms": percentile(asked, 0.99),
        "vote_p50_ms": percentile(voted, 0.5),
        "vote_p99_ms": percentile(voted, 0.99),
        "memory_before_mb": before,
        "memory_after_mb": after,
    }


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    options.add_argument("--robots", type=int, default=8, help="robots that judge at once")
    options.add_argument("--think", type=float, default=1.0, help="seconds a robot looks at a pair")
    options.add_argument("--seconds", type=float, default=120.0, help="length of the measurement")
    options.add_argument("--pairs", type=int, default=2000, help="pairs in the queue")
    options.add_argument("--words", type=int, default=150, help="words of a response")
    options.add_argument("--out", type=Path, help="file to which a line of JSON is appended")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), given.robots, given.think, given.seconds, given.pairs, given.words)
    print(*(f"{name}: {value:.6g}" for name, value in found.items()), sep="\n")
    if given.out is not None:
        with given.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"benchmark": "annotation_load", **found}) + "\n")


if __name__ == "__main__":
    main()
