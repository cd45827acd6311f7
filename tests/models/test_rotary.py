"""Rotary embeddings that depend on length: every row has the numbers that a fresh model gives it alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, PreTrainedModel

from lightning_rlhf.generation.base import Decoding, Request
from lightning_rlhf.generation.engine import DecodeEngine
from lightning_rlhf.generation.lanes import RecomputedLanes, SlotLanes, lanes_for
from lightning_rlhf.logprobs.compute import choose_layout, packed_scores, response_logps
from lightning_rlhf.logprobs.packing import Group, pack
from lightning_rlhf.logprobs.prefix_tree import next_token_logps
from lightning_rlhf.logprobs.scores import head_outputs
from lightning_rlhf.models.reference import FrozenCopyReference
from lightning_rlhf.randomness import Key
from lightning_rlhf.types import Prompt


WINDOW = 32
SIZE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


def evaluated(model: Any) -> PreTrainedModel:
    evaluating: PreTrainedModel = model.eval()
    return evaluating


def longrope() -> PreTrainedModel:
    torch.manual_seed(0)
    half = SIZE["hidden_size"] // SIZE["num_attention_heads"] // 2
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * half, "long_factor": [4.0] * half}
    config = Phi3Config(
        **SIZE,
        max_position_embeddings=128,
        original_max_position_embeddings=WINDOW,
        rope_parameters={**rope, "original_max_position_embeddings": WINDOW},
    )
    return evaluated(Phi3ForCausalLM(config))


def dynamic() -> PreTrainedModel:
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    return evaluated(LlamaForCausalLM(LlamaConfig(**SIZE, max_position_embeddings=WINDOW, rope_parameters=rope)))


def ids(n: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(1, 64, (n,), generator=torch.Generator().manual_seed(seed)).tolist())


GROUPS: list[Group] = [
    (ids(10, 1), [ids(6, 2), ids(9, 3)]),  # within the window
    (ids(28, 4), [ids(3, 5), ids(14, 6)]),  # one within, one beyond
    (ids(45, 7), [ids(5, 8), ids(20, 9)]),  # beyond
]


def alone(make: Callable[[], PreTrainedModel], row: tuple[int, ...]) -> Any:
    """What transformers computes for a row in a model that has seen no other."""
    with torch.no_grad():
        return make()(input_ids=torch.tensor([row]), output_hidden_states=True)


def expected_logps(make: Callable[[], PreTrainedModel], prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    logps: Tensor = alone(make, (*prompt, *response)).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    return logps.gather(-1, torch.tensor(response)[:, None]).squeeze(-1)


@pytest.mark.parametrize("make", [longrope, dynamic])
@pytest.mark.parametrize("budget", [None, 70])
def test_rows_are_scored_by_their_own_length(make: Callable[[], PreTrainedModel], budget: int | None) -> None:
    model = make()
    for groups in (GROUPS, GROUPS[::-1], GROUPS[:1]):  # in any order, and after longer ones
        found = iter(response_logps(model, groups, tokens_per_batch=budget))
        for prompt, responses in groups:
            for response in responses:
                torch.testing.assert_close(next(found), expected_logps(make, prompt, response), rtol=0, atol=2e-4)
    assert choose_layout(model, GROUPS) == "padded"
    with pytest.raises(ValueError, match="rotary embeddings depend on the length"):
        packed_scores(model, pack(GROUPS, "packed"))


@pytest.mark.parametrize("make", [longrope, dynamic])
def test_scores_and_judgments_too(make: Callable[[], PreTrainedModel]) -> None:
    model: Any = make()
    head = torch.nn.Linear(32, 1, bias=False)
    with torch.no_grad():
        found = head_outputs(model.base_model, head, GROUPS).view(-1).tolist()
        rows = [(*prompt, *response) for prompt, responses in GROUPS for response in responses]
        for value, row in zip(found, rows, strict=True):
            states = alone(make, row).hidden_states[-1]
            assert value == pytest.approx(head(states[0, -1]).item(), abs=2e-4)
    chosen = next_token_logps(make(), rows, [3, 7])
    for logps, row in zip(chosen, rows, strict=True):
        torch.testing.assert_close(logps, alone(make, row).logits[0, -1].log_softmax(-1)[[3, 7]], rtol=0, atol=2e-4)


@pytest.mark.filterwarnings("ignore:.*decodes without a cache")
@pytest.mark.parametrize("make", [longrope, dynamic])
def test_rows_are_decoded_by_their_own_length(make: Callable[[], PreTrainedModel], tiny_policy: Path) -> None:
    model = make()
    reference = FrozenCopyReference(copy.deepcopy(model))
    engine = DecodeEngine(
        model,
        reference,
        AutoTokenizer.from_pretrained(tiny_policy),
        beta=1.0,
        decoding=Decoding(max_new_tokens=6, rows=8),
        eos_ids=[63],
    )
    prompts = [ids(n, n) for n in (8, 20, 29, 40)]
    for kept in (prompts[:2], prompts[3:], prompts, prompts[:1]):
        requests = [Request(Prompt(i, prompt, ""), Key((i,)), mix=0.5) for i, prompt in enumerate(kept)]
        for prompt, response in zip(kept, engine.generate(requests), strict=True):
            assert response.policy_logps is not None
            for n, (token, logp) in enumerate(zip(response.ids, response.policy_logps, strict=True)):
                row = alone(make, (*prompt, *response.ids[:n])).logits[0, -1].log_softmax(-1)
                assert logp == pytest.approx(row[token].item(), abs=2e-4), (len(prompt), n)
            assert response.reference_logps == pytest.approx(response.policy_logps, abs=2e-4)


def test_the_cache_is_kept_where_no_text_crosses_the_window() -> None:
    for make, beyond in ((longrope, SlotLanes), (dynamic, RecomputedLanes)):
        model = make()
        assert lanes_for(model, [8, 20], 6) is SlotLanes
        with pytest.warns(UserWarning, match="beyond 32 tokens. Lower data.prompt_options.max_prompt_tokens"):
            assert lanes_for(model, [29], 6) is RecomputedLanes
        assert lanes_for(model, [40, 20], 6) is beyond


def test_gradients_are_those_of_single_rows() -> None:
    model, single = longrope(), longrope()
    total: Any = torch.cat(response_logps(model, GROUPS)).sum()
    total.backward()
    for prompt, responses in GROUPS:
        for response in responses:
            logps = single(input_ids=torch.tensor([(*prompt, *response)])).logits[0].log_softmax(-1)
            logps[len(prompt) - 1 : -1].gather(-1, torch.tensor(response)[:, None]).sum().backward()
    for ours, theirs in zip(model.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3)
