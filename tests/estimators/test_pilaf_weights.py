"""Logit mixing at its edges, weights of pairs, and the running estimate of zz."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_rlhf.estimators import (
    RunningZZ,
    cosh_delta,
    differences,
    mix_logits,
    pair_weight,
    product_pair_distribution,
    tilt_probability,
    tilted_distributions,
    vanilla_pair_weight,
    zz_from_deltas,
)


def logits(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_each_row_is_mixed_by_its_own_coefficient() -> None:
    policy, reference = logits(0, 4, 5), logits(1, 4, 5)
    mix = torch.tensor([0.0, -1.0, 0.3, -0.3], dtype=torch.float64)
    mixed = mix_logits(policy, reference, mix)
    torch.testing.assert_close(mixed, (1 + mix[:, None]) * policy - mix[:, None] * reference, rtol=1e-13, atol=1e-13)
    assert torch.equal(mixed[0], policy[0])
    assert torch.equal(mixed[1], reference[1])
    # with a position axis the coefficient still belongs to the row
    wide = mix_logits(policy[:, None].expand(4, 3, 5), reference[:, None].expand(4, 3, 5), mix)
    assert torch.equal(wide, mixed[:, None].expand(4, 3, 5))


@pytest.mark.parametrize("junk", [-math.inf, math.inf, math.nan])
def test_the_unused_model_may_hold_anything(junk: float) -> None:
    good, bad = logits(0, 2, 5), torch.full((2, 5), junk, dtype=torch.float64)
    assert torch.equal(mix_logits(good, bad, torch.zeros(2)), good)
    assert torch.equal(mix_logits(bad, good, -torch.ones(2)), good)


@pytest.mark.parametrize("mix", [-1.0, -0.4, 0.0, 0.4, 2.0])
def test_tokens_that_both_models_forbid_stay_forbidden(mix: float) -> None:
    policy, reference = logits(0, 1, 5), logits(1, 1, 5)
    policy[0, 2] = reference[0, 2] = -math.inf
    mixed = mix_logits(policy, reference, torch.tensor([mix], dtype=torch.float64))
    assert torch.isneginf(mixed).tolist() == [[False, False, True, False, False]]
    assert not mixed.softmax(-1).isnan().any()


@pytest.mark.parametrize("mix", [-0.4, 0.4])
def test_tokens_that_the_policy_forbids_stay_forbidden(mix: float) -> None:
    policy, reference = logits(0, 1, 5), logits(1, 1, 5)
    policy[0, 2] = -math.inf
    mixed = mix_logits(policy, reference, torch.tensor([mix], dtype=torch.float64))
    assert torch.isneginf(mixed).tolist() == [[False, False, True, False, False]]
    assert not mixed.isnan().any()


def test_tokens_that_only_the_reference_forbids_end_pi_minus_and_break_pi_plus_loudly() -> None:
    policy, reference = logits(0, 1, 3), logits(1, 1, 3)
    reference[0, 1] = -math.inf
    assert mix_logits(policy, reference, torch.tensor([-0.4]))[0, 1] == -math.inf
    probabilities = mix_logits(policy, reference, torch.tensor([0.4])).softmax(-1)
    with pytest.raises(RuntimeError, match="nan"):
        torch.multinomial(probabilities, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_mixing_happens_in_float32_or_better_and_is_exact_for_equal_models(dtype: torch.dtype) -> None:
    policy, reference = 30 * logits(0, 3, 50, dtype=dtype), 30 * logits(1, 3, 50, dtype=dtype)
    mix = torch.tensor([0.1, -0.1, 0.7], dtype=torch.float64)
    mixed = mix_logits(policy, reference, mix)
    assert mixed.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = (1 + mix[:, None]) * policy.double() - mix[:, None] * reference.double()
    torch.testing.assert_close(mixed.double(), exact, rtol=0, atol=1e-4)
    assert torch.equal(mix_logits(policy, policy, mix), policy.to(mixed.dtype))


def test_cosh_is_clipped_and_never_overflows() -> None:
    delta = torch.tensor([0.0, 2.0, -2.0, 50.0, -1e4], dtype=torch.float64)
    clipped = cosh_delta(delta, limit=10.0)
    expected = [1.0, math.cosh(2), math.cosh(2), math.exp(10), math.exp(10)]
    torch.testing.assert_close(clipped, torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=0)
    assert cosh_delta(torch.tensor([1e4])).item() == math.inf
    assert cosh_delta(torch.tensor([1e4]), limit=2000.0).item() == math.inf
    assert cosh_delta(delta, limit=0.0).tolist() == [1.0] * 5
    with pytest.raises(ValueError, match="limit >= 0; got limit = -1"):
        cosh_delta(delta, limit=-1)


def test_zz_from_all_pairs_of_equally_likely_draws_is_exact() -> None:
    # Four samples stand for a uniform distribution over four responses: all 16 ordered pairs enumerate E[cosh delta].
    log_ratio = logits(0, 2, 4)
    log_policy = torch.full((2, 4), -math.log(4), dtype=torch.float64)
    laws = tilted_distributions(log_policy, log_policy - log_ratio, 0.5)
    deltas = 0.5 * differences(log_ratio)
    torch.testing.assert_close(zz_from_deltas(deltas.flatten(1)), laws.zz(), rtol=1e-13, atol=0)


def test_probability_and_weights_of_prompts() -> None:
    assert tilt_probability(1.0) == 0.5
    assert tilt_probability(3.0) == 0.75
    assert pair_weight(3.0, 1.0) == 2.0
    zz = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    torch.testing.assert_close(tilt_probability(zz), torch.tensor([1 / 2, 2 / 3, 6 / 7], dtype=torch.float64))
    assert pair_weight(zz, zz.mean()).mean().item() == pytest.approx(1, rel=1e-15)


def test_vanilla_weights_are_one_where_policy_equals_reference_and_clip() -> None:
    assert vanilla_pair_weight(torch.zeros(3), 1.0).tolist() == [1.0, 1.0, 1.0]
    clipped = vanilla_pair_weight(torch.tensor([100.0], dtype=torch.float64), 1.0, limit=2.0)
    assert clipped.item() == pytest.approx((1 + math.exp(2)) / 2, rel=1e-15)


def test_running_estimate_starts_at_one_and_stays_there_while_policy_equals_reference() -> None:
    running = RunningZZ()
    assert running.zz_bar == 1.0
    assert running.zz(7) == 1.0
    running.observe([7, 8], [0.0, 0.0])
    assert running.zz_bar == 1.0
    assert running.zz(7) == running.zz(99) == 1.0


def test_running_estimate_by_hand() -> None:
    two, five = math.acosh(2), math.acosh(5)
    running = RunningZZ(strength=3.0, decay=0.5)
    running.observe([0, 0, 1], [two, -five, two])
    assert running.zz_bar == pytest.approx(3, rel=1e-14)
    assert running.zz(0) == pytest.approx((3 * 3 + 7) / 5, rel=1e-14)
    assert running.zz(1) == pytest.approx((3 * 3 + 2) / 4, rel=1e-14)
    assert running.zz(2) == pytest.approx(3, rel=1e-14)
    running.observe([1], [five])
    # sum 9 and count 3 are halved before 5 and 1 are added; prompt 0 was halved although it was not sampled
    bar = (4.5 + 5) / (1.5 + 1)
    assert running.zz_bar == pytest.approx(bar, rel=1e-14)
    assert running.zz(0) == pytest.approx((3 * bar + 3.5) / (3 + 1), rel=1e-14)
    assert running.zz(1) == pytest.approx((3 * bar + 1 + 5) / (3 + 0.5 + 1), rel=1e-14)
    state = running.state_dict()
    running.observe([], [])
    assert running.state_dict() == state


def test_a_prompt_that_was_not_sampled_decays_once_per_round() -> None:
    running = RunningZZ(strength=1.0, decay=0.5)
    running.observe([0, 1], [math.acosh(9), math.acosh(2)])
    for _ in range(3):
        running.observe([1], [math.acosh(2)])
    # of 9 and 1 an eighth is left after three rounds without the prompt
    assert running.zz(0) == pytest.approx((running.zz_bar + 9 / 8) / (1 + 1 / 8), rel=1e-14)
    running.observe([0], [math.acosh(9)])
    assert running.zz(0) == pytest.approx((running.zz_bar + 9 / 16 + 9) / (1 + 1 / 16 + 1), rel=1e-14)


def test_decay_of_one_averages_all_rounds_and_zero_keeps_the_last() -> None:
    rounds = [(4.0, 2.0), (1.0, 1.5)]
    for decay, expected in ((1.0, (4 + 2 + 1 + 1.5) / 4), (0.0, 1.25)):
        running = RunningZZ(strength=0.0, decay=decay)
        for values in rounds:
            running.observe([0, 1], [math.acosh(value) for value in values])
        assert running.zz_bar == pytest.approx(expected, rel=1e-14)
    assert running.zz(0) == pytest.approx(1.0)  # strength 0: the prompt's own pairs alone
    assert running.zz(1) == pytest.approx(1.5)
    assert running.zz(2) == running.zz_bar


def test_importance_removes_the_bias_of_unequal_branch_probabilities() -> None:
    # Prompts with a large zz get fewer base pairs: in proportion to 1 - p = 1/(1 + zz). Enumerate that expectation.
    zz = [1.0, 3.0, 9.0]
    base_share = [1 - tilt_probability(value) for value in zz]
    counts = [round(20 * share) for share in base_share]
    assert counts == [10, 5, 2]
    prompts = [prompt for prompt, count in enumerate(counts) for _ in range(count)]
    deltas = [math.acosh(zz[prompt]) for prompt in prompts]
    plain, weighted = RunningZZ(), RunningZZ()
    plain.observe(prompts, deltas)
    weighted.observe(prompts, deltas, [1 / base_share[prompt] for prompt in prompts])
    assert weighted.zz_bar == pytest.approx(sum(zz) / 3, rel=1e-12)
    assert plain.zz_bar < 0.6 * weighted.zz_bar


def test_running_estimate_converges_to_the_exact_zz() -> None:
    log_policy, log_reference = logits(0, 2, 5).log_softmax(-1), logits(1, 2, 5).log_softmax(-1)
    exact, beta = tilted_distributions(log_policy, log_reference, 0.7).zz(), 0.7
    deltas = differences(beta * (log_policy - log_reference))
    law = product_pair_distribution(log_policy, log_policy)
    running, generator = RunningZZ(decay=1.0), torch.Generator().manual_seed(0)
    for _ in range(4):
        for prompt in (0, 1):
            draws = torch.multinomial(law[prompt].flatten(), 5000, replacement=True, generator=generator)
            running.observe([prompt] * 5000, deltas[prompt].flatten()[draws].tolist())
    for prompt in (0, 1):
        cosh = torch.cosh(deltas[prompt])
        spread = ((law[prompt] * cosh**2).sum() - exact[prompt] ** 2).sqrt().item()
        assert running.zz(prompt) == pytest.approx(exact[prompt].item(), abs=5 * spread / 20000**0.5 + 1e-3)


def test_state_survives_json_and_a_checkpoint_and_continues_bitwise(tmp_path: Path) -> None:
    first = RunningZZ(strength=2.0, decay=0.7)
    first.observe([3, 161_000, 3], [0.3, -1.7, 2.2])
    first.observe([5], [0.9])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    states = [json.loads(json.dumps(first.state_dict())), torch.load(tmp_path / "state.pt", weights_only=True)]
    first.observe([3, 5], [1.1, 0.4])
    for state in states:
        second = RunningZZ(strength=2.0, decay=0.7)
        second.load_state_dict(state)
        second.observe([3, 5], [1.1, 0.4])
        assert second.state_dict() == first.state_dict()
        assert [second.zz(i) for i in (3, 5, 161_000, 0)] == [first.zz(i) for i in (3, 5, 161_000, 0)]


def test_one_odd_pair_is_clipped() -> None:
    running = RunningZZ(limit=3.0)
    running.observe([0], [1e6])
    assert running.zz_bar == pytest.approx(math.exp(3), rel=1e-15)


def test_errors_name_the_prompt_and_the_argument() -> None:
    running = RunningZZ()
    with pytest.raises(ValueError, match="rewards of prompt 12 differ by nan"):
        running.observe([11, 12], [0.0, math.nan])
    assert running.state_dict() == RunningZZ().state_dict()  # a refused round leaves no trace
    with pytest.raises(ValueError, match="2 prompts, 1 deltas and 2 importances"):
        running.observe([1, 2], [0.0])
    for arguments in ({"strength": -1.0}, {"decay": 1.1}, {"limit": -1.0}, {"decay": math.nan}):
        with pytest.raises(ValueError, match="RunningZZ expects"):
            RunningZZ(**arguments)
