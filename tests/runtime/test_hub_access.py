"""A Hub that does not answer costs one attempt, and a cached model opens without it."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from lightning_rlhf.models.load import load_tokenizer
from lightning_rlhf.models.pretrained import required_config
from lightning_rlhf.prompts import DatasetPrompts
from lightning_rlhf.runtime import hub_access


NOWHERE = "http://127.0.0.1:9"
"""A port at which nobody listens: the connection is refused, as a name that no server knows would be."""


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the process waits between attempts, ours and those of huggingface_hub."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_access, "_asked", {})
    monkeypatch.setattr(hub_access, "_noted", set())
    return waited


def at(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", address)


def test_misspelt_names_are_refused_after_one_second_without_the_hub(
    monkeypatch: pytest.MonkeyPatch, sleeps: list[float]
) -> None:
    at(monkeypatch, NOWHERE)
    remedy = rf"{NOWHERE} cannot be reached \(.*refused\): correct the name, name a local folder, or download it"
    with pytest.raises(FileNotFoundError, match=rf"'nobody/modle' is no local folder.*{remedy}"):
        load_tokenizer("nobody/modle")
    with pytest.raises(ValueError, match=r"nobody/dta: .*not in the cache of the Hub, and .*: check the id"):
        DatasetPrompts("nobody/dta").load()
    # the name server may have failed once; a minute later it is asked again
    assert sleeps == [1.0]
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_cached_model_opens_without_the_hub(
    monkeypatch: pytest.MonkeyPatch, sleeps: list[float], tmp_path: Path, tiny_policy: Path
) -> None:
    at(monkeypatch, NOWHERE)
    commit = "0" * 40
    repo = tmp_path / "models--nobody--tiny"
    shutil.copytree(tiny_policy, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert required_config("nobody/tiny", "nobody/tiny").model_type == "llama"
    assert load_tokenizer("nobody/tiny").eos_token == "<|end|>"
    assert sleeps == [1.0]


@pytest.fixture
def hub() -> Iterator[str]:
    """A Hub on loopback that answers, and has nothing."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def test_a_hub_that_answers_is_believed(monkeypatch: pytest.MonkeyPatch, sleeps: list[float], hub: str) -> None:
    at(monkeypatch, hub)
    assert hub_access.hub_fault() is None
    with pytest.raises(FileNotFoundError, match="and the Hub gave no such model"):
        load_tokenizer("nobody/modle")
    assert sleeps == []
