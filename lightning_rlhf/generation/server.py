"""An engine that generates by a server with OpenAI's completions protocol, such as ``vllm serve``.

Prompts go as token ids and responses come back as token ids (``return_token_ids``), so that no text is tokenized again.
The trainer writes weights to a folder that the server reads.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.generation.base import Decoding, Request
from lightning_rlhf.generation.engine import with_logps
from lightning_rlhf.generation.external import (
    AbstractExternalEngine,
    Completion,
    response_from_completion,
    served_temperature,
    weight_version,
)
from lightning_rlhf.models.options import GenerationServer
from lightning_rlhf.models.reference import AbstractReference
from lightning_rlhf.models.save import save_policy
from lightning_rlhf.randomness import Key


PROBE_TOKENS = 16
"""Length of the response by which the server's weights are compared with the policy."""

PROBE_TOLERANCE = 0.1
"""Mean difference of log-probabilities, nats per token, that other kernels and data types may cause."""

MAX_WAIT = 10.0
"""Longest wait before another attempt, seconds."""

_DEV_MODE = (
    "start vLLM 0.32 or newer with VLLM_SERVER_DEV_MODE=1, or train adapters (model.lora), which need no such mode"
)
_LORA_MODE = (
    "start vLLM with --enable-lora, --max-lora-rank at least model.lora.r and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
)


class GenerationServerError(RuntimeError):
    """The server cannot be used as it is set up; the message names the setting to change."""


@dataclass(frozen=True)
class ServerCompletion:
    """A response of a server.

    Args:
        token_ids: generated ids.
        finish_reason: ``stop`` or ``length``.
        logps: log-probability of each token by the server, at temperature 1, if they were asked for.
    """

    token_ids: tuple[int, ...]
    finish_reason: str | None
    logps: tuple[float, ...] = ()


class ServerEngine(AbstractExternalEngine):
    """Generates responses of the policy by a server; all processes of a run may share one.

    Before generation, the weights of the policy are compared with those of the server by their version, a checksum. If
    they differ, the first process writes them to ``server.folder``, and the server reads them. Adapters of one rank are
    loaded beside the server's base model, under a name with their version; they must have been trained on that base.
    Otherwise the server reloads all weights, with other adapters merged. A short response then shows whether the server
    has the policy: its log-probabilities there and here must agree.

    Args:
        policy: the policy.
        reference: the frozen reference, or None if no log-probabilities under it are needed.
        tokenizer: decodes the ids to text.
        beta: the DPO beta, > 0.
        decoding: length limit, temperature and top-p; ``rows`` has no effect, since the server forms its own batches.
        eos_ids: ids that end a response.
        server: address and settings of the server.
        tokens_per_batch: token positions per forward pass of scoring.

    Raises:
        GenerationServerError: if no server answers, or it does not have the model.
        ValueError: if the policy's rotary embedding depends on the length of a text.
    """

    NAME = "the server"

    def __init__(
        self,
        policy: PreTrainedModel,
        reference: AbstractReference | None,
        tokenizer: PreTrainedTokenizerBase,
        *,
        beta: float,
        decoding: Decoding,
        eos_ids: Collection[int],
        server: GenerationServer,
        tokens_per_batch: int = 4096,
    ) -> None:
        super().__init__(
            policy,
            reference,
            tokenizer,
            beta=beta,
            decoding=decoding,
            eos_ids=eos_ids,
            tokens_per_batch=tokens_per_batch,
        )
        self.server = server
        self._client = CompletionClient(server)
        self._check_model()
        # version of the weights that were compared with the policy
        self._checked: str | None = None
        # name of the adapter that this process loaded
        self._loaded: str | None = None

    def complete(self, requests: Sequence[Request]) -> Sequence[Completion]:
        """Generate by the server; see `AbstractExternalEngine.complete`.

        Raises:
            GenerationServerError: if the server fails, has other weights than the policy, or gives no token ids.
        """
        version = weight_version(self.policy)
        model = self._follow_policy(version)
        if version != self._checked:
            self._check_weights(model, requests[0], version)
            self._checked = version
        sent = [self._fields(request, model, version) for request in requests]
        # one request per response, since each has a seed of its own
        with ThreadPoolExecutor(min(self.server.concurrency, len(sent))) as pool:
            completions = list(pool.map(self._client.complete, sent))
        if self.adapted is None and self._server_version() != version:
            raise GenerationServerError(
                f"the weights of {self.server.base_url} changed while it generated: another run uses the server; give "
                f"each run a server of its own (model.options.server.base_url)"
            )
        return completions

    def _fields(self, request: Request, model: str, version: str) -> dict[str, object]:
        """The body of a request: sampling from the policy itself, whatever defaults the server has."""
        return {
            # the base model without the adapter is the reference
            "model": self.server.model if request.mix != 0 else model,
            "prompt": list(request.prompt.ids),
            "max_tokens": self.decoding.max_new_tokens,
            "temperature": served_temperature(request, self.decoding),
            "top_p": self.decoding.top_p,
            "seed": request.key.seed(),
            # servers take defaults of these from the checkpoint's generation config
            **{"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
            **{"presence_penalty": 0.0, "frequency_penalty": 0.0},
            "ignore_eos": True,
            "stop_token_ids": sorted(self.eos_ids),
            "return_token_ids": True,
            # cached keys and values of a prompt belong to one version of the weights
            "cache_salt": version,
        }

    # -- weights -------------------------------------------------------------------------------------------------------

    def _check_model(self) -> None:
        names = self._client.models()
        if self.server.model not in names:
            raise GenerationServerError(
                f"model.options.server.model is {self.server.model!r}, and {self.server.base_url} has "
                f"{', '.join(map(repr, names)) or 'no model'}: name one of them, or start the server with "
                f"--served-model-name {self.server.model}"
            )

    def _follow_policy(self, version: str) -> str:
        """Give the server the weights of the policy unless it has them; returns the name of the model to ask for."""
        folder = Path(self.server.folder).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        # the processes of a run have equal weights: the first one brings them, and the others find them
        adapted = self.adapted
        with FileLock(folder / ".lock"):
            if adapted is None:
                return self._push_weights(folder, version)
            return self._push_adapter(adapted, folder, version)

    def _push_adapter(self, adapted: PeftModel, folder: Path, version: str) -> str:
        name = f"policy-{version}"
        if name in self._client.models():
            return name
        # another name and path for each version: servers cache adapters and prompts by both
        # without a tokenizer: vLLM would take one of an adapter for another tokenizer than that of its base
        adapted.save_pretrained(str(folder / name), save_embedding_layers=False)
        self._client.post(
            "v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder / name)}, remedy=_LORA_MODE
        )
        if self._loaded is not None:
            self._client.post("v1/unload_lora_adapter", {"lora_name": self._loaded}, remedy=_LORA_MODE)
            shutil.rmtree(folder / self._loaded, ignore_errors=True)
        self._loaded, self._checked = name, None
        return name

    def _push_weights(self, folder: Path, version: str) -> str:
        if self._server_version() != version:
            path = folder / f"policy-{version}"
            save_policy(self.policy, self.tokenizer, path)
            reload = {"method": "reload_weights", "kwargs": {"weights_path": str(path)}}
            self._client.post("collective_rpc", reload, remedy=_DEV_MODE)
            self._client.post("update_weight_version", {"new_version": version}, remedy=_DEV_MODE)
            shutil.rmtree(path)
            self._checked = None
        return self.server.model

    def _server_version(self) -> str:
        return str(self._client.get("weight_info", remedy=_DEV_MODE).get("weight_version"))

    def _check_weights(self, model: str, request: Request, version: str) -> None:
        """Compare the server's log-probabilities of a short response with the policy's.

        Raises:
            GenerationServerError: if they differ by more than rounding: the server has another model.
        """
        probe = Request(request.prompt, Key((0,)), temperature=1.0)
        fields = self._fields(probe, model, version)
        # the most probable tokens of the policy itself, at temperature 1
        fields |= {"max_tokens": min(PROBE_TOKENS, self.decoding.max_new_tokens), "top_p": 1.0, "logprobs": 1}
        completion = self._client.complete(fields)
        response = response_from_completion(probe, completion, self.eos_ids, self.tokenizer, self.NAME)
        (scored,) = with_logps(self.policy, "policy_logps", [probe.prompt], [response], self.tokens_per_batch)
        assert scored.policy_logps is not None
        if len(completion.logps) != len(response.ids):
            raise GenerationServerError(
                f"{self.server.base_url} (model.options.server.base_url) gives no log-probabilities (logprobs=1), by "
                f"which its weights are compared with the policy: use vLLM"
            )
        pairs = zip(completion.logps, scored.policy_logps, strict=True)
        difference = sum(abs(there - here) for there, here in pairs) / len(response.ids)
        # not `>`: NaN must be refused too
        if not difference <= PROBE_TOLERANCE:
            raise GenerationServerError(
                f"{model!r} on {self.server.base_url} is not the policy: log-probabilities differ by {difference:.2g} "
                f"nats per token. Start the server with the checkpoint of model.policy, as "
                f"model.options.server.model={self.server.model}, and let model.options.server.folder be the same "
                f"folder for both"
            )


class CompletionClient:
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

    def complete(self, fields: Mapping[str, object]) -> ServerCompletion:
        """Generate one response.

        Raises:
            GenerationServerError: if the server refuses the request, does not answer, or gives no token ids.
        """
        body = self._call("POST", "v1/completions", fields, "check model.options.server and the server's log")
        choices = body.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        ids = choice.get("token_ids") if isinstance(choice, dict) else None
        if not isinstance(choice, dict) or not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise GenerationServerError(
                f"{self.server.base_url} (model.options.server.base_url) returns no token ids (return_token_ids), and "
                f"text that is tokenized again is another response: use vLLM or SGLang; llama.cpp cannot"
            )
        listed = choice.get("logprobs")
        logps = listed.get("token_logprobs") if isinstance(listed, dict) else None
        numbers = [float(value) for value in logps if isinstance(value, int | float)] if isinstance(logps, list) else []
        reason = choice.get("finish_reason")
        return ServerCompletion(tuple(ids), None if reason is None else str(reason), tuple(numbers))

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
