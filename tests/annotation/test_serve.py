"""The real server in its own process: it starts, refuses, restarts, and is looked after from the command line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_rlhf.annotation.client import Client, NoServerError, RefusedError
from lightning_rlhf.annotation.queues import Item, QueueOptions
from lightning_rlhf.annotation.serve import Address, read_gold, read_secrets


pytest.importorskip("starlette")

PAIRS = [Item(f"k{n}", ({"role": "user", "content": f"q{n}"},), f"a{n}", f"b{n}") for n in range(3)]
ANNOTATE = [sys.executable, "-m", "lightning_rlhf", "annotate"]


@pytest.fixture
def server(start_server: Callable[..., Any], tmp_path: Path) -> Any:
    return start_server(tmp_path)


def annotate(run_dir: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run ``lightning-rlhf annotate`` with options."""
    command = [*ANNOTATE, f"--run_dir={run_dir}", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_kill_and_restart_keep_pairs_people_and_tokens(server: Any, start_server: Callable[..., Any]) -> None:
    client = server.client
    assert client.push("run", PAIRS, QueueOptions(overlap=0.0)) == 3
    mode = (server.run_dir / "annotation" / "server.json").stat().st_mode
    assert mode & 0o077 == 0
    with pytest.raises(RefusedError, match="trainer may not"):
        client.get("/admin/report.json")
    second = annotate(server.run_dir, "--port=0")
    assert second.returncode == 1 and "open in another annotation server" in second.stderr
    server.stop(signal.SIGKILL)
    with pytest.raises(NoServerError, match="does not answer"):
        client.progress("run")
    again = start_server(server.run_dir, port=server.port)
    assert client.progress("run")["open"] == 3, "the same token works"
    assert client.push("run", PAIRS) == 0
    assert client.results("run", wait=0) == (0, [])
    assert again.stop() in (0, -signal.SIGTERM)


def test_pages_hear_of_new_pairs_and_a_stop_does_not_wait_for_them(server: Any) -> None:
    secrets = read_secrets(server.run_dir)
    assert secrets is not None
    request = urllib.request.Request(
        f"{server.url}/api/v1/events", headers={"Authorization": f"Bearer {secrets.admin}"}
    )
    with urllib.request.urlopen(request, timeout=20) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")

        def news() -> dict[str, object]:
            for line in stream:
                if line.startswith(b"data: "):
                    found: dict[str, object] = json.loads(line.removeprefix(b"data: "))
                    return found
            raise AssertionError("the stream has ended")

        assert news()["total"] == 0
        server.client.push("run", PAIRS)
        assert news() == {"mine": 0, "done": 0, "total": 3, "left": 3, "has_work": True}
        assert server.stop() in (0, -signal.SIGTERM)


def test_verbs_act_through_the_server_and_without_it(server: Any, tmp_path: Path) -> None:
    added = annotate(tmp_path, "--add=ann")
    assert added.returncode == 0, added.stderr
    assert re.search(r"/join#c=[\w-]{32}\n", added.stdout)
    token = re.search(r"again: ([\w-]{32})", added.stdout)
    assert token is not None
    assert Client(server.url, token.group(1)).get("/api/v1/next")["pair"] is None
    assert "ann is paused" in annotate(tmp_path, "--pause=ann").stdout
    server.stop()
    assert "ann is active" in annotate(tmp_path, "--resume=ann").stdout
    nobody = annotate(tmp_path, "--pause=nobody")
    assert nobody.returncode == 1 and "there is no nobody; known are admin, trainer, ann" in nobody.stderr
    shown = annotate(tmp_path, "--show_report=true", f"--export={tmp_path / 'votes.jsonl'}")
    assert "Votes: 0 on 0 pairs" in shown.stdout and "wrote 0 votes" in shown.stdout


def test_addresses_that_would_send_texts_in_the_clear_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"in the clear.*ssh -L 8765"):
        Address("0.0.0.0")
    with pytest.raises(ValueError, match="belong together"):
        Address(certfile="x")
    with pytest.raises(ValueError, match="https://name"):
        Address(behind_proxy="http://name")
    proxied = Address("0.0.0.0", behind_proxy="https://label.example")
    assert proxied.secure and "label.example" in proxied.names() and "0.0.0.0" not in proxied.names()
    with pytest.raises(ValueError, match="base_url must be"):
        Client("localhost:8765", "x")


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    (tmp_path / "nh3.py").write_text("raise ImportError('hidden')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    run = subprocess.run(
        [*ANNOTATE, "--port=0", f"--run_dir={tmp_path}"], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert "needs nh3: pip install 'lightning-rlhf[human]'" in run.stderr


def test_the_server_imports_no_torch() -> None:
    modules = "lightning_rlhf.commands.annotate, lightning_rlhf.annotation.app"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_gold_files(tmp_path: Path) -> None:
    path = tmp_path / "gold.jsonl"
    rows = [
        {"prompt": "q", "chosen": "x", "rejected": "y", "explanation": "e"},
        {"messages": [{"role": "user", "content": "m"}], "chosen": "x", "rejected": "z"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    first, second = read_gold(path)
    assert (first.explanation, second.prompt) == ("e", ({"role": "user", "content": "m"},))
    path.write_text(json.dumps({"prompt": "q", "chosen": "x", "rejected": "x"}))
    with pytest.raises(ValueError, match="row 1: ValueError: chosen and rejected must be two different"):
        read_gold(path)
