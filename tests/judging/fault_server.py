"""A chat-completions endpoint on loopback that answers, or fails, as a test tells it; real sockets, no model.

As a judge it likes the candidate that says "good": P("1") is 0.8 where that is the first, 0.1 where it is the second.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any


@dataclass
class Raw:
    """What goes over the wire.

    Args:
        body: of the reply; an object becomes JSON.
        code: HTTP status.
        headers: further headers.
        delay: seconds before it is sent.
        hang_up: close the connection without a word.
    """

    body: Any = ""
    code: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    hang_up: bool = False


def completion(content: str = "1", listed: dict[str, float] | None = None, **message: Any) -> dict[str, Any]:
    """A chat completion of one token, with the probabilities that are listed; without log-probabilities if None."""
    logprobs = None
    if listed is not None:
        tokens = [
            {"token": token, "logprob": math.log(p), "bytes": list(token.encode())} for token, p in listed.items()
        ]
        logprobs = {"content": [{**tokens[0], "top_logprobs": tokens}]}
    choice = {"message": {"role": "assistant", "content": content, **message}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1000, "completion_tokens": 10}
    return {"choices": [{**choice, "logprobs": logprobs}], "usage": usage}


def judge(request: dict[str, Any]) -> dict[str, Any]:
    """What a judge without faults says: a rationale where no log-probabilities are asked for, a label otherwise."""
    text = request["messages"][0]["content"]
    if "logprobs" not in request:
        return completion(f"thought {request.get('seed', '')}")
    first = text.partition("Response 2 -")[0]
    one = 0.8 if "good" in first.rpartition("Response 1 -")[2] else 0.1
    return completion("1", {"1": one, "2": 0.9 - one, "x": 0.1})


class FaultServer:
    """The endpoint, for as long as the ``with`` block lasts.

    Args:
        answer: gives the reply to a request, which is the number of times that it came before, and its JSON.
    """

    def __init__(self, answer: Callable[[int, dict[str, Any]], Raw | dict[str, Any]] | None = None) -> None:
        self.answer = answer or (lambda _, request: judge(request))
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.in_flight = self.most_in_flight = 0
        self._lock = threading.Lock()
        self._done = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer._serve(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> FaultServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._http.shutdown()
        self._http.server_close()

    def counts(self) -> dict[str, int]:
        """How often each request came, by its JSON."""
        with self._lock:
            names = [json.dumps(request, sort_keys=True) for request in self.requests]
        return {name: names.count(name) for name in names}

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            before = self.requests.count(request)
            self.requests.append(request)
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
            self.times.append(time.monotonic())
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        raw = self.answer(before, request)
        raw = raw if isinstance(raw, Raw) else Raw(raw)
        self._done.wait(raw.delay)
        with self._lock:
            self.in_flight -= 1
        if raw.hang_up or self._done.is_set():
            handler.close_connection = True
            return
        body = raw.body if isinstance(raw.body, str) else json.dumps(raw.body)
        try:
            handler.send_response(raw.code)
            for name, value in {"Content-Type": "application/json", **raw.headers}.items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(body.encode())))
            handler.end_headers()
            handler.wfile.write(body.encode())
        except (BrokenPipeError, ConnectionResetError):
            handler.close_connection = True
