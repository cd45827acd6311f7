"""The interface of decode engines: decoding settings, requests, and `AbstractEngine`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from lightning_rlhf.randomness import Key
from lightning_rlhf.types import Prompt, Response


@dataclass(frozen=True)
class Decoding:
    """Decoding settings.

    Args:
        max_new_tokens: maximum length of a response in tokens, EOS included, >= 1.
        temperature: divides the mixed logits, > 0; 1.0 samples the policy itself, as the PILAF theory assumes.
        top_p: top-p (nucleus) sampling threshold in (0, 1]; 1.0 keeps the whole vocabulary, as the theory assumes.
        rows: maximum number of responses decoded in one batch, >= 1.
        compile: compile decoding steps with torch.compile; on a GPU they become CUDA graphs. Rows and lengths are
            rounded up to reduce the number of compiled shapes; each shape takes up to a minute, once per run.

    Raises:
        ValueError: if a setting is out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    rows: int = 32
    compile: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.rows < 1:
            raise ValueError(f"max_new_tokens and rows must be at least 1; got {self.max_new_tokens} and {self.rows}")
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature must be > 0 and top_p in (0, 1]; got {self.temperature} and {self.top_p}")


@dataclass(frozen=True)
class Request:
    """One response to generate.

    The next token has the logits ``(1 + mix) h_theta - mix h_ref`` (PILAF, arXiv 2502.04270, section 5)::

        mix = 0      policy         softmax(h_theta)
        mix = +beta  pi+            softmax((1 + beta) h_theta - beta h_ref)
        mix = -beta  pi-            softmax((1 - beta) h_theta + beta h_ref)
        mix = -1     reference      softmax(h_ref)

    Args:
        prompt: the prompt.
        key: source of the random numbers of this response; equal keys give equal responses.
        mix: mixing coefficient, the extrapolation away from the reference.
        source: value of `Response.source`. Default: ``"policy"``, ``"reference"``, ``"plus"`` or ``"minus"``, by
            ``mix``.
        temperature: divides the mixed logits of this response, > 0. Default: the temperature of `Decoding`.

    Raises:
        ValueError: if the temperature is not above 0.
    """

    prompt: Prompt
    key: Key
    mix: float = 0.0
    source: str = ""
    temperature: float | None = None

    def __post_init__(self) -> None:
        # also refuses NaN
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"the temperature of a request must be > 0; got {self.temperature}")
        if not self.source:
            # object.__setattr__: the dataclass is frozen
            name = "policy" if self.mix == 0 else "reference" if self.mix == -1 else "plus" if self.mix > 0 else "minus"
            object.__setattr__(self, "source", name)


class AbstractEngine(ABC):
    """Generates responses from policy, reference and mixtures of their logits.

    Attributes:
        beta: the DPO beta of the policy, > 0; samplers tilt by it and scale the implicit reward with it.
    """

    beta: float

    @abstractmethod
    def generate(self, requests: Sequence[Request], *, reference_logps: bool = False) -> list[Response]:
        """Generate one response per request, in order.

        Args:
            requests: responses to generate; requests with equal prompts share the prefill.
            reference_logps: compute the log-probabilities of each token under both models for all requests. By default
                they are computed under the models that generate the response: both where ``mix`` is neither 0 nor -1.
        """


@runtime_checkable
class GradientEngine(Protocol):
    """An engine that has access to the weights of the policy, and so to gradients."""

    def head_gradients(self, prompts: Sequence[Prompt], responses: Sequence[Response], dim: int) -> Tensor:
        """Gradients of log p(response) in the policy's output head, sketched; [responses, dim], float32 on the CPU.

        Args:
            prompts: the prompt of each response.
            responses: responses to differentiate.
            dim: numbers per gradient, >= 1.
        """
