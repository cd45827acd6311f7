"""Scalar scores in every layout against one row per response."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    Gemma3TextConfig,
    Gemma3TextModel,
    GPTNeoXConfig,
    GPTNeoXModel,
    LlamaConfig,
    LlamaModel,
    MambaConfig,
    MambaModel,
    Qwen3Config,
    Qwen3Model,
)

from lightning_rlhf.logprobs.packing import Group
from lightning_rlhf.logprobs.scores import response_scores, response_values


VOCAB = 47
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
GQA = {**COMMON, "num_key_value_heads": 2, "head_dim": 8}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaModel(LlamaConfig(**GQA)),
    "llama-lora": lambda: get_peft_model(
        LlamaModel(LlamaConfig(**GQA)), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    ),
    "qwen3": lambda: Qwen3Model(Qwen3Config(**GQA)),
    "gpt-neox": lambda: GPTNeoXModel(GPTNeoXConfig(**COMMON)),
    "gemma3": lambda: Gemma3TextModel(Gemma3TextConfig(**GQA, sliding_window=5, query_pre_attn_scalar=8)),
}


def ids(length: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


GROUPS: list[Group] = [
    (ids(14, 1), [ids(6, 2), ids(1, 3), ids(9, 4)]),
    (ids(7, 6), [ids(5, 7)]),
    (ids(1, 10), [ids(1, 11), ids(4, 12)]),
]


def alone(trunk: nn.Module, head: nn.Module, groups: list[Group]) -> Tensor:
    rows = [torch.tensor([[*prompt, *response]]) for prompt, responses in groups for response in responses]
    return torch.cat([head(trunk(input_ids=row).last_hidden_state[0, -1]) for row in rows])


@pytest.mark.parametrize("name", MODELS)
def test_layouts_equal_one_by_one(name: str) -> None:
    torch.manual_seed(0)
    trunk, head = MODELS[name]().double().eval(), nn.Linear(32, 1, bias=False).double()
    parameters = [p for p in (*trunk.parameters(), *head.parameters()) if p.requires_grad]
    expected = alone(trunk, head, GROUPS)
    # pairs of scores, as Bradley and Terry compare them
    gradient = torch.autograd.grad(sum(a.sigmoid() - b for a, b in pairwise(expected)), parameters, allow_unused=True)
    for layout in ("auto", "packed", "shared", "padded"):
        for budget in (None, 20):
            found = response_scores(trunk, head, GROUPS, layout=layout, tokens_per_batch=budget)  # type: ignore[arg-type]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            other = torch.autograd.grad(sum(a.sigmoid() - b for a, b in pairwise(found)), parameters, allow_unused=True)
            torch.testing.assert_close(other, gradient, rtol=1e-3, atol=1e-4)


def test_a_recurrent_trunk_gets_rows_of_its_own() -> None:
    torch.manual_seed(0)
    trunk = MambaModel(MambaConfig(vocab_size=VOCAB, hidden_size=32, state_size=4, num_hidden_layers=2)).eval()
    head = nn.Linear(32, 1)
    torch.testing.assert_close(response_scores(trunk, head, GROUPS), alone(trunk, head, GROUPS), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="cannot compute layout 'packed'"):
        response_scores(trunk, head, GROUPS, layout="packed")


@pytest.mark.parametrize("name", MODELS)
def test_values_are_those_of_the_states_before_each_token(name: str) -> None:
    torch.manual_seed(0)
    trunk, head = MODELS[name]().double().eval(), nn.Linear(32, 1).double()
    expected = []
    for prompt, responses in GROUPS:
        for response in responses:
            hidden = trunk(input_ids=torch.tensor([[*prompt, *response]])).last_hidden_state[0]
            # the first token is sampled at the end of the prompt, and nothing is sampled behind the last one
            expected.append(head(hidden[len(prompt) - 1 : -1]).squeeze(1))
    for layout, tokens in (("auto", None), ("padded", None), ("auto", 25)):
        found = response_values(trunk, head, GROUPS, layout=layout, tokens_per_batch=tokens)
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
