"""Engines outside of PyTorch that decode for the policy: vLLM in this process, or a server.

They generate the ids. Log-probabilities are computed by the local policy with teacher forcing: those of another program
come from other kernels, and may have another data type.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Protocol, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.generation.base import AbstractEngine, Decoding, Request
from lightning_rlhf.generation.engine import with_logps
from lightning_rlhf.generation.text import sampled_text
from lightning_rlhf.logprobs.compute import base_model
from lightning_rlhf.models.lora import is_uniform
from lightning_rlhf.models.reference import AbstractReference, AdapterOffReference
from lightning_rlhf.models.rotary import rotary_window
from lightning_rlhf.types import FinishReason, Prompt, Response


LEAST_TEMPERATURE = 0.01
"""Lowest temperature at which vLLM samples."""


class Completion(Protocol):
    """A generated response, as ``vllm.CompletionOutput`` has it."""

    @property
    def token_ids(self) -> Sequence[int]:
        """Generated ids, with the EOS token that ended them."""

    @property
    def finish_reason(self) -> str | None:
        """``stop`` or ``length``; anything else is an error."""


class AbstractExternalEngine(AbstractEngine):
    """Generates responses of the policy with another program, and scores them here.

    The program has the weights of one model, so that no logits can be mixed: `PILAFSampler` needs `DecodeEngine`, and
    all samplers that choose among whole responses of the policy work. Where the program runs the policy as a base model
    with a LoRA adapter, and the reference is that base model, it also generates responses of the reference.

    Equal keys give equal responses as far as the kernels of the program are deterministic. Unlike with `DecodeEngine`,
    a response may depend on the rest of the batch. Temperatures below 0.01 take the most probable token.

    Args:
        policy: the policy.
        reference: the frozen reference, or None if no log-probabilities under it are needed.
        tokenizer: decodes the ids to text.
        beta: the DPO beta, > 0.
        decoding: length limit, temperature and top-p; ``rows`` has no effect, since the program forms its own batches.
        eos_ids: ids that end a response.
        tokens_per_batch: token positions per forward pass of scoring.

    Raises:
        ValueError: if the rotary embedding of the policy depends on the length of a text, which programs decide
            otherwise.
    """

    NAME = ""
    """Name of the program in messages."""

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
    ) -> None:
        window = rotary_window(base_model(policy))
        if window is not None:
            raise ValueError(
                f"{type(base_model(policy)).__name__} turns texts beyond {window} tokens otherwise than shorter ones, "
                f"and {self.NAME} decides by the longest that it allows; use the built-in DecodeEngine "
                f"(model.options.generation=local)"
            )
        self.policy, self.reference, self.tokenizer = policy, reference, tokenizer
        self.beta, self.decoding, self.eos_ids = beta, decoding, frozenset(eos_ids)
        self.tokens_per_batch = tokens_per_batch
        self.on_tokens: Callable[[int], None] | None = None
        """Called with the number of generated tokens, once per `generate`."""

    @property
    def adapted(self) -> PeftModel | None:
        """The policy, if the program gets its adapter beside a base model; None if it gets whole weights."""
        # the type checker knows of no class that is both
        policy = cast(nn.Module, self.policy)
        if isinstance(policy, PeftModel) and all(map(is_uniform, policy.peft_config.values())):
            return policy
        return None

    @property
    def base_is_reference(self) -> bool:
        """Whether the base model of the program is the reference."""
        return self.adapted is not None and isinstance(self.reference, AdapterOffReference)

    @abstractmethod
    def complete(self, requests: Sequence[Request]) -> Sequence[Completion]:
        """Generate with the present weights of the policy, or those of the reference where ``mix`` is -1; in order.

        Args:
            requests: at least one.
        """

    def generate(self, requests: Sequence[Request], *, reference_logps: bool = False) -> list[Response]:
        """Generate one response per request, in order; see `AbstractEngine.generate`.

        Raises:
            ValueError: if a request mixes in the reference, a prompt is empty, or the reference is missing.
            RuntimeError: if the program returns an incomplete response.
        """
        check_requests(requests, self.NAME, self.base_is_reference)
        if reference_logps and self.reference is None:
            raise ValueError("reference_logps need a reference model, and the engine was built without one")
        if not requests:
            return []
        prompts = [request.prompt for request in requests]
        responses = [
            response_from_completion(request, completion, self.eos_ids, self.tokenizer, self.NAME)
            for request, completion in zip(requests, self.complete(requests), strict=True)
        ]
        if self.on_tokens is not None:
            self.on_tokens(sum(len(response.ids) for response in responses))
        responses = with_logps(self.policy, "policy_logps", prompts, responses, self.tokens_per_batch)
        # as in `DecodeEngine`: the model that generated a response always scores it
        if reference_logps or any(request.mix != 0 for request in requests):
            return self.with_reference_logps(prompts, responses)
        return responses

    def with_reference_logps(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[Response]:
        """Add reference log-probabilities to the responses that have none."""
        assert self.reference is not None
        with self.reference.active() as model:
            return with_logps(model, "reference_logps", prompts, responses, self.tokens_per_batch)


def check_requests(requests: Sequence[Request], name: str, base_is_reference: bool = False) -> None:
    """Check that a program with one model can generate all requests.

    Args:
        requests: responses to generate.
        name: name of the program in messages.
        base_is_reference: whether it can also generate with the reference alone.

    Raises:
        ValueError: if a request mixes in the reference, or a prompt is empty.
    """
    for request in requests:
        if request.mix != 0 and not (request.mix == -1 and base_is_reference):
            remedy = (
                "use a LoRA policy (model.lora), whose base model is the reference"
                if request.mix == -1
                else "use SIRPILAFSampler, which resamples whole responses"
            )
            raise ValueError(
                f"{name} decodes one model, and the request for prompt {request.prompt.index} mixes policy and "
                f"reference (mix {request.mix:g}): {remedy}, or use the built-in DecodeEngine "
                f"(model.options.generation=local)"
            )
        if not request.prompt.ids:
            raise ValueError(f"prompt {request.prompt.index} has no tokens; give the tokenizer a BOS token")


def served_temperature(request: Request, decoding: Decoding) -> float:
    """Temperature of a request for a program; 0, the most probable token, below 0.01, which vLLM would raise to it."""
    temperature = decoding.temperature if request.temperature is None else request.temperature
    return temperature if temperature >= LEAST_TEMPERATURE else 0.0


def response_from_completion(
    request: Request,
    completion: Completion,
    eos_ids: Collection[int],
    tokenizer: PreTrainedTokenizerBase,
    name: str = "vLLM",
) -> Response:
    """Convert the answer of a program to a response.

    Raises:
        RuntimeError: if the response is not finished, or its EOS token was removed.
    """
    ids = tuple(completion.token_ids)
    # an EOS token must be in the ids: its log-probability is part of the response
    ended = bool(ids) and ids[-1] in eos_ids
    # an EOS at the length limit may be reported as "length"
    finished = completion.finish_reason == "length" or (completion.finish_reason == "stop" and ended)
    if not ids or not finished:
        raise RuntimeError(
            f"{name} answered prompt {request.prompt.index} with {len(ids)} tokens and finish_reason "
            f"{completion.finish_reason!r}, without an EOS at the end; expected a whole response with its EOS: check "
            f"its version, or use the built-in DecodeEngine (model.options.generation=local)"
        )
    reason: FinishReason = "eos" if ended else "length"
    text = sampled_text(tokenizer, request.prompt, ids, ended)
    return Response(ids=ids, text=text, finish_reason=reason, source=request.source)


def weight_sums(policy: nn.Module) -> Tensor:
    """Sum of each trained tensor, [tensors], float64 on the CPU: a checksum that changes with the weights."""
    # frozen parameters do not change, so their sums would tell nothing
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    # in float64: a small update must not vanish in the rounding of a large sum
    sums = [parameter.detach().sum(dtype=torch.float64) for parameter in trained]
    return torch.stack(sums).cpu() if sums else torch.zeros(0)


def weight_version(policy: nn.Module) -> str:
    """Name of the trained weights, 16 hexadecimal digits; equal on all ranks of a run."""
    return hashlib.blake2b(weight_sums(policy).numpy().tobytes(), digest_size=8).hexdigest()
