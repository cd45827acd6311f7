"""The vLLM engine, as far as it goes without vLLM: refusals, translation, assembly, and following the policy.

The stand-in below has the shape of ``vllm.LLM``; tests/samplers/test_vllm_real.py has the real one.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lightning_rlhf.generation import DecodeEngine, Decoding, Request
from lightning_rlhf.generation.external import response_from_completion
from lightning_rlhf.generation.vllm import VLLMEngine, sampling_settings
from lightning_rlhf.models import LoRA, build_reference, load_policy, load_tokenizer
from lightning_rlhf.randomness import Key
from lightning_rlhf.types import Prompt


PROMPTS = [Prompt(index=0, ids=(5, 6, 7), text=""), Prompt(index=1, ids=(8,), text="")]
REQUESTS = [Request(prompt, Key((1, k))) for k, prompt in enumerate([*PROMPTS, PROMPTS[0]])]
ANSWERS = [[9, 10, 0], [11, 12, 13, 14], [15, 0]]


@dataclass
class LLM:
    """Gives the same answers always, and remembers what it was asked."""

    made: ClassVar[list[LLM]] = []

    model: str
    dtype: str
    gpu_memory_utilization: float
    enable_lora: bool = False
    max_loras: int = 0
    max_lora_rank: int = 0
    asked: list[tuple[Any, Any]] = field(default_factory=list)
    adapters: list[Any] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    head: Any = None

    def __post_init__(self) -> None:
        LLM.made.append(self)
        self.read(self.model)

    def read(self, folder: str) -> None:
        self.head = AutoModelForCausalLM.from_pretrained(folder).state_dict()["model.layers.1.mlp.down_proj.weight"]

    def generate(self, prompts: Any, sampling_params: Any, *, use_tqdm: bool, lora_request: Any) -> list[Any]:
        assert not use_tqdm
        self.adapters.append(lora_request and load_file(Path(lora_request.path) / "adapter_model.safetensors"))
        self.asked.append((prompts, sampling_params))
        finish = ["stop", "length", "length"]  # an EOS on the last token allowed may be called "length"
        completions = [SimpleNamespace(token_ids=a, finish_reason=r) for a, r in zip(ANSWERS, finish, strict=True)]
        return [SimpleNamespace(outputs=[completion]) for completion in completions]

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        self.calls.append(method)
        self.read(kwargs["weights_path"])

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset_prefix_cache")


@dataclass
class LoRARequest:
    """The shape of ``vllm.lora.request.LoRARequest``."""

    name: str
    number: int
    path: str


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[LLM]:
    LLM.made.clear()
    modules: Any = sys.modules
    monkeypatch.setitem(modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=dict))
    monkeypatch.setitem(modules, "vllm.lora.request", SimpleNamespace(LoRARequest=LoRARequest))
    return LLM


def engines(policy: Path, lora: LoRA | None = None) -> tuple[VLLMEngine, DecodeEngine]:
    model: Any = load_policy(str(policy), lora=lora)
    tokenizer = load_tokenizer(str(policy))
    options: dict[str, Any] = {"beta": 0.1, "decoding": Decoding(max_new_tokens=4), "eos_ids": [0]}
    reference = build_reference(model, "fixed")
    return VLLMEngine(model, reference, tokenizer, **options), DecodeEngine(model, reference, tokenizer, **options)


def test_settings_of_a_request() -> None:
    decoding = Decoding(max_new_tokens=7, temperature=0.5, top_p=0.9)
    first = sampling_settings(REQUESTS[0], decoding, {3, 0})
    assert first == {
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": Key((1, 0)).seed(),
        "ignore_eos": True,
        "stop_token_ids": [0, 3],
        "detokenize": False,
    }
    # responses to the same prompt differ by their keys alone
    assert first["seed"] != sampling_settings(REQUESTS[2], decoding, {3, 0})["seed"]


def test_responses_carry_the_log_probabilities_of_the_local_policy(stand_in: type[LLM], tiny_policy: Path) -> None:
    engine, plain = engines(tiny_policy)
    drawn: list[int] = []
    engine.on_tokens = drawn.append
    responses = engine.generate(REQUESTS, reference_logps=True)
    assert [r.ids for r in responses] == [tuple(answer) for answer in ANSWERS]
    assert [r.finish_reason for r in responses] == ["eos", "length", "eos"]
    assert {r.source for r in responses} == {"policy"}
    assert [r.text for r in responses] == [engine.tokenizer.decode(a, skip_special_tokens=True) for a in ANSWERS]
    assert drawn == [9]
    ((prompts, settings),) = stand_in.made[0].asked
    assert prompts == [{"prompt_token_ids": list(request.prompt.ids)} for request in REQUESTS]
    assert [each["seed"] for each in settings] == [request.key.seed() for request in REQUESTS]

    with torch.no_grad():
        for request, response in zip(REQUESTS, responses, strict=True):
            ids = torch.tensor([[*request.prompt.ids, *response.ids]])
            logps = plain.policy(ids).logits[0].log_softmax(-1)[len(request.prompt.ids) - 1 : -1]
            expected = logps.gather(-1, torch.tensor(response.ids)[:, None]).squeeze(-1)
            torch.testing.assert_close(torch.tensor(response.policy_logps), expected)
            # the policy has not been trained yet
            torch.testing.assert_close(torch.tensor(response.reference_logps), expected)
    assert engine.generate([]) == []


# vLLM reads adapters of one rank alone
MERGED = LoRA(r=2, peft={"rank_pattern": {"q_proj": 1}})


def train(engine: VLLMEngine) -> None:
    with torch.no_grad():
        for parameter in engine.policy.parameters():
            if parameter.requires_grad:
                parameter += 0.1


@pytest.mark.parametrize("lora", [None, MERGED], ids=["full", "merged"])
def test_vllm_follows_the_policy(stand_in: type[LLM], tiny_policy: Path, lora: LoRA | None) -> None:
    engine, _ = engines(tiny_policy, lora)
    engine.generate(REQUESTS)
    engine.generate(REQUESTS)
    (llm,) = stand_in.made
    assert (llm.calls, llm.dtype) == ([], "float32")  # nothing was trained in between
    before = llm.head
    train(engine)
    engine.generate(REQUESTS)
    assert stand_in.made == [llm]
    assert llm.calls == ["reload_weights", "reset_prefix_cache"]
    assert not torch.equal(llm.head, before)
    engine.generate(REQUESTS)
    assert len(llm.calls) == 2


def test_an_adapter_goes_to_vllm_beside_its_base(stand_in: type[LLM], tiny_policy: Path) -> None:
    engine, _ = engines(tiny_policy, LoRA(r=3))
    engine.generate(REQUESTS)
    (llm,) = stand_in.made
    assert (llm.enable_lora, llm.max_loras, llm.max_lora_rank, llm.calls) == (True, 1, 8, [])
    base = AutoModelForCausalLM.from_pretrained(tiny_policy).state_dict()
    torch.testing.assert_close(llm.head, base["model.layers.1.mlp.down_proj.weight"])
    train(engine)
    engine.generate(REQUESTS)
    before, after = llm.adapters
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, before[name] + 0.1)
    # the base model is the reference
    responses = engine.generate([Request(r.prompt, r.key, mix=-1.0) for r in REQUESTS])
    assert llm.adapters[-1] is None
    assert [r.source for r in responses] == ["reference"] * 3
    assert all(r.reference_logps is not None for r in responses)


@pytest.mark.parametrize("mix", [-1.0, 0.1])
def test_requests_that_mix_models_are_refused(stand_in: type[LLM], tiny_policy: Path, mix: float) -> None:
    engine, _ = engines(tiny_policy)
    with pytest.raises(ValueError, match=r"prompt 1 mixes policy and reference \(mix .*(LoRA policy|SIRPILAFSampler)"):
        engine.generate([REQUESTS[0], Request(PROMPTS[1], Key((2,)), mix=mix)])
    with pytest.raises(ValueError, match="prompt 4 has no tokens"):
        engine.generate([Request(Prompt(index=4, ids=(), text=""), Key((2,)))])
    engine.reference = None
    with pytest.raises(ValueError, match="built without one"):
        engine.generate(REQUESTS, reference_logps=True)
    assert stand_in.made == []


@pytest.mark.parametrize(("ids", "reason"), [([9, 10], "stop"), ([], "length"), ([9, 0], "abort")])
def test_unfinished_answers_are_errors(tiny_policy: Path, ids: list[int], reason: str) -> None:
    completion = SimpleNamespace(token_ids=ids, finish_reason=reason)
    with pytest.raises(RuntimeError, match=f"prompt 0 with {len(ids)} tokens and finish_reason '{reason}'"):
        response_from_completion(REQUESTS[0], completion, {0}, load_tokenizer(str(tiny_policy)))


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tiny_policy: Path) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-rlhf\[vllm\]'"):
        engines(tiny_policy)
