"""A client of the annotation server, with the standard library only: for trainers and for the command line."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from http.client import HTTPException
from typing import cast
from urllib.parse import quote, urlsplit

from lightning_rlhf.annotation.queues import Item, QueueOptions, Result
from lightning_rlhf.annotation.votes import JSON, vote_of


class NoServerError(ConnectionError):
    """No answer: the server is down or starting, and asking again may help."""


class RefusedError(RuntimeError):
    """The server refused a request, and asking again will not help.

    Args:
        status: of HTTP.
        text: why.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class Client:
    """Talks to one server.

    Args:
        url: its address, e.g. ``http://127.0.0.1:8765``.
        token: of a trainer, or of an admin.
        timeout: seconds to wait for an answer, besides a wait that is asked for.

    Raises:
        ValueError: if the address is none.
    """

    url: str
    token: str
    timeout: float = 30.0

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).netloc:
            raise ValueError(f"base_url must be http://host:port or https://name; got {self.url!r}")

    def push(self, queue: str, items: Sequence[Item], options: QueueOptions | None = None) -> int:
        """As `Queues.push`; returns how many pairs are new."""
        row: JSON = {"items": [asdict(item) for item in items]}
        if options is not None:
            row["settings"] = asdict(options)
        return int(cast(int, self.post(f"/api/v1/queues/{quote(queue, safe='')}/items", row)["added"]))

    def results(self, queue: str, after: int = 0, wait: int = 25) -> tuple[int, list[Result]]:
        """As `Queues.results`; waits up to ``wait`` seconds for a first one."""
        path = f"/api/v1/queues/{quote(queue, safe='')}/verdicts?after={after}&wait={wait}"
        row = json.loads(self.text(path, extra=wait))
        results = [
            Result(entry["key"], entry["state"], tuple(vote_of(vote) for vote in entry["votes"]))
            for entry in row["verdicts"]
        ]
        return int(row["cursor"]), results

    def withdraw(self, queue: str, keys: Sequence[str]) -> int:
        """As `Queues.withdraw`."""
        row = self.post(f"/api/v1/queues/{quote(queue, safe='')}/withdraw", {"keys": list(keys)})
        return int(cast(int, row["withdrawn"]))

    def progress(self, queue: str) -> JSON:
        """As `Queues.progress`."""
        return self.get(f"/api/v1/queues/{quote(queue, safe='')}/progress")

    def get(self, path: str) -> JSON:
        """The object of JSON at a path."""
        return cast(JSON, json.loads(self.text(path)))

    def post(self, path: str, row: JSON) -> JSON:
        """Send an object of JSON and return the answer."""
        return cast(JSON, json.loads(self.text(path, json.dumps(row).encode())))

    def text(self, path: str, data: bytes | None = None, extra: float = 0.0) -> str:
        """The answer to a request as text.

        Raises:
            NoServerError: if there is no answer.
            RefusedError: if the server refuses.
        """
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.url.rstrip("/") + path, data, headers)
        # no proxy: it would see the token, and this machine's own address is not known to it
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=self.timeout + extra) as reply:
                return str(reply.read().decode())
        except urllib.error.HTTPError as error:
            text = _reason(error)
            # a server that is overloaded or ends will answer again
            if error.code >= 500 or error.code == 429:
                raise NoServerError(f"{self.url} answers {error.code}: {text}") from error
            raise RefusedError(error.code, text) from error
        except (OSError, HTTPException) as error:
            raise NoServerError(f"{self.url} does not answer ({error})") from error


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["error"])
    except (OSError, HTTPException, ValueError, KeyError, TypeError):
        return error.reason
