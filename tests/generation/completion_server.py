"""A completions server on loopback with a real tiny model, and the routes by which ``vllm serve`` takes weights."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from peft import PeftModel

from lightning_rlhf.generation import DecodeEngine, Decoding, Request
from lightning_rlhf.models import load_policy, load_tokenizer
from lightning_rlhf.randomness import Key
from lightning_rlhf.types import Prompt


class CompletionServer:
    """The endpoint, for as long as the ``with`` block lasts.

    Args:
        folder: the model that it starts with.
        name: under which it serves it.
        dev_mode: whether weights can be reloaded.
        adapters: whether adapters can be loaded.
        token_ids: whether it returns token ids.
        fault: status with which a call fails, by its route and how often that was called before; None answers it.
    """

    def __init__(
        self,
        folder: Path,
        name: str = "base",
        dev_mode: bool = True,
        adapters: bool = True,
        token_ids: bool = True,
        fault: Callable[[str, int], int | None] = lambda route, before: None,
    ) -> None:
        self.name, self.dev_mode, self.takes_adapters, self.token_ids, self.fault = (
            *(name, dev_mode, adapters),
            *(token_ids, fault),
        )
        self.models: dict[str, Any] = {name: load_policy(str(folder))}
        self.tokenizer = load_tokenizer(str(folder))
        self.version = "default"
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer._serve(self, {})

            def do_POST(self) -> None:
                outer._serve(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> CompletionServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()

    def bodies(self, route: str) -> list[dict[str, Any]]:
        """What was sent to a route."""
        return [body for called, body in self.calls if called == route]

    def _serve(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        # one at a time: the model is not made for threads
        with self._lock:
            status = self.fault(handler.path, len(self.bodies(handler.path)))
            self.calls.append((handler.path, body))
            self.headers.append(dict(handler.headers.items()))
            if status is not None:
                reply: Any = {"error": {"message": "as the test says"}}
            else:
                status, reply = self._answer(handler.path, body)
        content = json.dumps(reply).encode() if not isinstance(reply, str) else reply.encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    def _answer(self, route: str, body: dict[str, Any]) -> tuple[int, Any]:
        if route == "/v1/models":
            return 200, {"object": "list", "data": [{"id": name} for name in self.models]}
        if route == "/v1/completions":
            return self._complete(body)
        if route == "/v1/load_lora_adapter" and self.takes_adapters:
            # wraps the base model in place, as PEFT does: a copy, since the base must stay
            base = load_policy(str(self._saved(self.models[self.name], Path(body["lora_path"]).parent)))
            self.models[body["lora_name"]] = PeftModel.from_pretrained(base, body["lora_path"])
            return 200, "Success: LoRA adapter added successfully."
        if route == "/v1/unload_lora_adapter" and self.takes_adapters:
            del self.models[body["lora_name"]]
            return 200, "Success: LoRA adapter removed successfully."
        if self.dev_mode and route == "/weight_info":
            return 200, {"weight_version": self.version}
        if self.dev_mode and route == "/update_weight_version":
            self.version = body["new_version"]
            return 200, {"success": True}
        if self.dev_mode and route == "/collective_rpc":
            assert body["method"] == "reload_weights"
            self.models[self.name] = load_policy(body["kwargs"]["weights_path"])
            return 200, {"results": [None]}
        return 404, {"detail": "Not Found"}

    def _saved(self, model: Any, folder: Path) -> Path:
        path = folder / "base-of-the-test-server"
        model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)
        return path

    def _complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body["model"] not in self.models:
            return 404, {"error": {"message": f"The model {body['model']} does not exist."}}
        if len(body["prompt"]) + body["max_tokens"] > 256:
            return 400, {"error": {"message": "This model's maximum context length is 256 tokens."}}
        engine = DecodeEngine(
            self.models[body["model"]],
            None,
            self.tokenizer,
            beta=1.0,
            decoding=Decoding(max_new_tokens=body["max_tokens"], top_p=body["top_p"]),
            eos_ids=body["stop_token_ids"],
        )
        request = Request(
            Prompt(0, tuple(body["prompt"]), ""), Key((body["seed"],)), temperature=body["temperature"] or 1e-6
        )
        with torch.no_grad():
            (response,) = engine.generate([request])
        choice: dict[str, Any] = {"index": 0, "text": response.text}
        choice["finish_reason"] = "stop" if response.finish_reason == "eos" else "length"
        if self.token_ids and body["return_token_ids"]:
            choice["token_ids"] = list(response.ids)
        if "logprobs" in body:
            choice["logprobs"] = {"token_logprobs": response.policy_logps}
        return 200, {"choices": [choice]}
