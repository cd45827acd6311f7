"""HTTP calls to a server that decodes for the policy, with retries where another attempt may help."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping

from lightning_rlhf.models.options import GenerationServer


MAX_WAIT = 10.0
"""Longest wait before another attempt, seconds."""


class GenerationServerError(RuntimeError):
    """The server cannot be used as it is set up; the message names the setting to change."""


class ServerClient:
    """Calls the routes of a server, with retries where another attempt may help.

    Args:
        server: address and settings of the server.

    Raises:
        GenerationServerError: if the variable of the key is not set.
    """

    def __init__(self, server: GenerationServer) -> None:
        self.server = server
        self._root = server.base_url.rstrip("/").removesuffix("/v1")
        if server.api_key_env is not None and not os.environ.get(server.api_key_env, "").strip():
            raise GenerationServerError(
                "the environment variable that model.options.server.api_key_env names is not set: export it"
            )

    def models(self) -> list[str]:
        """Names of the models and adapters that the server has."""
        cards = self.get("v1/models", remedy="check model.options.server.base_url").get("data")
        return [str(card.get("id")) for card in cards if isinstance(card, dict)] if isinstance(cards, list) else []

    def get(self, route: str, *, remedy: str) -> dict[str, object]:
        """Read a route.

        Args:
            route: path behind the address without ``/v1``.
            remedy: the way out, for the message of an error.
        """
        return self._call("GET", route, None, remedy)

    def post(self, route: str, fields: Mapping[str, object], *, remedy: str) -> dict[str, object]:
        """Send a JSON object to a route; see `get`."""
        return self._call("POST", route, fields, remedy)

    def _call(self, method: str, route: str, fields: Mapping[str, object] | None, remedy: str) -> dict[str, object]:
        """Call a route, again where the failure may be transient; returns its JSON object, empty if it sends none.

        Raises:
            GenerationServerError: if the last attempt failed.
        """
        key = os.environ.get(self.server.api_key_env, "").strip() if self.server.api_key_env is not None else ""
        request = urllib.request.Request(
            f"{self._root}/{route}",
            data=None if fields is None else json.dumps(fields).encode(),
            headers={"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})},
            method=method,
        )
        attempt = 0
        while True:
            try:
                with urllib.request.urlopen(request, timeout=self.server.timeout) as reply:
                    return _object(reply.read())
            except urllib.error.HTTPError as error:
                fault = f"{method} /{route} gives HTTP {error.code}: {_message(error.read())}; {remedy}"
                # transient by the meaning of the status; 500 is an error of the server that would come again
                again = error.code in (408, 425, 429, 502, 503, 504)
            except (OSError, http.client.HTTPException) as error:
                # URLError is an OSError, and so is a timeout
                fault = (
                    f"no answer to {method} /{route} ({error}): start the server, or correct "
                    f"model.options.server.base_url"
                )
                again = True
            if not again or attempt == self.server.retries:
                raise GenerationServerError(f"{self.server.base_url}: {fault}")
            time.sleep(min(0.5 * 2.0**attempt, MAX_WAIT))
            attempt += 1


def _object(content: bytes) -> dict[str, object]:
    """The JSON object of a reply; empty for anything else, as vLLM answers some routes with a sentence."""
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _message(content: bytes) -> str:
    """The message of an error, shortened."""
    error = _object(content).get("error")
    found = error.get("message") if isinstance(error, dict) else error
    return str(found or content.decode("utf-8", "replace"))[:500]
