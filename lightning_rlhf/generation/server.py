"""An engine that generates by a server, such as ``vllm serve`` or SGLang.

Prompts go as token ids and responses come back as token ids, so that no text is tokenized again. The trainer writes
weights to a folder that the server reads.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
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
from lightning_rlhf.generation.server_client import GenerationServerError, ServerClient
from lightning_rlhf.generation.server_protocols import PROTOCOLS, ServerRequest
from lightning_rlhf.models.options import GenerationServer
from lightning_rlhf.models.reference import AbstractReference
from lightning_rlhf.models.save import save_policy
from lightning_rlhf.randomness import Key


PROBE_TOKENS = 16
"""Length of the response by which the server's weights are compared with the policy."""

PROBE_TOLERANCE = 0.1
"""Mean difference of log-probabilities, nats per token, that other kernels and data types may cause."""


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
        self._client = ServerClient(server)
        self._protocol = PROTOCOLS[server.engine](self._client)
        self._protocol.check_model()
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
        adapter = self._follow_policy(version)
        if version != self._checked:
            self._check_weights(requests[0], adapter, version)
            self._checked = version
        sent = [self._sent(request, adapter, version) for request in requests]
        # one request per response, since each has a seed of its own
        with ThreadPoolExecutor(min(self.server.concurrency, len(sent))) as pool:
            completions = list(pool.map(self._protocol.complete, sent))
        if self.adapted is None and self._protocol.weight_version() != version:
            raise GenerationServerError(
                f"the weights of {self.server.base_url} changed while it generated: another run uses the server; give "
                f"each run a server of its own (model.options.server.base_url)"
            )
        return completions

    def _sent(self, request: Request, adapter: str | None, version: str) -> ServerRequest:
        """The request for a sample of the policy itself, whatever sampling defaults the server has."""
        return ServerRequest(
            prompt=tuple(request.prompt.ids),
            max_tokens=self.decoding.max_new_tokens,
            temperature=served_temperature(request, self.decoding),
            top_p=self.decoding.top_p,
            seed=request.key.seed(),
            stop_ids=tuple(sorted(self.eos_ids)),
            # the base model without the adapter is the reference
            adapter=None if request.mix != 0 else adapter,
            version=version,
        )

    # -- weights -------------------------------------------------------------------------------------------------------

    def _follow_policy(self, version: str) -> str | None:
        """Give the server the weights of the policy unless it has them; returns the name of the adapter, if any."""
        folder = Path(self.server.folder).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        # the processes of a run have equal weights: the first one brings them, and the others find them
        adapted = self.adapted
        with FileLock(folder / ".lock"):
            if adapted is None:
                self._push_weights(folder, version)
                return None
            return self._push_adapter(adapted, folder, version)

    def _push_adapter(self, adapted: PeftModel, folder: Path, version: str) -> str:
        name = f"policy-{version}"
        if name in self._client.models():
            return name
        # another name and path for each version: servers cache adapters and prompts by both
        # without a tokenizer: vLLM would take one of an adapter for another tokenizer than that of its base
        adapted.save_pretrained(str(folder / name), save_embedding_layers=False)
        try:
            self._protocol.load_adapter(name, folder / name)
        except GenerationServerError:
            # the reply to an earlier attempt may be lost, and a server refuses to load a name twice
            if name not in self._client.models():
                raise
        if self._loaded is not None:
            self._protocol.unload_adapter(self._loaded)
            shutil.rmtree(folder / self._loaded, ignore_errors=True)
        self._loaded, self._checked = name, None
        return name

    def _push_weights(self, folder: Path, version: str) -> None:
        if self._protocol.weight_version() != version:
            path = folder / f"policy-{version}"
            save_policy(self.policy, self.tokenizer, path)
            self._protocol.load_weights(path, version)
            shutil.rmtree(path)
            self._checked = None

    def _check_weights(self, request: Request, adapter: str | None, version: str) -> None:
        """Compare the server's log-probabilities of a short response with the policy's.

        Raises:
            GenerationServerError: if they differ by more than rounding: the server has another model.
        """
        probe = Request(request.prompt, Key((0,)), temperature=1.0)
        sent = self._sent(probe, adapter, version)
        # of the policy itself, at temperature 1
        sent = replace(sent, max_tokens=min(PROBE_TOKENS, self.decoding.max_new_tokens), top_p=1.0)
        completion = self._protocol.complete(sent, logps=True)
        response = response_from_completion(probe, completion, self.eos_ids, self.tokenizer, self.NAME)
        (scored,) = with_logps(self.policy, "policy_logps", [probe.prompt], [response], self.tokens_per_batch)
        assert scored.policy_logps is not None
        if len(completion.logps) != len(response.ids):
            raise GenerationServerError(
                f"{self.server.base_url} (model.options.server.base_url) gives no log-probabilities, by which its "
                f"weights are compared with the policy: use vLLM or SGLang"
            )
        pairs = zip(completion.logps, scored.policy_logps, strict=True)
        difference = sum(abs(there - here) for there, here in pairs) / len(response.ids)
        # not `>`: NaN must be refused too
        if not difference <= PROBE_TOLERANCE:
            raise GenerationServerError(
                f"{adapter or self.server.model!r} on {self.server.base_url} is not the policy: log-probabilities "
                f"differ by {difference:.2g} nats per token. Start the server with the checkpoint of model.policy, "
                f"under the name of model.options.server.model ({self.server.model}), and let "
                f"model.options.server.folder be the same folder for both"
            )
