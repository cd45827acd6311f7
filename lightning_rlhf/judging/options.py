"""Groups of options that judges share: how a local judge is run, how a server is asked, and the chain of thought."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args


Vote = Literal["mean", "majority"]
"""How the judgments of several rationales become one: their mean probability, or the verdict of most of them."""


@dataclass(frozen=True)
class ChainOfThought:
    """How a judge writes rationales before it answers.

    Args:
        samples: rationales per order whose verdicts are combined (self-consistency), >= 1.
        temperature: softmax temperature of the rationales, >= 0; 0 takes the most probable token at each step.
        top_p: top-p sampling of the rationales, in (0, 1].
        max_tokens: longest rationale in tokens, >= 1.
        vote: ``mean`` averages the probabilities of all rationales in both orders, ``majority`` takes the verdict of
            most of them, 0 or 1 (maj@n of Generative Reward Models, arXiv 2410.12832).

    Raises:
        ValueError: if an option is out of range.
    """

    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 512
    vote: Vote = "mean"

    def __post_init__(self) -> None:
        if self.samples < 1 or self.max_tokens < 1:
            raise ValueError(
                f"chain_of_thought.samples and chain_of_thought.max_tokens must be >= 1; got {self.samples}, "
                f"{self.max_tokens}"
            )
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"chain_of_thought.temperature must be >= 0 and top_p in (0, 1]; got {self.temperature}, {self.top_p}"
            )
        if self.vote not in get_args(Vote):
            raise ValueError(f"chain_of_thought.vote is 'mean' or 'majority'; got {self.vote!r}")
        # greedy rationales are all equal: averaging them only costs time
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                "chain_of_thought.samples > 1 averages over rationales that differ: set chain_of_thought.temperature "
                "> 0"
            )


@dataclass(frozen=True)
class JudgeOptions:
    """How a judge in this process is loaded, prompted and run.

    Args:
        chat: whether the prompt is a user's turn in the chat template; default: where the tokenizer has a template.
        chat_template: Jinja chat template, or a file with one; default: the judge's own.
        dtype: data type of the weights: ``float32``, ``bfloat16`` or ``float16``.
        device: where to compute: ``cpu``, ``cuda``; default: a GPU if there is one.
        scoring_batch_tokens: tokens per forward pass, >= 1.
        trust_remote_code: run code that comes with the judge's checkpoint.
    """

    chat: bool | None = None
    chat_template: str | None = None
    dtype: str = "float32"
    device: str | None = None
    scoring_batch_tokens: int = 8192
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.scoring_batch_tokens < 1:
            raise ValueError(f"judge_options.scoring_batch_tokens must be >= 1; got {self.scoring_batch_tokens}")


@dataclass(frozen=True)
class RequestOptions:
    """How requests are sent to a server, and retried.

    Args:
        concurrency: requests at the same time, >= 1.
        timeout: seconds for one attempt, > 0.
        retries: further attempts at a request that failed, >= 0.
        max_wait: longest wait between two attempts in seconds, >= 0.
    """

    concurrency: int = 16
    timeout: float = 60.0
    retries: int = 5
    max_wait: float = 60.0

    def __post_init__(self) -> None:
        # `not x > 0` also refuses NaN
        if self.concurrency < 1 or self.retries < 0 or not self.timeout > 0 or not self.max_wait >= 0:
            raise ValueError(
                f"requests.concurrency must be >= 1, requests.retries and requests.max_wait >= 0, requests.timeout "
                f"> 0; got {self.concurrency}, {self.retries}, {self.max_wait}, {self.timeout}"
            )


@dataclass(frozen=True)
class Prices:
    """Prices of a server, in the unit of the label budget.

    Args:
        input: price of a million prompt tokens, >= 0.
        output: price of a million generated tokens, >= 0.
    """

    input: float = 0.0
    output: float = 0.0

    def __post_init__(self) -> None:
        if not self.input >= 0 or not self.output >= 0:
            raise ValueError(f"prices are per million tokens and >= 0; got {self.input} and {self.output}")


DEFAULT_JUDGE_OPTIONS = JudgeOptions()
DEFAULT_REQUESTS, DEFAULT_PRICES = RequestOptions(), Prices()
