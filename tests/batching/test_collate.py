"""Collating: swap symmetry, ties, what is known and what is not, and the way to the device."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_rlhf.batching.batches import PreferenceBatch
from lightning_rlhf.batching.collate import collate_preferences
from lightning_rlhf.logprobs.compute import summed_logps
from lightning_rlhf.types import Comparison, Label, Preference, Prompt, Response


EOS = 2


def response(
    *ids: int, policy: float | None = None, reference: float | None = None, source: str = "policy"
) -> Response:
    """A response whose tokens all have the log-probabilities given."""
    spread = lambda value: None if value is None else (value,) * len(ids)  # noqa: E731
    return Response(ids, "text", "eos", spread(policy), spread(reference), source)


def preference(a: Response, b: Response, probability: float, index: int = 0, weight: float = 1.0) -> Preference:
    prompt = Prompt(index, (1, 5 + index), "prompt")
    return Preference(Comparison(prompt, a, b, weight=weight), Label(probability))


A = response(7, EOS, EOS, policy=-1.0, reference=-2.0)
B = response(9, policy=-0.5, reference=-0.25, source="reference")


def assert_equal(left: PreferenceBatch, right: PreferenceBatch) -> None:
    for field in dataclasses.fields(PreferenceBatch):
        first, second = getattr(left, field.name), getattr(right, field.name)
        if isinstance(first, Tensor):
            torch.testing.assert_close(first, second, equal_nan=True)
        else:
            assert first == second, field.name


def test_a_batch_worked_out_by_hand() -> None:
    batch = collate_preferences([preference(A, B, 0.75), preference(A, B, 0.25, index=1, weight=3.0)])
    assert batch.prompts == [(1, 5), (1, 6)] and len(batch) == 2
    assert batch.chosen == [(7, EOS, EOS), (9,)] and batch.rejected == [(9,), (7, EOS, EOS)]
    assert batch.label.tolist() == [0.75, 0.75] and batch.weight.tolist() == [1.0, 3.0]
    assert batch.reference_chosen_logps.tolist() == [-6.0, -0.25]
    assert batch.reference_rejected_logps.tolist() == [-0.25, -6.0]
    assert batch.sampling_chosen_logps.tolist() == [-3.0, -0.5]
    assert batch.sampling_rejected_logps.tolist() == [-0.5, -3.0]
    assert batch.chosen_from_reference.tolist() == [False, True]
    assert batch.rejected_from_reference.tolist() == [True, False]
    assert batch.has_reference and batch.has_sampling
    assert batch.groups() == [((1, 5), ((7, EOS, EOS), (9,))), ((1, 6), ((9,), (7, EOS, EOS)))]


@pytest.mark.parametrize("probability", [0.0, 0.125, 0.625, 1.0])
def test_swapping_the_responses_changes_nothing(probability: float) -> None:
    straight = preference(A, B, probability, weight=2.0)
    swapped = Preference(straight.comparison.swap(), Label(1.0 - probability))
    assert_equal(collate_preferences([straight]), collate_preferences([swapped]))


def test_a_tie_keeps_the_order() -> None:
    batch = collate_preferences([preference(A, B, 0.5), preference(B, A, 0.5)])
    assert batch.chosen == [A.ids, B.ids] and batch.label.tolist() == [0.5, 0.5]


def test_what_is_unknown_is_nan_for_that_response_alone() -> None:
    bare = response(4, 4)
    batch = collate_preferences([preference(A, bare, 1.0), preference(A, B, 1.0)])
    assert not batch.has_reference and not batch.has_sampling
    assert batch.reference_chosen_logps.tolist() == [-6.0, -6.0]
    assert math.isnan(batch.reference_rejected_logps[0]) and batch.reference_rejected_logps[1] == -0.25
    only_policy = collate_preferences([preference(response(4, policy=-1.0), response(5, policy=-2.0), 1.0)])
    assert only_policy.has_sampling and not only_policy.has_reference


def test_trailing_eos_tokens_count_whatever_the_pad_token_is() -> None:
    """Responses end where their ids end: a pad id equal to EOS, a common cause of lost EOS tokens, plays no part."""
    torch.manual_seed(0)
    config = {
        "vocab_size": 12,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "initializer_range": 0.5,
    }
    batch = collate_preferences(
        [preference(A, B, 1.0), preference(response(EOS), response(3, 4, 5, EOS), 0.0, index=1)]
    )
    found: list[Tensor] = []
    weights: dict[str, Tensor] = {}
    for pad in (None, EOS, 0, 7):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(**config, num_attention_heads=2, pad_token_id=pad, eos_token_id=EOS)
        ).eval()
        weights = weights or model.state_dict()  # transformers zeroes the embedding of the pad token
        model.load_state_dict(weights)
        found.append(summed_logps(model, batch.groups()).view(-1, 2))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
    prompt, chosen = batch.prompts[1], batch.chosen[1]
    logps = model(input_ids=torch.tensor([[*prompt, *chosen]])).logits[0].log_softmax(-1)
    expected = sum(logps[len(prompt) - 1 + i, token] for i, token in enumerate(chosen))
    torch.testing.assert_close(found[0][1, 0], expected)


def test_lightning_moves_the_batch_and_workers_hand_it_over() -> None:
    items = [preference(A, B, 0.25 * (i % 5), index=i) for i in range(5)]
    moved = move_data_to_device(collate_preferences(items), torch.device("meta"))
    assert isinstance(moved, PreferenceBatch) and moved.chosen_from_reference.device.type == "meta"
    assert moved.has_reference  # decided before the numbers left
    loader: DataLoader[Preference] = DataLoader(items, batch_size=2, collate_fn=collate_preferences, num_workers=1)  # type: ignore[arg-type]
    batches = list(loader)
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert_equal(batches[2], collate_preferences(items[4:]))


def test_passes_are_consecutive_parts_that_add_up_to_the_step() -> None:
    whole = collate_preferences([preference(A, B, 0.25 * i, index=i, weight=i) for i in range(5)])
    assert whole.split() == [whole]
    parts = dataclasses.replace(whole, micro_batches=(2, 2, 1), num_padding=1, num_global=2.0).split()
    for part, start, end in zip(parts, (0, 2, 4), (2, 4, 5), strict=True):
        alone = collate_preferences([preference(A, B, 0.25 * i, index=i, weight=i) for i in range(start, end)])
        assert_equal(part, dataclasses.replace(alone, num_global=2.0, num_padding=int(end == 5)))
        assert vars(part)["has_reference"]  # known of the whole, not asked again
    with pytest.raises(ValueError, match=r"micro_batches \(2, 2\) must be positive and add up to the 5 pairs"):
        dataclasses.replace(whole, micro_batches=(2, 2)).split()


def test_errors_name_the_preference_and_the_remedy() -> None:
    good = preference(A, B, 1.0)
    with pytest.raises(ValueError, match="got none"):
        collate_preferences([])
    unlabeled = Preference(good.comparison, Label(None, status="refused"))
    with pytest.raises(ValueError, match=r"preference 1 \(prompt 0\).*'refused'.*drop or retry"):
        collate_preferences([good, unlabeled])
    with pytest.raises(ValueError, match="without tokens"):
        collate_preferences([preference(response(), B, 1.0)])
    torn = Response((1, 2, 3), "", "eos", policy_logps=(-1.0, -1.0))
    with pytest.raises(ValueError, match="3 tokens with 2 policy_logps"):
        collate_preferences([preference(A, torn, 1.0, index=4)])
