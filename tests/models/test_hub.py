"""Model folders are uploaded to a server on loopback that speaks the part of the Hub's protocol that uploads need."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest
from lightning.pytorch import Trainer

from lightning_rlhf.callbacks import HFExport
from lightning_rlhf.cli import main
from lightning_rlhf.models.hub import HubRepo, push_folder


class Hub:
    """Repositories in memory: `made` by id, `files` by repository, branch and path."""

    def __init__(self) -> None:
        self.made: dict[str, dict[str, object]] = {}
        self.branches: list[str] = []
        self.files: dict[tuple[str, str, str], bytes] = {}
        self.token = "hf_right"
        self.down = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"] or 0))
                outer.reply(self, self.path, body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reply(self, handler: BaseHTTPRequestHandler, path: str, body: bytes) -> None:
        status, answer = 200, {}
        if self.down:
            status = 418
        elif handler.headers.get("Authorization") != f"Bearer {self.token}":
            status = 401
        elif path == "/api/repos/create":
            row = json.loads(body)
            name = f"{row.get('organization') or 'me'}/{row['name']}"
            # as the Hub, a repository that exists is a conflict
            status = 409 if name in self.made else 200
            self.made.setdefault(name, row)
            answer = {"url": f"{self.url}/{name}", "name": name, "id": name}
        elif "/branch/" in path:
            self.branches.append(path.rpartition("/")[2])
        elif "/preupload/" in path:
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": row["path"], **mode} for row in json.loads(body)["files"]]}
        elif "/commit/" in path:
            repo, branch = path.removeprefix("/api/models/").split("/commit/")
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.files[repo, branch, entry["value"]["path"]] = content
            answer = {"commitUrl": f"{self.url}/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40}
        data = json.dumps(answer).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub()
    monkeypatch.setenv("HF_ENDPOINT", made.url)
    monkeypatch.setenv("HF_TOKEN", made.token)
    # the other tests must not reach the network; here it is this machine
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield made
    made.server.shutdown()


@pytest.fixture
def toy(load_module: Callable[[Path], ModuleType]) -> ModuleType:
    """The run of the callbacks' tests."""
    return load_module(Path(__file__).parents[1] / "callbacks" / "toy_run.py")


def folder(path: Path) -> Path:
    (path / "model" / "adapter").mkdir(parents=True)
    (path / "model" / "README.md").write_text("---\nlicense: mit\n---\nA card.\n")
    (path / "model" / "adapter" / "weights.bin").write_bytes(b"\x00\x01")
    return path / "model"


def test_a_folder_arrives_whole_and_again(tmp_path: Path, hub: Hub) -> None:
    written = folder(tmp_path)
    assert push_folder(written, HubRepo("me/model")).startswith(f"{hub.url}/me/model/commit/")
    assert hub.made["me/model"]["visibility"] == "private"
    assert hub.files["me/model", "main", "adapter/weights.bin"] == b"\x00\x01"
    assert hub.files["me/model", "main", "README.md"].startswith(b"---")
    # a name alone is one of the user's, and the repository may be there
    push_folder(written, HubRepo("model", revision="second"))
    assert hub.branches == ["second"] and ("me/model", "second", "README.md") in hub.files
    push_folder(written, HubRepo("org/open", private=False))
    assert hub.made["org/open"]["visibility"] == "public"


def test_faults_name_the_remedy(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    written = folder(tmp_path)
    with pytest.raises(ValueError, match=r"push_to_hub\.repo='a/b/c' is no repository id: write user/name"):
        HubRepo("a/b/c")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ValueError, match=r"token is not valid; set HF_TOKEN.*hf upload me/model .*model --revision b"):
        push_folder(written, HubRepo("me/model", revision="b"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="is complete but was not uploaded to me/model: "):
        push_folder(written, HubRepo("me/model"))
    assert hub.files == {} and (written / "README.md").is_file()


def test_a_run_uploads_its_model_and_ends_well_without_the_hub(
    tmp_path: Path, hub: Hub, toy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(name: str) -> Trainer:
        trainer: Trainer = toy.trainer(tmp_path / name, [HFExport(push_to_hub=HubRepo("me/toy"))])
        trainer.fit(toy.ToyModule(), datamodule=toy.ToyData())
        return trainer

    fit("first")
    assert {path for _, _, path in hub.files} == {"README.md", "weights.pt"}
    hub.down = True
    with pytest.warns(UserWarning, match="is complete but was not uploaded to me/toy"):
        assert fit("second").state.finished
    assert (tmp_path / "second" / "model" / "weights.pt").is_file()
    # nobody is logged in: told before the training
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="push_to_hub=me/toy needs a token with write access: set HF_TOKEN"):
        fit("third")
    assert not (tmp_path / "third" / "model").exists()
    with pytest.raises(ValueError, match="needs a token"):
        main(["export", "--checkpoint=x", f"--out={tmp_path}/y", "--push_to_hub.repo=me/toy"])
    with pytest.raises(ValueError, match="uploads the folder of a model: give --checkpoint"):
        main(["export", "--ledger=x", "--out=y.jsonl", "--push_to_hub.repo=me/toy"])
