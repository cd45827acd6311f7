"""A server on loopback with a real tiny model, and the routes of ``vllm serve`` or of SGLang."""

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
from lightning_rlhf.types import Prompt, Response


class CompletionServer:
    """The endpoint, for as long as the ``with`` block lasts.

    Args:
        folder: the model that it starts with.
        name: under which it serves it.
        engine: whose routes it has, ``vllm`` or ``sglang``.
        dev_mode: whether weights can be reloaded.
        adapters: whether adapters can be loaded.
        token_ids: whether it returns token ids.
        own_eos: ids that end a response beside those of the request, as SGLang has them from its checkpoint.
        fault: status with which a call fails, by its route and how often that was called before; None answers it.
    """

    def __init__(
        self,
        folder: Path,
        name: str = "base",
        engine: str = "vllm",
        dev_mode: bool = True,
        adapters: bool = True,
        token_ids: bool = True,
        own_eos: tuple[int, ...] = (),
        fault: Callable[[str, int], int | None] = lambda route, before: None,
    ) -> None:
        self.name, self.engine, self.own_eos = name, engine, own_eos
        self.dev_mode, self.takes_adapters, self.token_ids, self.fault = dev_mode, adapters, token_ids, fault
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
        return self._answer_sglang(route, body) if self.engine == "sglang" else self._answer_vllm(route, body)

    def _answer_sglang(self, route: str, body: dict[str, Any]) -> tuple[int, Any]:
        if route == "/generate":
            return self._generate_sglang(body)
        if route == "/load_lora_adapter":
            if not self.takes_adapters:
                return 400, {"success": False, "error_message": "LoRA is not enabled."}
            self._load_adapter(body)
            return 200, {"success": True, "error_message": None}
        if route == "/unload_lora_adapter":
            del self.models[body["lora_name"]]
            return 200, {"success": True, "error_message": None}
        if route == "/model_info":
            return 200, {"model_path": self.name, **({"weight_version": self.version} if self.dev_mode else {})}
        if route == "/update_weights_from_disk":
            if not Path(body["model_path"]).is_dir():
                return 400, {"success": False, "message": "Failed to get weights iterator"}
            # new weights change the name of the model, as in SGLang
            del self.models[self.name]
            self.name, self.version = body["model_path"], body["weight_version"]
            self.models[self.name] = load_policy(body["model_path"])
            return 200, {"success": True, "message": "Succeeded to update model weights."}
        return 404, {"detail": "Not Found"}

    def _answer_vllm(self, route: str, body: dict[str, Any]) -> tuple[int, Any]:
        if route == "/v1/completions":
            return self._complete(body)
        if route == "/v1/load_lora_adapter" and self.takes_adapters:
            self._load_adapter(body)
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

    def _load_adapter(self, body: dict[str, Any]) -> None:
        # wraps the base model in place, as PEFT does: a copy, since the base must stay
        base = load_policy(str(self._saved(self.models[self.name], Path(body["lora_path"]).parent)))
        self.models[body["lora_name"]] = PeftModel.from_pretrained(base, body["lora_path"])

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
        response = self._response(
            self.models[body["model"]], body["prompt"], body, body["max_tokens"], body["seed"], body["stop_token_ids"]
        )
        choice: dict[str, Any] = {"index": 0, "text": response.text}
        choice["finish_reason"] = "stop" if response.finish_reason == "eos" else "length"
        if self.token_ids and body["return_token_ids"]:
            choice["token_ids"] = list(response.ids)
        if "logprobs" in body:
            choice["logprobs"] = {"token_logprobs": response.policy_logps}
        return 200, {"choices": [choice]}

    def _generate_sglang(self, body: dict[str, Any]) -> tuple[int, Any]:
        settings = body["sampling_params"]
        if len(body["input_ids"]) + settings["max_new_tokens"] > 256:
            # a limit that does not fit is lowered, and nobody is told
            settings["max_new_tokens"] = 256 - len(body["input_ids"])
        # SGLang ignores all stop tokens with `ignore_eos`, and ends at those of its checkpoint without
        stops = [] if settings["ignore_eos"] else [*settings["stop_token_ids"], *self.own_eos]
        model = self.models[body.get("lora_path") or self.name]
        response = self._response(
            model, body["input_ids"], settings, settings["max_new_tokens"], settings["sampling_seed"], stops
        )
        ended = response.finish_reason == "eos"
        finish = {"type": "stop", "matched": response.ids[-1]} if ended else {"type": "length"}
        meta: dict[str, Any] = {"finish_reason": finish, "weight_version": self.version}
        if self.token_ids and body["return_logprob"]:
            pairs = zip(response.policy_logps or (), response.ids, strict=True)
            meta["output_token_logprobs"] = [[logp, token, None] for logp, token in pairs]
        # the text and the ids of a reply are without the token that ended it
        return 200, {
            "text": response.text,
            "output_ids": list(response.ids[: -1 if ended else None]),
            "meta_info": meta,
        }

    def _response(
        self, model: Any, prompt: list[int], settings: dict[str, Any], length: int, seed: int, stops: list[int]
    ) -> Response:
        """Sample with the built-in engine."""
        engine = DecodeEngine(
            model,
            None,
            self.tokenizer,
            beta=1.0,
            decoding=Decoding(max_new_tokens=length, top_p=settings["top_p"]),
            eos_ids=stops,
        )
        request = Request(Prompt(0, tuple(prompt), ""), Key((seed,)), temperature=settings["temperature"] or 1e-6)
        with torch.no_grad():
            (response,) = engine.generate([request])
        return response
