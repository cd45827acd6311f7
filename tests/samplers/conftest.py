"""A world small enough to enumerate: five tokens, responses of one to three, laws known exactly by forward passes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import product
from typing import Any

import pytest
import scipy.stats
import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_rlhf.generation.base import AbstractEngine, Decoding, Request
from lightning_rlhf.generation.engine import DecodeEngine
from lightning_rlhf.models.reference import FrozenCopyReference
from lightning_rlhf.types import Comparison, Prompt, Response


VOCABULARY, EOS = 5, 4
Ids = tuple[int, ...]
Law = dict[Ids, float]
PairDistribution = dict[tuple[Ids, Ids], float]


class World:
    """Two tiny random Llamas, the policy and the reference, and the exact laws of what they say.

    Args:
        beta: the DPO beta.
        length: longest response in tokens.
        same: whether the reference is the policy.
        ids: the prompt.
        width: hidden size of the models.
    """

    def __init__(
        self, beta: float = 0.5, length: int = 2, same: bool = False, ids: Ids = (0, 2, 1), width: int = 16
    ) -> None:
        self.beta, self.length, self.ids = beta, length, ids
        self.policy, self.reference = tiny_llama(1, width), tiny_llama(1 if same else 2, width)

    def prompts(self, count: int, start: int = 0) -> list[Prompt]:
        """The same prompt many times, under different indices."""
        return [Prompt(index=start + i, ids=self.ids, text="some text") for i in range(count)]

    def engine(self, **decoding: Any) -> DecodeEngine:
        """A fresh engine."""
        decoding = {"max_new_tokens": self.length, "rows": 4096, **decoding}
        return DecodeEngine(
            self.policy,
            FrozenCopyReference(self.reference),
            tiny_tokenizer(),
            beta=self.beta,
            decoding=Decoding(**decoding),
            eos_ids=[EOS],
        )

    @cache  # noqa: B019  # worlds live as long as the session
    def next_logits(self, which: str, prefix: Ids) -> torch.Tensor:
        """Logits of the token after the prompt and a prefix, by a plain forward pass without cache; shape [5]."""
        model = self.policy if which == "policy" else self.reference
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=torch.tensor([self.ids + prefix])).logits[0, -1].double()
        return logits

    def law(self, mix: float = 0.0, temperature: float = 1.0, top_p: float = 1.0) -> Law:
        """P(response), token by token: mixed logits, divided by the temperature, cut to the nucleus."""
        law: Law = {}
        for ids in self.responses():
            law[ids] = 1.0
            for step, token in enumerate(ids):
                policy, reference = (self.next_logits(which, ids[:step]) for which in ("policy", "reference"))
                probabilities = (((1 + mix) * policy - mix * reference) / temperature).softmax(-1).tolist()
                law[ids] *= nucleus(probabilities, top_p)[token]
        assert abs(sum(law.values()) - 1.0) < 1e-9
        return law

    def logps(self, which: str, ids: Ids) -> list[float]:
        """Log-probability of each token of a response."""
        return [float(self.next_logits(which, ids[:step]).log_softmax(-1)[ids[step]]) for step in range(len(ids))]

    def implicit_reward(self, ids: Ids) -> float:
        """Implicit reward, beta * log(pi_theta / pi_ref), of a response."""
        return self.beta * (sum(self.logps("policy", ids)) - sum(self.logps("reference", ids)))

    def zz(self) -> float:
        """Z+ Z- = E cosh(r(a) - r(b)) over independent pairs of the policy, by summing over all of them."""
        return sum(
            p * math.cosh(self.implicit_reward(a) - self.implicit_reward(b))
            for (a, b), p in product_law(self.law(), self.law()).items()
        )

    def responses(self) -> list[Ids]:
        """Every response there is: it ends with EOS or at the limit."""
        found: list[Ids] = []
        for length in range(1, self.length + 1):
            for ids in product(range(VOCABULARY), repeat=length):
                if EOS not in ids[:-1] and (ids[-1] == EOS or length == self.length):
                    found.append(ids)
        return found


def tiny_llama(seed: int, width: int = 16) -> LlamaForCausalLM:
    """A random Llama with peaked next-token distributions."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        # logits as peaked at every width
        initializer_range=0.35 * (16 / width) ** 0.5,
        bos_token_id=0,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words a, b, c, d and the end."""
    words = {"a": 0, "b": 1, "c": 2, "d": 3, "</s>": EOS}
    return PreTrainedTokenizerFast(
        tokenizer_object=RawTokenizer(WordLevel(words, unk_token="a")), eos_token="</s>", bos_token="a"
    )


def nucleus(probabilities: Sequence[float], top_p: float) -> list[float]:
    """The smallest set of most probable tokens whose mass reaches top_p, renormalized; plain Python, as a twin."""
    kept, mass = set(), 0.0
    for token in sorted(range(len(probabilities)), key=lambda token: -probabilities[token]):
        if mass >= top_p:
            break
        kept.add(token)
        mass += probabilities[token]
    return [p / mass if token in kept else 0.0 for token, p in enumerate(probabilities)]


class ToyEngine(AbstractEngine):
    """Samples responses from a categorical distribution, by the request's key alone; tilts it by the request's mix."""

    def __init__(self, beta: float = 0.5) -> None:
        self.beta = beta
        self.calls = 0

    def generate(self, requests: Sequence[Request], *, reference_logps: bool = False) -> list[Response]:
        """Sample one response per request."""
        self.calls += 1
        return [self._draw(request) for request in requests]

    def head_gradients(self, prompts: Sequence[Prompt], responses: Sequence[Response], dim: int) -> torch.Tensor:
        """Gradients in the four logits, e - p: the tabular features of this world; dim is at least four."""
        law = torch.tensor([0.1, 0.2, 0.3, 0.4])
        gradients = torch.stack([torch.eye(4)[response.ids[0]] - law for response in responses])
        return torch.nn.functional.pad(gradients, (0, dim - 4))

    def _draw(self, request: Request) -> Response:
        policy = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
        reference = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
        law = ((1 + request.mix) * policy - request.mix * reference).softmax(-1)
        token = int(torch.searchsorted(law.cumsum(0), request.key.uniforms(1)).clamp_max(3))
        return Response(
            ids=(token, EOS),
            text="abcd"[token],
            finish_reason="eos",
            policy_logps=(float(policy[token]), 0.0),
            reference_logps=(float(reference[token]), 0.0),
            source=request.source,
        )


def product_law(first: Mapping[Ids, float], second: Mapping[Ids, float]) -> PairDistribution:
    """The distribution of two independent samples."""
    return {(a, b): p * q for a, p in first.items() for b, q in second.items()}


def assert_follows(observed: Iterable[Any], law: Mapping[Any, float], minimum: float = 1e-4) -> None:
    """Check samples against a distribution: none outside its support, a chi-square test with p above ``minimum``.

    Outcomes expected fewer than five times share one bin.
    """
    counts = Counter(observed)
    total = sum(counts.values())
    impossible = [outcome for outcome in counts if law.get(outcome, 0.0) <= 0.0]
    assert not impossible, f"sampled, but of probability zero: {impossible[:3]}"
    frequent = [outcome for outcome, p in law.items() if p * total >= 5.0]
    found = [float(counts[outcome]) for outcome in frequent]
    expected = [law[outcome] * total for outcome in frequent]
    rest = total - sum(expected)
    if rest >= 5.0:
        found.append(total - sum(found))
        expected.append(rest)
    else:
        # too rare for a bin of its own: it joins the smallest one
        smallest = expected.index(min(expected))
        found[smallest] += total - sum(found)
        expected[smallest] += rest
    assert len(expected) >= 3, "the law is too concentrated for a test"
    p_value = scipy.stats.chisquare(found, expected).pvalue
    assert p_value > minimum, f"chi-square p-value {p_value:.2e} over {len(expected)} bins"


def ids_of(comparisons: Iterable[Comparison]) -> list[tuple[Ids, Ids]]:
    """The pairs that were sampled."""
    return [(comparison.a.ids, comparison.b.ids) for comparison in comparisons]


@pytest.fixture(scope="session")
def make_world() -> Callable[..., World]:
    """Make worlds; equal arguments give the same one."""
    return cache(World)


@pytest.fixture(scope="session")
def world(make_world: Callable[..., World]) -> World:
    """Responses of up to two tokens, beta 0.5."""
    return make_world(beta=0.5, length=2)


@pytest.fixture
def toy_engine() -> ToyEngine:
    """An engine without models."""
    return ToyEngine()


@pytest.fixture(scope="session")
def tools() -> Any:
    """The helpers of this file, for tests that cannot import it."""

    class Tools:
        assert_follows = staticmethod(assert_follows)
        product_law = staticmethod(product_law)
        ids_of = staticmethod(ids_of)
        tokenizer = staticmethod(tiny_tokenizer)
        llama = staticmethod(tiny_llama)

    return Tools
