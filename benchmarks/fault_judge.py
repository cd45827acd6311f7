"""A judge that fails in every way that passes: the server of `benchmarks.fault_drill`; no package but Python's own.

``python fault_judge.py PORT LOG SEED``
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import socket
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


def verdict(body: bytes) -> bytes:
    """The reply to a request, which the request alone decides."""
    share = int.from_bytes(hashlib.sha256(body).digest()[:4], "big") / 2**32
    first = 0.05 + 0.9 * share
    tokens = [{"token": "1", "logprob": math.log(first)}, {"token": "2", "logprob": math.log(1 - first)}]
    place = {**tokens[0], "top_logprobs": tokens}
    choice = {
        "message": {"role": "assistant", "content": "1"},
        "finish_reason": "stop",
        "logprobs": {"content": [place]},
    }
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 1}}).encode()


def serve(port: int, log: Path, seed: int) -> None:
    """Answer on a port until killed; every reply that is sent whole is a line of the log.

    Says the port when it listens; 0 takes one that is free.
    """
    luck, lock, asked = random.Random(seed), threading.Lock(), Counter[str]()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            name = hashlib.sha256(body).hexdigest()
            with lock:
                asked[name] += 1
                # two faults in a row at most: the labeler asks more often than that
                fault = luck.random() if asked[name] % 3 else 1.0
                delay = luck.uniform(0, 0.15)
            time.sleep(delay)
            if fault < 0.08:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)  # closing alone waits for the streams over it
                return
            code, reply = 200, verdict(body)
            if fault < 0.16:
                code, reply = 500, b"{}"
            elif fault < 0.24:
                code, reply = 429, b"{}"
            elif fault < 0.32:
                reply = reply[: len(reply) // 2]
            elif fault < 0.36:
                reply = b"<html>busy</html>"
            else:
                with lock, log.open("a") as file:
                    print(name, file=file, flush=True)
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: Any) -> None:
            return

    class Server(ThreadingHTTPServer):
        allow_reuse_address = True

        def handle_error(self, *_: Any) -> None:
            return  # clients die here

    server = Server(("127.0.0.1", port), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    serve(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
