"""Shared prompts, heads on chosen positions and tiles against the plain forward, one response at a time."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lightning_rlhf.logprobs import compute, head
from lightning_rlhf.logprobs.attention import segments
from lightning_rlhf.logprobs.compute import packed_scores, response_logps, summed_logps
from lightning_rlhf.logprobs.packing import Group, attention_mask, pack, sharing_gain, split_by_tokens


VOCAB = 47
WINDOW = 5  # shorter than every prompt below
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # so that attention matters
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
GQA = {**COMMON, "num_key_value_heads": 2}


def llama(tied: bool = False, attention: str = "sdpa") -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**GQA, tie_word_embeddings=tied, attn_implementation=attention))


def gemma3(attention: str = "sdpa") -> PreTrainedModel:
    layers = ["sliding_attention", "full_attention"] * 2
    config = Gemma3TextConfig(
        **{**GQA, "num_hidden_layers": 4},
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=layers,
        final_logit_softcapping=5.0,
        attn_implementation=attention,
    )
    return Gemma3ForCausalLM(config)


def qwen2_sliding() -> PreTrainedModel:
    layers = {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1}
    return Qwen2ForCausalLM(Qwen2Config(**GQA, **layers))


def gemma2(attention: str = "eager") -> PreTrainedModel:
    return Gemma2ForCausalLM(
        Gemma2Config(
            **GQA, head_dim=8, sliding_window=WINDOW, final_logit_softcapping=3.0, attn_implementation=attention
        )
    )


def mistral(attention: str = "sdpa") -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**GQA, sliding_window=WINDOW, attn_implementation=attention))


def gpt_neox(attention: str = "sdpa") -> PreTrainedModel:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**COMMON, attn_implementation=attention))


def qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**GQA, head_dim=8))


def gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config)


def llama_lora() -> nn.Module:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(llama(), config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "llama-tied": lambda: llama(tied=True),
    "llama-lora": llama_lora,
    "qwen2-sliding": qwen2_sliding,
    "qwen3": qwen3,
    "gpt-neox": gpt_neox,
    "gpt2": gpt2,
    "gemma3-sliding": gemma3,
    "mistral-sliding": mistral,
    "cohere-scaled": lambda: CohereForCausalLM(CohereConfig(**GQA, logit_scale=0.25)),
    "granite-scaled": lambda: GraniteForCausalLM(GraniteConfig(**GQA, logits_scaling=4.0)),
}
EAGER: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: llama(attention="eager"),
    "gpt-neox": lambda: gpt_neox("eager"),
    "gemma2-sliding": gemma2,
    "gemma3-sliding": lambda: gemma3("eager"),
    "mistral-sliding": lambda: mistral("eager"),
}


class KeepFloat64(TorchFunctionMode):
    """Stops transformers from rounding float64 to float32 inside norms and softmax, so that 1e-9 can be asked for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = dict(kwargs or {})
        if not args or not isinstance(args[0], Tensor) or args[0].dtype != torch.float64:
            return func(*args, **kwargs)
        if func is Tensor.float or (func is Tensor.to and torch.float32 in (*args[1:], *kwargs.values())):
            return args[0]
        if kwargs.get("dtype") == torch.float32:
            del kwargs["dtype"]
        return func(*args, **kwargs)


def build(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return make().to(dtype).eval()


def ids(length: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


# k = 4, 1 and 2 responses; ragged; one-token responses; two equal responses; a one-token prompt
GROUPS: list[Group] = [
    (ids(14, 1), [ids(6, 2), ids(1, 3), ids(9, 4), ids(3, 5)]),
    (ids(7, 6), [ids(5, 7)]),
    (ids(21, 8), [ids(8, 9), ids(8, 9)]),
    (ids(1, 10), [ids(4, 11), ids(1, 12)]),
]


def one_by_one(model: nn.Module, groups: list[Group]) -> list[Tensor]:
    """The plain twin: one unpadded row per response, all logits."""
    found = []
    for prompt, responses in groups:
        for response in responses:
            row = torch.tensor([[*prompt, *response]])
            logits = model(input_ids=row, use_cache=False).logits[0]
            table = logits.double().log_softmax(-1)
            found.append(torch.stack([table[len(prompt) - 1 + i, token] for i, token in enumerate(response)]))
    return found


def gradients(model: nn.Module, logps: list[Tensor]) -> dict[str, Tensor]:
    """Gradients of a weighted sum with random weights, the same for equal shapes."""
    generator = torch.Generator().manual_seed(5)
    model.zero_grad(set_to_none=True)
    flat = torch.cat(logps)
    (flat * torch.randn(len(flat), generator=generator, dtype=torch.float64).to(flat.dtype)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


CASES = [("sdpa", name) for name in MODELS] + [("eager", name) for name in EAGER]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_layouts_and_tiles_equal_one_by_one_in_float64(kind: str, name: str) -> None:
    model = build((MODELS if kind == "sdpa" else EAGER)[name], torch.float64)
    layouts = ("auto", "packed", "shared", "padded") if name != "gemma2-sliding" else ("auto", "shared", "padded")
    ways: list[dict[str, Any]] = [{"layout": layout} for layout in layouts]
    ways += [{"tile": 5}, {"layout": "shared", "tile": 5}]
    with warnings.catch_warnings(), KeepFloat64():
        warnings.simplefilter("error")  # no model here may need a fall-back
        expected = one_by_one(model, GROUPS)
        expected_gradients = gradients(model, expected)
        for way in ways:
            found = response_logps(model, GROUPS, **way)
            assert [len(t) for t in found] == [6, 1, 9, 3, 5, 8, 8, 4, 1]
            torch.testing.assert_close(torch.cat(found), torch.cat(expected), rtol=0, atol=1e-10)
            found_gradients = gradients(model, found)
            assert found_gradients.keys() == expected_gradients.keys()
            for key, gradient in expected_gradients.items():
                torch.testing.assert_close(found_gradients[key], gradient, rtol=1e-9, atol=1e-9)
    if name == "llama-lora":
        assert all("lora" in key for key in expected_gradients)


SDPA_FLOAT32 = ("llama", "llama-lora", "qwen3", "gpt-neox", "gemma3-sliding", "mistral-sliding")


@pytest.mark.parametrize(
    ("kind", "name"), [("sdpa", n) for n in SDPA_FLOAT32] + [("eager", "llama"), ("eager", "gemma2-sliding")]
)
def test_layouts_equal_one_by_one_in_float32(kind: str, name: str) -> None:
    model = build((MODELS if kind == "sdpa" else EAGER)[name], torch.float32)
    with torch.no_grad():
        expected = torch.cat(one_by_one(model, GROUPS)).float()
        for way in ({"layout": "auto"}, {"layout": "shared"}, {"layout": "padded", "tile": 5}):
            found = torch.cat(response_logps(model, GROUPS, **way))  # type: ignore[arg-type]
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected, rtol=0, atol=4e-5)


@pytest.mark.parametrize("make", [gemma3, mistral, qwen2_sliding])
def test_the_window_matters_in_these_tests(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(make, torch.float64)
    expected = torch.cat(response_logps(model, GROUPS, layout="padded"))
    monkeypatch.setattr(compute, "attention_mask", lambda packed, dtype, window=None: attention_mask(packed, dtype))
    monkeypatch.setattr(compute, "segments", lambda spans, device, window=None: segments(spans, device))
    for layout in ("shared", "packed"):
        wrong = compute._forward(model, pack(GROUPS, layout), "gathered").logps  # type: ignore[arg-type]
        assert (wrong - expected).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_and_scored_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**GQA, "initializer_range": 0.1})).eval()
    expected = torch.cat(one_by_one(model, GROUPS)).float()
    half = copy.deepcopy(model).to(dtype)
    found = torch.cat(response_logps(half, GROUPS, layout="shared"))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_shared_prompts_work_under_bfloat16_autocast(attention: str) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**GQA, "initializer_range": 0.1}, attn_implementation=attention)).eval()
    expected = torch.cat(one_by_one(model, GROUPS)).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.cat(response_logps(model, GROUPS, layout="shared"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1)
    assert (found - expected).abs().max() > 1e-4  # autocast was on


def test_micro_batches_come_back_in_the_order_given() -> None:
    model = build(llama, torch.float64)
    expected = response_logps(model, GROUPS)
    for layout in ("packed", "shared", "padded"):
        for budget in (1, 40, 10_000):
            found = response_logps(model, GROUPS, layout=layout, tokens_per_batch=budget)  # type: ignore[arg-type]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    sums = summed_logps(model, GROUPS, tokens_per_batch=40)
    torch.testing.assert_close(sums, torch.stack([t.sum() for t in expected]))
    assert response_logps(model, []) == [] and len(summed_logps(model, [])) == 0


def test_temperature_divides_the_logits() -> None:
    model = build(gemma3, torch.float64)
    prompt, response = ids(9, 1), ids(4, 2)
    logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, 8:12].double()
    expected = (logits / 0.7).log_softmax(-1)[torch.arange(4), torch.tensor(response)]
    for tile in (None, 2):
        (found,) = response_logps(model, [(prompt, [response])], temperature=0.7, tile=tile)
        torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        response_logps(model, [(prompt, [response])], temperature=0.0)


def test_the_head_sees_predicting_positions_only_and_a_tile_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(llama, torch.float32)
    packed = pack(GROUPS, "packed")
    packed_scores(model, packed)  # the probe has its own forward passes
    seen: list[int] = []
    plain = head._logits

    def spy(hidden: Tensor, *args: Any, **named: Any) -> tuple[Tensor, torch.dtype]:
        seen.append(len(hidden))
        return plain(hidden, *args, **named)

    monkeypatch.setattr(head, "_logits", spy)
    packed_scores(model, packed).logps.sum().backward()
    assert seen == [45]  # the backward pass overwrites them
    seen.clear()
    packed_scores(model, packed, tile=10).logps.sum().backward()
    assert max(seen) <= 10 and sum(seen) == 2 * 45  # once more in the backward pass
    seen.clear()
    model.lm_head.weight.requires_grad_(False)
    packed_scores(model, packed, tile=10).logps.sum().backward()
    assert max(seen) <= 10 and sum(seen) == 45  # a frozen head never again


def test_an_adapter_on_the_head_means_all_its_logits_at_once() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = get_peft_model(llama(), config).double().eval()
    with pytest.warns(UserWarning, match="all logits of a batch at once"):
        found = torch.cat(response_logps(model, GROUPS))
    torch.testing.assert_close(found, torch.cat(one_by_one(model, GROUPS)), rtol=0, atol=1e-6)


def test_entropy_and_greedy_match_come_out_of_the_same_pass() -> None:
    model = build(llama, torch.float64)
    packed = pack(GROUPS, "packed")
    for temperature in (1.0, 0.7):
        found = packed_scores(model, packed, tile=7, temperature=temperature, statistics=True)
        table = compute._forward(model, packed, "gathered", None, temperature, True)
        torch.testing.assert_close(found.entropy, table.entropy)
        assert found.greedy is not None and torch.equal(found.greedy, cast(Tensor, table.greedy))
        torch.testing.assert_close(found.logps, table.logps)


def test_no_position_is_computed_for_nothing() -> None:
    model = build(llama, torch.float32)
    response_logps(model, GROUPS)
    seen: list[tuple[int, ...]] = []
    model.model.layers[0].register_forward_pre_hook(lambda m, args: seen.append(tuple(args[0].shape[:2])))  # type: ignore[union-attr, index]
    response_logps(model, GROUPS)
    assert seen == [(1, sum(len(p) + sum(map(len, rs)) for p, rs in GROUPS))]


def test_gradient_checkpointing_takes_rows_with_a_mask() -> None:
    model = build(llama, torch.float64)
    expected = gradients(model, response_logps(model, GROUPS))
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    found = gradients(model, response_logps(model, GROUPS))
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-9, atol=1e-6)
    with pytest.raises(ValueError, match="use 'shared'"):
        response_logps(model, GROUPS, layout="packed")


def test_mamba_falls_back_to_padded_rows_and_says_so_once() -> None:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=VOCAB, hidden_size=32, state_size=4, num_hidden_layers=2, initializer_range=0.3)
    model = MambaForCausalLM(config).eval()
    with pytest.warns(UserWarning, match="'mamba'.*recurrent") as caught:
        found = [torch.cat(response_logps(model, GROUPS)) for _ in range(3)][-1]
    assert sum("mamba" in str(w.message) for w in caught) == 1
    torch.testing.assert_close(found, torch.cat(one_by_one(model, GROUPS)).float(), rtol=0, atol=4e-5)
    with pytest.raises(ValueError, match=r"cannot share a prompt.*layout='padded'"):
        response_logps(model, GROUPS, layout="shared")


class Forgetful(LlamaForCausalLM):
    """Takes positions and a mask, and ignores the mask: only a forward pass can find it out."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):  # type: ignore[no-untyped-def]
        return super().forward(input_ids=input_ids, position_ids=position_ids, **kwargs)


class Squared(LlamaForCausalLM):
    """Treats its logits in a way nobody could guess from the config."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):  # type: ignore[no-untyped-def]
        output = super().forward(input_ids, attention_mask, position_ids, **kwargs)
        output.logits = output.logits.square()
        return output


class Stubborn(LlamaForCausalLM):
    """Has a head that is not the module it names."""

    def get_output_embeddings(self) -> nn.Module:
        return nn.Linear(32, VOCAB)


def test_the_probe_finds_a_model_that_leaks_between_responses() -> None:
    model = build(lambda: Forgetful(LlamaConfig(**GQA)), torch.float32)
    with pytest.warns(UserWarning, match="Forgetful.*off by .* nats"):
        found = torch.cat(response_logps(model, GROUPS))
    torch.testing.assert_close(found, torch.cat(one_by_one(model, GROUPS)).float(), rtol=0, atol=4e-5)


def test_unknown_treatment_of_logits_is_kept_and_only_tiling_is_given_up() -> None:
    model = build(lambda: Squared(LlamaConfig(**GQA)), torch.float64)
    with pytest.warns(UserWarning, match="all logits of a batch at once") as caught:
        found = [torch.cat(response_logps(model, GROUPS, layout="shared", tile=5)) for _ in range(2)][-1]
    assert len(caught) == 1
    torch.testing.assert_close(found, torch.cat(one_by_one(model, GROUPS)), rtol=0, atol=1e-10)


def test_a_head_that_cannot_be_reached_means_full_logits() -> None:
    model = build(lambda: Stubborn(LlamaConfig(**GQA)), torch.float64)
    with pytest.warns(UserWarning, match="logits at every position"):
        found = torch.cat(response_logps(model, GROUPS, layout="shared"))
    torch.testing.assert_close(found, torch.cat(one_by_one(model, GROUPS)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("layers_too", [True, False])
def test_a_sharded_model_keeps_its_gradients(layers_too: bool, tmp_path: Path) -> None:
    """FSDP2 gathers weights in hooks of the model's own forward, which calling trunk and head apart would miss."""
    model = build(llama, torch.float32)
    plain = gradients(model, response_logps(model, GROUPS, layout="shared"))
    sharded = copy.deepcopy(model)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        for layer in sharded.model.layers if layers_too else ():  # type: ignore[union-attr]
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        for way in ({}, {"tile": 5}, {"layout": "shared"}):
            sharded.zero_grad()  # here, since after the forward pass the root holds its gathered weights
            found = gradients(sharded, response_logps(sharded, GROUPS, **way))  # type: ignore[arg-type]
            assert found.keys() == plain.keys()
            for key, gradient in found.items():
                assert isinstance(gradient, DTensor)
                torch.testing.assert_close(gradient.full_tensor(), plain[key], rtol=1e-3, atol=1e-3)
    finally:
        dist.destroy_process_group()


def test_the_probe_leaves_modes_hooks_gradients_and_random_state_alone() -> None:
    model = build(llama, torch.float32).train()
    model.model.layers[1].eval()  # type: ignore[union-attr, index]
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    summed_logps(model, GROUPS, tile=5)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert not model.lm_head._forward_pre_hooks  # type: ignore[union-attr]


def test_prompt_learning_adapters_are_refused() -> None:
    model = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="use LoRA"):
        response_logps(model, GROUPS)


def test_auto_packs_and_else_shares_only_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(llama, torch.float32)
    rows: list[int] = []
    long, short = [(ids(30, 1), [ids(3, 2), ids(3, 3)])], [(ids(1, 1), [ids(30, 2), ids(30, 3)])]
    summed_logps(model, long)
    model.register_forward_pre_hook(lambda m, a, kw: rows.append(len(kw["input_ids"])), with_kwargs=True)
    summed_logps(model, long)
    summed_logps(model, short)
    assert rows == [1, 1]  # one row without filling, whatever the lengths
    monkeypatch.setattr(compute._support(model), "packed", "for this test")
    summed_logps(model, long)
    summed_logps(model, short)
    assert rows[2:] == [1, 2]
    assert sharing_gain(long) == pytest.approx(66 / 36) and sharing_gain(short) == pytest.approx(62 / 61)
    assert sharing_gain(long, hidden_size=8) < sharing_gain(long, hidden_size=4096) < sharing_gain(long)


def test_pack_lays_a_group_out_by_hand() -> None:
    packed = pack([([5, 6], [[7, 8], [9]]), ([4], [[3]])], "shared")
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9], [4, 3, 0, 0, 0]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 2], [0, 1, 0, 0, 0]]
    assert packed.segments.tolist() == [[0, 0, 1, 1, 2], [0, 1, -1, -1, -1]]
    assert packed.predictors.tolist() == [1, 2, 1, 5]
    assert packed.targets.tolist() == [7, 8, 9, 3]
    assert packed.owners.tolist() == [0, 0, 1, 2] and packed.num_computed == 10 and packed.shares_prompt
    sums = packed.sum_by_response(torch.tensor([1.0, 2.0, 4.0, 8.0], requires_grad=True))
    assert sums.tolist() == [3.0, 4.0, 8.0] and sums.requires_grad
    visible = attention_mask(packed, torch.float32)[0, 0] == 0
    assert visible.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    windowed = attention_mask(packed, torch.float32, window=2)[0, 0] == 0
    assert windowed.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 1, 0, 0, 1],
    ]
    padded = pack([([5, 6], [[7, 8], [9]])], "padded")
    assert padded.input_ids.tolist() == [[5, 6, 7, 8], [5, 6, 9, 0]] and padded.predictors.tolist() == [1, 2, 5]
    assert not padded.shares_prompt


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([([1], [[2]]), ([], [[2]])], "group 1 has an empty prompt.*BOS token, or a non-empty prompt"),
        ([([1], [[2], []])], r"group 0 has response lengths \[1, 0\]"),
        ([([1], [])], r"group 0 has response lengths \[\]"),
        ([], "got none"),
    ],
)
def test_pack_refuses_what_cannot_be_scored(groups: list[Group], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(groups, "shared")


@pytest.mark.parametrize("layout", ["packed", "shared", "padded"])
def test_split_by_tokens_keeps_the_budget_and_every_group(layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (60, 3), generator=generator).tolist()
    groups: list[Group] = [([1] * p, [[2] * a, [2] * b]) for p, a, b in lengths]
    batches = split_by_tokens(groups, 150, layout)  # type: ignore[arg-type]
    assert sorted(i for batch in batches for i in batch) == list(range(60))
    sizes = [pack([groups[i] for i in batch], layout).num_computed for batch in batches]  # type: ignore[arg-type]
    assert all(size <= 150 or len(batch) == 1 for size, batch in zip(sizes, batches, strict=True))
    # greedy is full: no batch could have taken the first group of the next one
    for left, right in pairwise(batches):
        together = pack([groups[i] for i in [*left, right[0]]], layout).num_computed  # type: ignore[arg-type]
        assert together > 150
    with pytest.raises(ValueError, match="tokens_per_batch"):
        split_by_tokens(groups, 0)
