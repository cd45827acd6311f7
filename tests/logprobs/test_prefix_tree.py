"""Texts laid out as a tree, against one row per text."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lightning_rlhf.logprobs.prefix_tree import MIN_SHARED_TOKENS, build_tree, next_token_logps, split_texts


VOCAB = 47
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
GQA = {**COMMON, "num_key_value_heads": 2, "head_dim": 8}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GQA)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GQA)),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**COMMON)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**GQA, sliding_window=5, query_pre_attn_scalar=8, final_logit_softcapping=5.0)
    ),
    "mamba": lambda: MambaForCausalLM(  # recurrent: computes each text in a row of its own
        MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=8)
    ),
}


def ids(length: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


PREAMBLE, CONTEXT = ids(40, 1), ids(25, 2)
TEXTS = [
    PREAMBLE + CONTEXT + ids(17, 3),
    PREAMBLE + CONTEXT + ids(18, 4),
    PREAMBLE + CONTEXT + ids(18, 4) + (7,),  # continues the one before by a token
    PREAMBLE + ids(30, 5),
    PREAMBLE + ids(30, 5),  # twice
    PREAMBLE,  # ends where the others part
    PREAMBLE[:20] + ids(3, 6),
    ids(9, 7),
    ids(1, 8),
]
TARGETS = (3, 0, 46)


def one_by_one(model: nn.Module) -> Tensor:
    rows = [model(input_ids=torch.tensor([text])).logits[0, -1].log_softmax(-1) for text in TEXTS]
    return torch.stack(rows)[:, list(TARGETS)]


@pytest.mark.parametrize("tokens_per_batch", [8192, 90, 1])
@pytest.mark.parametrize("name", MODELS)
def test_a_tree_gives_what_single_texts_give(name: str, tokens_per_batch: int) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        expected = one_by_one(model)
    found = next_token_logps(model, TEXTS, TARGETS, tokens_per_batch=tokens_per_batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_common_beginnings_are_computed_once() -> None:
    tree = build_tree(TEXTS)
    # preamble, context, 17, 18, its one token more, 30; PREAMBLE[:20] is shared by a text of 23 tokens
    assert len(tree.ids) == 40 + 25 + 17 + 18 + 1 + 30 + 3 + 9 + 1
    assert sum(map(len, TEXTS)) == 462


def words(tree_ids: tuple[int, ...], nodes: tuple[tuple[int, int], ...]) -> list[tuple[int, ...]]:
    """The text from the root to the end of each piece, and so what each token continues."""
    texts: list[tuple[int, ...]] = []
    start = 0
    for length, parent in nodes:
        texts.append((texts[parent] if parent >= 0 else ()) + tree_ids[start : start + length])
        start += length
    return texts


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_text_can_be_read_back(data: st.DataObject) -> None:
    trunks = [ids(MIN_SHARED_TOKENS + k, k) for k in range(3)]
    piece = st.one_of(st.sampled_from(trunks), st.lists(st.integers(0, 2), min_size=1, max_size=3).map(tuple))
    text = st.lists(piece, min_size=1, max_size=4).map(lambda parts: tuple(i for part in parts for i in part))
    texts = data.draw(st.lists(text, min_size=1, max_size=8))
    tree = build_tree(texts)
    assert sum(length for length, _ in tree.nodes) == len(tree.ids) == len(tree.positions)
    owners = [number for number, (length, _) in enumerate(tree.nodes) for _ in range(length)]
    paths = words(tree.ids, tree.nodes)
    starts = [i for i, owner in enumerate(owners) if i == 0 or owners[i - 1] != owner]
    for text, end in zip(texts, tree.ends, strict=True):
        number = owners[end]
        assert end == starts[number] + tree.nodes[number][0] - 1  # texts end where pieces end
        assert paths[number] == text
        assert tree.positions[end] == len(text) - 1
    assert len(tree.ids) <= sum(map(len, set(texts)))
    limit = data.draw(st.integers(1, 200))
    batches = split_texts(texts, limit)
    assert sorted(i for batch in batches for i in batch) == list(range(len(texts)))
    assert all(len(batch) == 1 or len(build_tree([texts[i] for i in batch]).ids) <= limit for batch in batches)


def test_an_empty_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="BOS"):
        next_token_logps(MODELS["llama"](), [(), (1,)], [0])
