"""The protocols of servers that decode for the policy: ``vllm serve`` and SGLang.

Both take prompts as token ids and give token ids back, so that no text is tokenized again, and both read new weights
from a folder. Routes and fields differ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lightning_rlhf.generation.server_client import GenerationServerError, ServerClient


@dataclass(frozen=True)
class ServerRequest:
    """One response to ask a server for.

    Args:
        prompt: token ids of the prompt.
        max_tokens: most tokens of the response.
        temperature: sampling temperature; 0 takes the most probable token.
        top_p: probability mass of the tokens that are sampled from.
        seed: seed of the response, 63 bits.
        stop_ids: ids that end the response.
        adapter: name of a loaded adapter; None asks the base model.
        version: version of the weights, for caches of the server.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop_ids: tuple[int, ...]
    adapter: str | None
    version: str


@dataclass(frozen=True)
class ServerCompletion:
    """A response of a server.

    Args:
        token_ids: generated ids, with the id that ended them.
        finish_reason: ``stop`` or ``length``.
        logps: log-probability of each token by the server, at temperature 1, if they were asked for.
    """

    token_ids: tuple[int, ...]
    finish_reason: str | None
    logps: tuple[float, ...] = ()


class AbstractServerProtocol(ABC):
    """Routes and fields of one kind of server.

    Args:
        client: calls the server.
    """

    def __init__(self, client: ServerClient) -> None:
        self.client = client

    @abstractmethod
    def check_model(self) -> None:
        """Check that the server answers and has the base model.

        Raises:
            GenerationServerError: if it does not.
        """

    @abstractmethod
    def complete(self, request: ServerRequest, *, logps: bool = False) -> ServerCompletion:
        """Generate one response.

        Args:
            request: what to generate.
            logps: also return log-probabilities.

        Raises:
            GenerationServerError: if the server refuses the request, does not answer, or gives no token ids.
        """

    @abstractmethod
    def load_adapter(self, name: str, path: Path) -> None:
        """Load a LoRA adapter from a folder beside the base model."""

    @abstractmethod
    def unload_adapter(self, name: str) -> None:
        """Forget an adapter."""

    @abstractmethod
    def load_weights(self, path: Path, version: str) -> None:
        """Replace the weights of the base model by those of a folder, and remember their version."""

    @abstractmethod
    def weight_version(self) -> str:
        """The version of the base model's weights; another text before the first `load_weights`."""


class VLLMProtocol(AbstractServerProtocol):
    """``vllm serve``: OpenAI's completions with token ids, and the routes of its development mode for weights."""

    DEV_MODE = (
        "start vLLM 0.32 or newer with VLLM_SERVER_DEV_MODE=1, or train adapters (model.lora), which need no such mode"
    )
    LORA_MODE = (
        "start vLLM with --enable-lora, --max-lora-rank at least model.lora.r and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
    )

    def check_model(self) -> None:
        """Look for the name of the base model; see `AbstractServerProtocol.check_model`."""
        server, names = self.client.server, self.client.models()
        if server.model not in names:
            raise GenerationServerError(
                f"model.options.server.model is {server.model!r}, and {server.base_url} has "
                f"{', '.join(map(repr, names)) or 'no model'}: name one of them, or start the server with "
                f"--served-model-name {server.model}"
            )

    def complete(self, request: ServerRequest, *, logps: bool = False) -> ServerCompletion:
        """Generate one response; see `AbstractServerProtocol.complete`."""
        fields: dict[str, object] = {
            "model": request.adapter or self.client.server.model,
            "prompt": list(request.prompt),
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
            # vLLM takes defaults of these from the checkpoint's generation config
            **{"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
            **{"presence_penalty": 0.0, "frequency_penalty": 0.0},
            "ignore_eos": True,
            "stop_token_ids": list(request.stop_ids),
            "return_token_ids": True,
            # cached keys and values of a prompt belong to one version of the weights
            "cache_salt": request.version,
            **({"logprobs": 1} if logps else {}),
        }
        body = self.client.post("v1/completions", fields, remedy="check model.options.server and the server's log")
        choices = body.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        ids = choice.get("token_ids") if isinstance(choice, dict) else None
        if not isinstance(choice, dict) or not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise GenerationServerError(
                f"{self.client.server.base_url} (model.options.server.base_url) returns no token ids "
                f"(return_token_ids), and text that is tokenized again is another response: use vLLM, or SGLang with "
                f"model.options.server.engine=sglang; llama.cpp cannot"
            )
        listed = choice.get("logprobs")
        found = listed.get("token_logprobs") if isinstance(listed, dict) else None
        numbers = [float(value) for value in found if isinstance(value, int | float)] if isinstance(found, list) else []
        reason = choice.get("finish_reason")
        return ServerCompletion(tuple(ids), None if reason is None else str(reason), tuple(numbers))

    def load_adapter(self, name: str, path: Path) -> None:
        """Load an adapter by ``/v1/load_lora_adapter``."""
        fields = {"lora_name": name, "lora_path": str(path)}
        self.client.post("v1/load_lora_adapter", fields, remedy=self.LORA_MODE)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter by ``/v1/unload_lora_adapter``."""
        self.client.post("v1/unload_lora_adapter", {"lora_name": name}, remedy=self.LORA_MODE)

    def load_weights(self, path: Path, version: str) -> None:
        """Reload all weights on the workers, then store the version."""
        reload = {"method": "reload_weights", "kwargs": {"weights_path": str(path)}}
        self.client.post("collective_rpc", reload, remedy=self.DEV_MODE)
        self.client.post("update_weight_version", {"new_version": version}, remedy=self.DEV_MODE)

    def weight_version(self) -> str:
        """The version by ``/weight_info``."""
        return str(self.client.get("weight_info", remedy=self.DEV_MODE).get("weight_version"))


class SGLangProtocol(AbstractServerProtocol):
    """SGLang: its own ``/generate``, ``/update_weights_from_disk`` and adapter routes.

    SGLang uses the seed of a request only if it was started with ``--enable-deterministic-inference``.
    """

    NEWER = "use an SGLang whose /model_info has a weight_version"
    LORA_MODE = (
        "start SGLang with --enable-lora, --max-lora-rank at least model.lora.r and --lora-target-modules of the "
        "adapter"
    )

    def check_model(self) -> None:
        """Check that the server answers; it has one base model, which new weights rename."""
        self.weight_version()

    def complete(self, request: ServerRequest, *, logps: bool = False) -> ServerCompletion:
        """Generate one response; see `AbstractServerProtocol.complete`."""
        sampling = {
            "max_new_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            # some versions keep seeds in 32 bits
            "sampling_seed": request.seed & 0x7FFFFFFF,
            # a server may have been started with other defaults (--preferred-sampling-params)
            **{"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
            **{"presence_penalty": 0.0, "frequency_penalty": 0.0},
            # `ignore_eos` would switch off `stop_token_ids`, too
            **{"ignore_eos": False, "min_new_tokens": 0, "stop": None},
            "stop_token_ids": list(request.stop_ids),
        }
        fields: dict[str, object] = {
            "input_ids": list(request.prompt),
            "sampling_params": sampling,
            # the ids come with their log-probabilities; the text of a response has no EOS
            "return_logprob": True,
        }
        if request.adapter is not None:
            fields["lora_path"] = request.adapter
        body = self.client.post("generate", fields, remedy="check model.options.server and the server's log")
        meta = body.get("meta_info")
        meta = meta if isinstance(meta, dict) else {}
        finish = meta.get("finish_reason")
        finish = finish if isinstance(finish, dict) else {}
        reason = finish.get("type")
        if reason == "abort":
            raise GenerationServerError(
                f"{self.client.server.base_url}: SGLang aborted a request: {finish.get('message')}; "
                f"check model.options.server and the server's log"
            )
        pairs = meta.get("output_token_logprobs")
        if not isinstance(pairs, list) or not all(_is_scored_id(pair) for pair in pairs):
            raise GenerationServerError(
                f"{self.client.server.base_url} (model.options.server.base_url) answers /generate without "
                f"output_token_logprobs, as no SGLang does: set model.options.server.engine to the server's kind"
            )
        ids = tuple(pair[1] for pair in pairs)
        if reason == "stop" and (not ids or ids[-1] not in request.stop_ids):
            raise GenerationServerError(
                f"{self.client.server.base_url}: SGLang ended a response at {finish.get('matched')!r}, which is no "
                f"EOS id of the policy ({', '.join(map(str, request.stop_ids))}): give the folder that it was started "
                f"with the EOS ids of the policy (eos_token_id in config.json and generation_config.json, eos_token of "
                f"the tokenizer)"
            )
        if reason == "length" and len(ids) < request.max_tokens:
            # SGLang lowers the limit of a request that does not fit
            raise GenerationServerError(
                f"{self.client.server.base_url}: SGLang cut a response after {len(ids)} of "
                f"{request.max_tokens} tokens (data.decoding.max_new_tokens), after a prompt of {len(request.prompt)}: "
                f"raise its --context-length or --mem-fraction-static, or lower data.prompts.max_prompt_tokens"
            )
        scores = tuple(float(pair[0]) for pair in pairs) if logps else ()
        return ServerCompletion(ids, None if reason is None else str(reason), scores)

    def load_adapter(self, name: str, path: Path) -> None:
        """Load an adapter by ``/load_lora_adapter``."""
        self._change("load_lora_adapter", {"lora_name": name, "lora_path": str(path)}, self.LORA_MODE)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter by ``/unload_lora_adapter``."""
        self._change("unload_lora_adapter", {"lora_name": name}, self.LORA_MODE)

    def load_weights(self, path: Path, version: str) -> None:
        """Read all weights and store their version by ``/update_weights_from_disk``, which also flushes the cache."""
        fields = {"model_path": str(path), "weight_version": version}
        self._change("update_weights_from_disk", fields, "see the server's log")

    def weight_version(self) -> str:
        """The version by ``/model_info``."""
        found = self.client.get("model_info", remedy=self.NEWER).get("weight_version")
        if found is None:
            raise GenerationServerError(
                f"{self.client.server.base_url}: /model_info has no weight_version, by which another run on the server "
                f"is noticed; {self.NEWER}"
            )
        return str(found)

    def _change(self, route: str, fields: Mapping[str, object], remedy: str) -> None:
        """Call a route that reports ``success``."""
        answer = self.client.post(route, fields, remedy=remedy)
        if answer.get("success") is not True:
            fault = answer.get("error_message") or answer.get("message") or answer
            raise GenerationServerError(f"{self.client.server.base_url}: /{route} failed: {fault}; {remedy}")


def _is_scored_id(pair: object) -> bool:
    """Whether this is a log-probability with a token id, as SGLang lists them."""
    return isinstance(pair, list) and len(pair) >= 2 and isinstance(pair[0], int | float) and type(pair[1]) is int


PROTOCOLS: Mapping[str, type[AbstractServerProtocol]] = {"vllm": VLLMProtocol, "sglang": SGLangProtocol}
"""Protocols by `GenerationServer.engine`."""
