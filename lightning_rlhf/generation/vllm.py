"""An engine that generates with vLLM, for samplers that use the policy alone; extra ``vllm``.

It replaces `DecodeEngine` for vanilla and best-of-N pairs on one GPU. vLLM generates the ids. Log-probabilities are
computed by the local policy with teacher forcing: those of vLLM come from other kernels, may have another data type,
and are of tempered logits at temperatures other than 1.

Written against the documented interface of vLLM; not tested on a GPU.
"""

from __future__ import annotations

import importlib
import shutil
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.generation.base import AbstractEngine, Decoding, Request
from lightning_rlhf.generation.engine import with_logps
from lightning_rlhf.generation.text import sampled_text
from lightning_rlhf.logprobs.compute import base_model
from lightning_rlhf.models.reference import AbstractReference
from lightning_rlhf.models.rotary import rotary_window
from lightning_rlhf.models.save import save_policy
from lightning_rlhf.runtime import distributed
from lightning_rlhf.types import FinishReason, Prompt, Response


class Completion(Protocol):
    """The used part of ``vllm.CompletionOutput``."""

    token_ids: Sequence[int]
    finish_reason: str | None


class RequestOutput(Protocol):
    """The used part of ``vllm.RequestOutput``."""

    outputs: Sequence[Completion]


class LLM(Protocol):
    """The used part of ``vllm.LLM``."""

    def generate(
        self, prompts: list[dict[str, list[int]]], sampling_params: list[object], *, use_tqdm: bool
    ) -> list[RequestOutput]:
        """Generate one completion per prompt, in order."""

    def collective_rpc(self, method: str, *, kwargs: dict[str, str]) -> object:
        """Call a method of all workers."""

    def reset_prefix_cache(self) -> object:
        """Forget the keys and values of earlier prompts."""


class VLLMEngine(AbstractEngine):
    """Generates responses of the policy with vLLM.

    Use one engine for a run, since starting vLLM takes a minute. Before generation, it compares the weights of the
    policy with those that vLLM has. If they have changed, it saves them to a temporary folder, with adapters merged,
    and vLLM reloads them. Equal keys give equal responses as far as the kernels of vLLM are deterministic. Unlike with
    `DecodeEngine`, a response may depend on the rest of the batch.

    Args:
        policy: the policy.
        reference: the frozen reference, or None if no log-probabilities under it are needed.
        tokenizer: decodes the ids to text.
        beta: the DPO beta, > 0.
        decoding: length limit, temperature and top-p; ``rows`` has no effect, since vLLM forms its own batches.
        eos_ids: ids that end a response.
        tokens_per_batch: token positions per forward pass of scoring.
        gpu_share: fraction of the GPU's memory for vLLM, in (0, 1]; the rest is for training.

    Raises:
        ImportError: if vLLM is not installed.
        ValueError: if there is more than one process.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        reference: AbstractReference | None,
        tokenizer: PreTrainedTokenizerBase,
        *,
        beta: float,
        decoding: Decoding,
        eos_ids: Collection[int],
        tokens_per_batch: int = 4096,
        gpu_share: float = 0.3,
    ) -> None:
        if distributed.world_size() > 1:
            raise ValueError("VLLMEngine serves one process; use the built-in DecodeEngine with several")
        window = rotary_window(base_model(policy))
        if window is not None:
            raise ValueError(
                f"{type(base_model(policy)).__name__} turns texts beyond {window} tokens otherwise than shorter ones, "
                f"and vLLM decides by the longest that it allows; use the built-in DecodeEngine "
                f"(model.options.use_vllm=false)"
            )
        self._vllm = _import_vllm()
        self.policy, self.reference, self.tokenizer = policy, reference, tokenizer
        self.beta, self.decoding, self.eos_ids = beta, decoding, frozenset(eos_ids)
        self.tokens_per_batch, self.gpu_share = tokens_per_batch, gpu_share
        self.on_tokens: Callable[[int], None] | None = None
        """Called with the number of generated tokens, once per `generate`."""
        self._llm: LLM | None = None
        # `weight_sums` of the weights that vLLM has
        self._pushed: Tensor | None = None
        # held by the engine: the folder is deleted when this object is collected
        self._folder = tempfile.TemporaryDirectory(prefix="lightning_rlhf_vllm_")
        self._num_pushed = 0

    def generate(self, requests: Sequence[Request], *, reference_logps: bool = False) -> list[Response]:
        """Generate one response per request, in order; see `AbstractEngine.generate`.

        Raises:
            ValueError: if a request mixes in the reference, a prompt is empty, or the reference is missing.
            RuntimeError: if vLLM returns an incomplete response.
        """
        check_requests(requests)
        if reference_logps and self.reference is None:
            raise ValueError("reference_logps need a reference model, and the engine was built without one")
        if not requests:
            return []
        llm = self._follow_policy()
        prompts = [request.prompt for request in requests]
        settings = [sampling_settings(request, self.decoding, self.eos_ids) for request in requests]
        outputs = llm.generate(
            [{"prompt_token_ids": list(prompt.ids)} for prompt in prompts],
            [self._vllm.SamplingParams(**each) for each in settings],
            use_tqdm=False,
        )
        responses = [
            response_from_completion(request, output.outputs[0], self.eos_ids, self.tokenizer)
            for request, output in zip(requests, outputs, strict=True)
        ]
        if self.on_tokens is not None:
            self.on_tokens(sum(len(response.ids) for response in responses))
        responses = with_logps(self.policy, "policy_logps", prompts, responses, self.tokens_per_batch)
        return self.with_reference_logps(prompts, responses) if reference_logps else responses

    def with_reference_logps(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[Response]:
        """Add reference log-probabilities to the responses that have none."""
        assert self.reference is not None
        with self.reference.active() as model:
            return with_logps(model, "reference_logps", prompts, responses, self.tokens_per_batch)

    def _follow_policy(self) -> LLM:
        """Start vLLM, or reload the weights of the policy if they have changed."""
        state = weight_sums(self.policy)
        if self._llm is not None and self._pushed is not None and torch.equal(state, self._pushed):
            return self._llm
        # a new folder each time: vLLM was observed to reuse weights of a path that it had read before (#32718)
        folder = Path(self._folder.name) / f"policy-{self._num_pushed}"
        save_policy(self.policy, self.tokenizer, folder)
        if self._llm is None:
            # vLLM takes the name of the data type, "bfloat16" for torch.bfloat16
            dtype = str(self.policy.dtype).removeprefix("torch.")
            self._llm = self._vllm.LLM(model=str(folder), dtype=dtype, gpu_memory_utilization=self.gpu_share)
        else:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
            # cached keys and values of prompts belong to the old weights
            self._llm.reset_prefix_cache()
            shutil.rmtree(folder)  # the first folder stays, since vLLM was started from it
        self._num_pushed += 1
        self._pushed = state
        return self._llm


def check_requests(requests: Sequence[Request]) -> None:
    """Check that vLLM can generate all requests.

    Raises:
        ValueError: if a request mixes in the reference, or a prompt is empty.
    """
    for request in requests:
        if request.mix != 0:
            raise ValueError(
                f"vLLM decodes one model, and the request for prompt {request.prompt.index} mixes policy and reference "
                f"(mix {request.mix:g}): use VanillaSampler or BestOfNSampler, or the built-in DecodeEngine"
            )
        if not request.prompt.ids:
            raise ValueError(f"prompt {request.prompt.index} has no tokens; give the tokenizer a BOS token")


def sampling_settings(request: Request, decoding: Decoding, eos_ids: Collection[int]) -> dict[str, object]:
    """Arguments of ``vllm.SamplingParams`` for a request; the seed is derived from its key."""
    return {
        "max_tokens": decoding.max_new_tokens,
        "temperature": decoding.temperature if request.temperature is None else request.temperature,
        "top_p": decoding.top_p,
        "seed": request.key.seed(),
        # stop at these EOS ids only, not at those that vLLM reads from the checkpoint
        "ignore_eos": True,
        "stop_token_ids": sorted(eos_ids),
        # `sampled_text` makes the text from the ids
        "detokenize": False,
    }


def response_from_completion(
    request: Request, completion: Completion, eos_ids: Collection[int], tokenizer: PreTrainedTokenizerBase
) -> Response:
    """Convert a ``vllm.CompletionOutput`` to a response.

    Raises:
        RuntimeError: if vLLM did not finish the response, or removed the EOS token.
    """
    ids = tuple(completion.token_ids)
    # an EOS token must be in the ids: its log-probability is part of the response
    ended = bool(ids) and ids[-1] in eos_ids
    # an EOS at the length limit may be reported as "length"
    finished = completion.finish_reason == "length" or (completion.finish_reason == "stop" and ended)
    if not ids or not finished:
        raise RuntimeError(
            f"vLLM answered prompt {request.prompt.index} with {len(ids)} tokens and finish_reason "
            f"{completion.finish_reason!r}, without an EOS at the end; expected a whole response with its EOS: check "
            f"the version of vLLM against the extra 'vllm', or use the built-in DecodeEngine"
        )
    reason: FinishReason = "eos" if ended else "length"
    text = sampled_text(tokenizer, request.prompt, ids, ended)
    return Response(ids=ids, text=text, finish_reason=reason, source=request.source)


def weight_sums(policy: torch.nn.Module) -> Tensor:
    """Sum of each trained tensor, [tensors], float64 on the CPU: a checksum that changes with the weights."""
    # frozen parameters do not change, so their sums would tell nothing
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    # in float64: a small update must not vanish in the rounding of a large sum
    sums = [parameter.detach().sum(dtype=torch.float64) for parameter in trained]
    return torch.stack(sums).cpu() if sums else torch.zeros(0)


def _import_vllm() -> ModuleType:
    # imported by name: vLLM is an optional dependency
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise ImportError(
            "VLLMEngine needs vLLM, which is not installed: pip install 'lightning-rlhf[vllm]', or use the built-in "
            "DecodeEngine"
        ) from error
