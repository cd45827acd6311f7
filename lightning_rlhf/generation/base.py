"""What samplers ask of a decode engine, and the shape of a request."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_rlhf.randomness import Key
from lightning_rlhf.types import Prompt, Response


@dataclass(frozen=True)
class Decoding:
    """How responses are decoded.

    Args:
        max_new_tokens: longest response in tokens, EOS included, >= 1.
        temperature: divides the mixed logits, > 0; 1.0 samples the policy itself, which the PILAF theory assumes.
        top_p: nucleus mass in (0, 1]; 1.0 keeps the whole vocabulary, which the theory assumes.
        rows: responses decoded together at most, >= 1.
        compile: compile decoding steps with torch.compile; on a GPU they become CUDA graphs. Rows and lengths are
            rounded up, so that few shapes are compiled; each takes up to a minute, once per run.
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
    """One response to be drawn.

    The next token has logits ``(1 + mix) * h_policy - mix * h_reference`` (PILAF, arXiv 2502.04270, section 5), so that
    ``mix = 0`` is the policy, ``mix = -1`` the reference, ``mix = +beta`` pi+ and ``mix = -beta`` pi-.

    Args:
        prompt: the prompt.
        key: names the random numbers of this response; equal keys give equal responses.
        mix: extrapolation away from the reference.
        source: what to write in `Response.source`; the name of the law that ``mix`` gives when not set.
    """

    prompt: Prompt
    key: Key
    mix: float = 0.0
    source: str = ""

    def __post_init__(self) -> None:
        if not self.source:
            name = "policy" if self.mix == 0 else "reference" if self.mix == -1 else "plus" if self.mix > 0 else "minus"
            object.__setattr__(self, "source", name)


class AbstractEngine(ABC):
    """Decodes responses from policy and reference.

    Attributes:
        beta: the DPO beta of the policy, > 0; samplers tilt by it and scale the implicit reward with it.
    """

    beta: float

    @abstractmethod
    def generate(self, requests: Sequence[Request], *, reference_logps: bool = False) -> list[Response]:
        """Draw one response per request, in order.

        Args:
            requests: what to draw; requests with equal prompts share the prefill.
            reference_logps: also report log pi_ref of each token for requests that would not need the reference. Where
                ``mix`` is neither 0 nor -1 both log-probabilities are reported anyway; with ``mix = -1`` the policy's
                log-probabilities are computed too when this is set.
        """

    def head_gradients(self, prompts: Sequence[Prompt], responses: Sequence[Response], dim: int) -> Tensor:
        """Gradients of log p(response) in the policy's output head, sketched; [responses, dim], float32 on the CPU.

        Args:
            prompts: the prompt of each response.
            responses: what to differentiate.
            dim: numbers per gradient, >= 1.

        Raises:
            ValueError: if the engine has no access to the weights.
        """
        del prompts, responses, dim
        raise ValueError(
            f"{type(self).__name__} cannot differentiate the policy, which this sampler needs; use DecodeEngine, that "
            f"is model.use_vllm=false"
        )
