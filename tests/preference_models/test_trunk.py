"""Frozen features: sums over tokens as in a forward pass of each row, and the same bits with or without the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_rlhf.models.options import ModelOptions
from lightning_rlhf.preference_models.trunk import CHUNK, FrozenTrunk
from lightning_rlhf.types import Prompt, Response


CPU = torch.device("cpu")


def rows(count: int, seed: int = 0) -> tuple[list[Prompt], list[Response]]:
    """Random prompts and responses of one to nine tokens; half of the responses end with EOS, token 0."""
    generator = torch.Generator().manual_seed(seed)
    prompts, responses = [], []
    for number in range(count):
        sizes = torch.randint(1, 10, (2,), generator=generator).tolist()
        prompt, ids = (tuple(torch.randint(0, 200, (size,), generator=generator).tolist()) for size in sizes)
        ended = number % 2 == 0
        prompts.append(Prompt(number, prompt, ""))
        responses.append(Response((*ids, 0) if ended else ids, "", "eos" if ended else "length"))
    return prompts, responses


@pytest.fixture(scope="module")
def trunk(tiny_policy: Path) -> FrozenTrunk:
    return FrozenTrunk(str(tiny_policy), ModelOptions(), CPU)


def test_features_are_sums_over_the_tokens_of_each_row(tiny_policy: Path, trunk: FrozenTrunk) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_policy).eval()
    prompts, responses = rows(7)
    # token 0 inside of a response is a token like any other, though it is the pad token
    responses[1] = Response((0, 5, 0), "", "length")
    found = trunk.features(prompts, responses)
    for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids = response.ids[:-1] if response.finish_reason == "eos" else response.ids
        row = torch.tensor([[*prompt.ids, *ids]])
        with torch.no_grad():
            states = [state[0] for state in model(row, output_hidden_states=True).hidden_states]
        start = len(prompt.ids)
        # two layers: embedding, middle, last
        torch.testing.assert_close(found.prompt[number], states[0][:start].mean(0))
        torch.testing.assert_close(found.tokens[number], states[0][start:].sum(0))
        torch.testing.assert_close(found.middle[number], states[1][start:].sum(0), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.hidden[number], states[2][start:].sum(0), atol=1e-4, rtol=1e-4)
        assert int(found.lengths[number]) == len(ids)


def test_empty_rows_have_features_of_zero(trunk: FrozenTrunk) -> None:
    found = trunk.features([Prompt(0, (), "")], [Response((0,), "", "eos")])
    assert float(found.prompt.abs().sum() + found.tokens.abs().sum() + found.hidden.abs().sum()) == 0
    assert found.lengths.tolist() == [0]
    assert trunk.features([], []).hidden.shape == (0, trunk.width)


def test_the_cache_changes_no_bit(tiny_policy: Path, trunk: FrozenTrunk) -> None:
    prompts, responses = rows(CHUNK + 20, seed=1)
    # fresh rows before, as silver labels compute them, and then a list that grows as the ledger does
    trunk.features(prompts[10:30], responses[10:30])
    trunk.features(prompts[: CHUNK + 4], responses[: CHUNK + 4])
    grown = trunk.features(prompts, responses)
    fresh = FrozenTrunk(str(tiny_policy), ModelOptions(), CPU, cached_rows=0).features(prompts, responses)
    assert all(torch.equal(getattr(grown, name), getattr(fresh, name)) for name in ("prompt", "tokens", "hidden"))


def test_autocast_of_the_training_step_does_not_reach_it(tiny_policy: Path, trunk: FrozenTrunk) -> None:
    prompts, responses = rows(6, seed=3)
    with torch.autocast("cpu", torch.bfloat16):
        inside = FrozenTrunk(str(tiny_policy), ModelOptions(), CPU).features(prompts, responses)
    assert torch.equal(inside.hidden, trunk.features(prompts, responses).hidden)


def test_chunks_are_computed_once_and_the_cache_is_bounded(tiny_policy: Path) -> None:
    trunk = FrozenTrunk(str(tiny_policy), ModelOptions(), CPU, cached_rows=2 * CHUNK)
    calls = []
    trunk._trunk.register_forward_hook(lambda *_: calls.append(1))
    first, second, third = (rows(CHUNK, seed) for seed in range(3))
    for part in (first, second, first, third, first):
        trunk.features(*part)
    assert len(calls) == 3
    # the second was used least recently, and made room for the third
    trunk.features(*second)
    assert len(calls) == 4


def test_the_limit_of_tokens_splits_batches_and_nothing_else(tiny_policy: Path, trunk: FrozenTrunk) -> None:
    prompts, responses = rows(9, seed=2)
    split = FrozenTrunk(str(tiny_policy), ModelOptions(scoring_batch_tokens=20), CPU)
    sizes = []
    split._trunk.register_forward_hook(
        lambda _, __, kwargs, ___: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    torch.testing.assert_close(
        split.features(prompts, responses).hidden, trunk.features(prompts, responses).hidden, atol=1e-4, rtol=1e-4
    )
    assert len(sizes) > 3
    assert max(sizes) <= 20


def test_a_trunk_with_its_own_tokenizer_reads_texts(tiny_policy: Path, trunk: FrozenTrunk) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    texts = [("Name a color.", " Red, and blue."), ("Why?", " Because."), ("A very long question", "")]
    # ids of another vocabulary, which this trunk does not read
    prompts = [Prompt(number, (500,), prompt) for number, (prompt, _) in enumerate(texts)]
    responses = [Response((501, 2), response, "eos") for _, response in texts]
    found = FrozenTrunk(str(tiny_policy), ModelOptions(), CPU, tokenizer=tokenizer).features(prompts, responses)

    def encoded(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False).input_ids)

    expected = trunk.features(
        [Prompt(0, tuple(tokenizer(prompt).input_ids), "") for prompt, _ in texts],
        [Response(encoded(response), "", "length") for _, response in texts],
    )
    for name in ("prompt", "tokens", "middle", "hidden", "lengths"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert found.lengths[0] > 0
