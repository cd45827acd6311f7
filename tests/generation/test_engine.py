"""The decode engine on small models of several families, against fresh forward passes and enumerated laws."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from scipy.stats import chisquare
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

from lightning_rlhf.generation import lanes
from lightning_rlhf.generation.base import Decoding, Request
from lightning_rlhf.generation.engine import DecodeEngine, sample_tokens
from lightning_rlhf.logprobs.compute import response_logps
from lightning_rlhf.models.reference import AdapterOffReference, FrozenCopyReference
from lightning_rlhf.randomness import Key
from lightning_rlhf.types import Prompt, Response


EOS = 0
SIZES = {
    "vocab_size": 5,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    # large enough that the laws are far from uniform and from each other
    "initializer_range": 0.5,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
}


class Digits:
    """The part of a tokenizer that the engine uses."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        del skip_special_tokens
        return " ".join(map(str, ids))


def build(family: str, seed: int, **changes: object) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {**SIZES, **changes}
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(num_key_value_heads=1, **sizes)).eval()
    if family == "gpt_neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)).eval()
    layers = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(num_key_value_heads=1, head_dim=8, sliding_window=3, layer_types=layers, **sizes)
    return Gemma3ForCausalLM(config).eval()


def engine(policy: PreTrainedModel, reference: PreTrainedModel | None = None, **decoding: float) -> DecodeEngine:
    frozen = FrozenCopyReference(reference) if reference is not None else None
    options = Decoding(**{"max_new_tokens": 6, "rows": 16, **decoding})  # type: ignore[arg-type]
    return DecodeEngine(policy, frozen, Digits(), beta=0.5, decoding=options, eos_ids=[EOS])  # type: ignore[arg-type]


def prompts(count: int) -> list[Prompt]:
    return [Prompt(i, (1, *((i * 7 + j * 3) % 4 + 1 for j in range(i % 5))), "") for i in range(count)]


def requests(count: int = 12) -> list[Request]:
    mixes = [0.0, 0.5, -0.5, -1.0]
    return [Request(p, Key((0, p.index, k)), mix) for p in prompts(count) for k, mix in enumerate(mixes)]


def fresh_logps(model: PreTrainedModel, prompt: Prompt, ids: tuple[int, ...]) -> list[float]:
    """Log-probabilities of a response by one forward pass over prompt and response, without a cache."""
    with torch.no_grad():
        logps = model(torch.tensor([[*prompt.ids, *ids]])).logits[0].log_softmax(-1)
    start = len(prompt.ids) - 1
    return [logps[start + i, token].item() for i, token in enumerate(ids)]


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3"])
def test_log_probabilities_of_both_models_equal_a_fresh_forward_pass(family: str) -> None:
    policy, reference = build(family, 0), build(family, 1)
    asked = requests()
    for request, response in zip(asked, engine(policy, reference).generate(asked, reference_logps=True), strict=True):
        assert response.policy_logps == pytest.approx(fresh_logps(policy, request.prompt, response.ids), abs=1e-5)
        assert response.reference_logps == pytest.approx(fresh_logps(reference, request.prompt, response.ids), abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_response_does_not_depend_on_the_batch_around_it(family: str) -> None:
    policy, reference = build(family, 0), build(family, 1)
    asked = requests()
    together = engine(policy, reference).generate(asked)
    alone = [engine(policy, reference, rows=1).generate([request])[0] for request in asked]
    assert [r.ids for r in together] == [r.ids for r in alone]
    assert [r.ids for r in engine(policy, reference, rows=5).generate(asked[::-1])[::-1]] == [r.ids for r in together]


def test_a_response_ends_at_eos_or_at_the_limit() -> None:
    for response in engine(build("llama", 0), build("llama", 1)).generate(requests(40)):
        assert EOS not in response.ids[:-1]
        assert 1 <= len(response.ids) <= 6
        if response.ids[-1] == EOS:
            assert response.finish_reason == "eos"
        else:
            assert (response.finish_reason, len(response.ids)) == ("length", 6)


def test_first_token_follows_the_mixed_and_tempered_law() -> None:
    policy, reference = build("llama", 0), build("llama", 1)
    prompt, mix, temperature = prompts(5)[4], 0.7, 0.8
    with torch.no_grad():
        ids = torch.tensor([prompt.ids])
        mixed = (1 + mix) * policy(ids).logits[0, -1] - mix * reference(ids).logits[0, -1]
    law = (mixed.double() / temperature).softmax(-1)
    draws = 4000
    asked = [Request(prompt, Key((3, i)), mix) for i in range(draws)]
    decode = engine(policy, reference, max_new_tokens=1, temperature=temperature, rows=1000)
    counts = Counter(response.ids[0] for response in decode.generate(asked))
    assert chisquare([counts[t] for t in range(5)], (law * draws).tolist()).pvalue > 1e-4


@pytest.mark.parametrize("temperature", [0.6, 1.5])
def test_recorded_log_probabilities_are_those_of_the_policy_at_any_temperature(temperature: float) -> None:
    policy, reference = build("llama", 0), build("llama", 1)
    decode = engine(policy, reference, temperature=temperature)
    asked = [Request(prompt, Key((4, prompt.index))) for prompt in prompts(5)]
    for response, request in zip(decode.generate(asked, reference_logps=True), asked, strict=True):
        for model, recorded in ((policy, response.policy_logps), (reference, response.reference_logps)):
            (expected,) = response_logps(model, [(request.prompt.ids, [response.ids])])
            assert recorded == pytest.approx(expected.tolist(), abs=1e-5)


def test_vanilla_rows_run_no_reference_unless_asked() -> None:
    policy, reference = build("llama", 0), FrozenCopyReference(build("llama", 1))
    decode = DecodeEngine(policy, reference, Digits(), beta=0.1, decoding=Decoding(max_new_tokens=3), eos_ids=[EOS])  # type: ignore[arg-type]
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    with reference.active() as model:
        model.register_forward_hook(count)
    vanilla = [Request(p, Key((p.index,))) for p in prompts(4)]
    assert all(response.reference_logps is None for response in decode.generate(vanilla))
    assert calls == 0
    assert all(response.reference_logps is not None for response in decode.generate(vanilla, reference_logps=True))
    assert calls > 0


def test_equal_prompts_are_prefilled_once() -> None:
    policy = build("llama", 0)
    engine(policy).generate(requests(1)[:1])  # the first use of a model has forward passes of its own
    widths: list[tuple[int, ...]] = []
    policy.model.embed_tokens.register_forward_hook(lambda _m, args, _o: widths.append(tuple(args[0].shape)))
    prompt = Prompt(0, (1, 2, 3, 4), "")
    responses = engine(policy).generate([Request(prompt, Key((i,))) for i in range(8)])
    assert widths[0] == (1, 4)
    assert len({response.ids for response in responses}) > 1


def shapes_seen(model: PreTrainedModel) -> list[tuple[int, ...]]:
    """Shapes of the token ids of every forward pass from now on."""
    engine(model).generate([Request(prompts(1)[0], Key((0,)))])  # the first use of a model has passes of its own
    shapes: list[tuple[int, ...]] = []
    model.get_input_embeddings().register_forward_hook(lambda _m, args, _o: shapes.append(tuple(args[0].shape)))
    return shapes


def test_finished_rows_leave_the_batch() -> None:
    policy = build("llama", 0)
    shapes = shapes_seen(policy)
    asked = [Request(p, Key((p.index,))) for p in prompts(16)]
    responses = engine(policy).generate(asked)
    # after the prefill, step t runs the rows whose response is longer than t tokens
    assert [rows for rows, _ in shapes[1:]] == [
        n for n in (sum(len(r.ids) > t for r in responses) for t in range(1, 6)) if n
    ]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_row_that_ends_makes_room_for_the_next(family: str) -> None:
    policy, reference = build(family, 0), build(family, 1)
    asked = requests(24)
    all_at_once = engine(policy, reference, rows=200, max_new_tokens=9).generate(asked)
    shapes = shapes_seen(policy)
    few = engine(policy, reference, rows=8, max_new_tokens=9).generate(asked)
    assert [r.ids for r in few] == [r.ids for r in all_at_once]
    for left, right in zip(few, all_at_once, strict=True):
        assert left.policy_logps == pytest.approx(right.policy_logps, abs=1e-5)
        assert left.reference_logps == pytest.approx(right.reference_logps, abs=1e-5)
    steps = [rows for rows, width in shapes if width == 1]
    tokens = sum(len(r.ids) - 1 for r in few if r.policy_logps)
    assert max(steps) <= 8 and max(steps[:-9]) > 4
    # batches that wait for their longest row would take many more steps
    assert len(steps) < 1.7 * tokens / 8


def test_a_cache_that_outgrows_its_buffers_keeps_what_it_holds() -> None:
    policy = build("llama", 0, max_position_embeddings=512)
    long = [Prompt(i, tuple((i + j) % 4 + 1 for j in range(120 + i)), "") for i in range(6)]
    responses = engine(policy, max_new_tokens=20, rows=4).generate([Request(p, Key((p.index,))) for p in long])
    assert any(len(p.ids) + len(r.ids) > 128 for p, r in zip(long, responses, strict=True))
    for prompt, response in zip(long, responses, strict=True):
        assert response.policy_logps == pytest.approx(fresh_logps(policy, prompt, response.ids), abs=1e-4)


def test_a_model_without_a_cache_of_ours_decodes_all_the_same() -> None:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=5, hidden_size=16, state_size=4, num_hidden_layers=2, initializer_range=0.5)
    policy = MambaForCausalLM(config).eval()
    asked = [Request(p, Key((p.index,))) for p in prompts(4)]
    with pytest.warns(UserWarning, match="'mamba'.*decodes without a cache"):
        responses = engine(policy).generate(asked)
    for request, response in zip(asked, responses, strict=True):
        assert response.policy_logps == pytest.approx(fresh_logps(policy, request.prompt, response.ids), abs=1e-5)


def adapted(seed: int = 0, **changes: object) -> PeftModel:
    """A LoRA policy that differs from its base."""
    policy = get_peft_model(build("llama", seed, **changes), LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return policy


def test_policy_and_reference_rows_of_an_adapter_run_as_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = adapted()
    reference = AdapterOffReference(policy)
    decoding = Decoding(max_new_tokens=6)
    decode = DecodeEngine(policy, reference, Digits(), beta=0.5, decoding=decoding, eos_ids=[])  # type: ignore[arg-type]
    asked = [Request(p, Key((p.index, k)), mix) for p in prompts(4) for k, mix in enumerate((0.5, -0.5, 0.0))]
    shapes = shapes_seen(policy)  # type: ignore[arg-type]
    together = decode.generate(asked)
    assert [rows for rows, width in shapes if width == 1] == [4 * (2 + 2 + 1)] * 5
    assert not any(m._forward_pre_hooks for name, m in policy.named_modules() if "lora_B" in name)
    monkeypatch.setattr(AdapterOffReference, "gates_rows", False)
    apart = decode.generate(asked)
    assert [r.ids for r in together] == [r.ids for r in apart]
    for left, right in zip(together, apart, strict=True):
        assert left.policy_logps == pytest.approx(right.policy_logps, abs=1e-5)
        assert left.reference_logps == pytest.approx(right.reference_logps, abs=1e-5)


def same(left: Sequence[Response], right: Sequence[Response]) -> None:
    assert [r.ids for r in left] == [r.ids for r in right]
    for a, b in zip(left, right, strict=True):
        assert a.policy_logps == (b.policy_logps and pytest.approx(b.policy_logps, abs=1e-5))
        assert a.reference_logps == (b.reference_logps and pytest.approx(b.reference_logps, abs=1e-5))


@pytest.mark.parametrize("kind", ["llama", "gemma3", "lora"])
def test_compiled_steps_draw_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # what torch traces is what is tested here; how it is compiled is torch's business, and slow
    traced = torch.compile(lanes.decoding_step, dynamic=False, backend="aot_eager")
    monkeypatch.setattr(lanes, "_compiled", lambda _: traced)
    if kind == "lora":
        policy: Any = adapted()
        reference: Any = AdapterOffReference(policy)
    else:
        policy, reference = build(kind, 0), FrozenCopyReference(build(kind, 1))
    asked = requests(6)
    drawn = []
    for compiled in (False, True):
        decoding = Decoding(max_new_tokens=6, rows=7, compile=compiled)
        decode = DecodeEngine(policy, reference, Digits(), beta=0.5, decoding=decoding, eos_ids=[EOS])  # type: ignore[arg-type]
        drawn.append(decode.generate(asked))
    same(*drawn)


@pytest.mark.slow
def test_steps_compiled_for_this_machine_draw_the_same() -> None:
    policy = build("llama", 0)
    asked = [Request(p, Key((p.index, k))) for p in prompts(2) for k in range(2)]
    drawn = []
    for compiled in (False, True):
        decoding = Decoding(max_new_tokens=6, rows=4, compile=compiled)
        decode = DecodeEngine(policy, None, Digits(), beta=0.5, decoding=decoding, eos_ids=[])  # type: ignore[arg-type]
        drawn.append(decode.generate(asked))
    same(*drawn)


def test_the_row_gate_is_exact() -> None:
    policy = adapted().double().eval()
    reference = AdapterOffReference(policy)
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [4, 3, 2, 1]])
    with torch.no_grad():
        on = policy(input_ids=ids).logits
        with reference.active() as base:
            off = base(input_ids=ids).logits
        with reference.row_gate() as gate:
            gate(torch.tensor([True, False, False]))
            gated = policy(input_ids=ids).logits
    torch.testing.assert_close(gated, torch.cat([on[:1], off[1:]]), rtol=0, atol=1e-12)
    assert (on[1:] - off[1:]).abs().max() > 0.1


def test_adapters_that_no_gate_fits_run_as_two_batches() -> None:
    policy = get_peft_model(build("llama", 0), LoraConfig(r=2, target_modules="all-linear", use_dora=True))
    assert not AdapterOffReference(policy).gates_rows
    assert AdapterOffReference(adapted()).gates_rows


def test_lora_reference_is_the_model_without_its_adapter() -> None:
    bare, policy = build("llama", 0), adapted()
    decode = DecodeEngine(
        policy,  # type: ignore[arg-type]
        AdapterOffReference(policy),
        Digits(),  # type: ignore[arg-type]
        beta=0.5,
        decoding=Decoding(max_new_tokens=4),
        eos_ids=[EOS],
    )
    asked = requests(6)
    for request, response in zip(asked, decode.generate(asked, reference_logps=True), strict=True):
        assert response.reference_logps == pytest.approx(fresh_logps(bare, request.prompt, response.ids), abs=1e-5)
        assert response.policy_logps == pytest.approx(fresh_logps(policy, request.prompt, response.ids), abs=1e-5)


def test_dropout_is_off_while_decoding_and_back_on_afterwards() -> None:
    policy = build("gpt_neox", 0, hidden_dropout=0.5, attention_dropout=0.5)
    asked = [Request(p, Key((p.index,))) for p in prompts(6)]
    expected = [r.ids for r in engine(policy).generate(asked)]
    policy.train()
    assert [r.ids for r in engine(policy).generate(asked)] == expected
    assert policy.training


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(1000, 4)
    uniforms = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    counts = Counter(sample_tokens(logits, uniforms, top_p=0.8).tolist())
    assert set(counts) == {0, 1}
    assert counts[0] == pytest.approx(625, abs=1)


def test_inverse_transform_never_draws_an_impossible_token() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]]).expand(3, 5)
    uniforms = torch.tensor([0.0, 0.5, 1 - 1e-16], dtype=torch.float64)
    assert sample_tokens(logits, uniforms).tolist() == [1, 3, 3]


def test_logits_that_are_no_law_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite; the policy may have diverged"):
        sample_tokens(torch.tensor([[0.0, math.nan]]), torch.tensor([0.5], dtype=torch.float64))


def test_a_request_is_named_by_its_law() -> None:
    names = [Request(prompts(1)[0], Key((0,)), mix).source for mix in (0.0, -1.0, 0.1, -0.1)]
    assert names == ["policy", "reference", "plus", "minus"]


def test_different_vocabularies_are_refused() -> None:
    with pytest.raises(ValueError, match="vocabularies of 5 and 6 tokens"):
        engine(build("llama", 0), build("llama", 1, vocab_size=6))


def test_an_empty_prompt_and_a_missing_reference_are_refused() -> None:
    with pytest.raises(ValueError, match="prompt 7 has no tokens"):
        engine(build("llama", 0)).generate([Request(Prompt(7, (), ""), Key((0,)))])
    with pytest.raises(ValueError, match="needs a reference"):
        engine(build("llama", 0)).generate([Request(Prompt(0, (1,), ""), Key((0,)), mix=0.1)])
