"""What log-probabilities of labels say, in closed form."""

from __future__ import annotations

import pytest
import torch

from lightning_rlhf.judging.verdicts import (
    expected_value,
    first_probability,
    label_mass,
    preference,
    spread,
    to_unit_range,
)


SCORES = range(1, 11)


def test_two_labels_are_a_sigmoid_of_the_difference() -> None:
    logps = torch.tensor([[-1.0, -3.0], [-6.0, -8.0]], dtype=torch.float64)
    torch.testing.assert_close(first_probability(logps), torch.sigmoid(torch.tensor([2.0, 2.0], dtype=torch.float64)))
    torch.testing.assert_close(label_mass(logps), logps.exp().sum(-1))


def test_both_orders_of_any_judge_add_up_to_one() -> None:
    forward, reverse = torch.randn(50, 2, dtype=torch.float64), torch.randn(50, 2, dtype=torch.float64)
    for prefers in ("better", "worse"):
        total = preference(forward, reverse, prefers) + preference(reverse, forward, prefers)  # type: ignore[arg-type]
        torch.testing.assert_close(total, torch.ones(50, dtype=torch.float64))


def test_a_judge_of_positions_gives_exactly_one_half() -> None:
    logps = torch.tensor([-0.1, -4.0])
    assert preference(logps, logps).item() == 0.5


def test_a_judge_of_contents_gives_what_one_order_gives() -> None:
    forward = torch.tensor([-0.5, -1.5], dtype=torch.float64)
    assert preference(forward, forward.flip(0)).item() == pytest.approx(first_probability(forward).item())


def test_a_label_for_the_worse_one_is_turned_round() -> None:
    # the judge always names the first candidate, which is the harmful one
    forward, reverse = torch.tensor([0.0, -9.0]), torch.tensor([-9.0, 0.0])
    assert preference(forward, reverse, "worse").item() < 0.001
    assert preference(forward, reverse, "better").item() > 0.999


def test_normalization_comes_before_the_mean() -> None:
    # the second order hardly answers with a label; it counts as much as the first all the same
    forward, reverse = torch.tensor([-0.1, -3.0]), torch.tensor([-20.1, -23.0])
    assert preference(forward, reverse).item() == pytest.approx(0.5)


def test_scores_of_known_judges() -> None:
    uniform = torch.zeros(10)
    ten, one = torch.full((2, 10), -50.0)
    ten[9], one[0] = 0.0, 0.0
    found = expected_value(torch.stack([uniform, ten, one]), SCORES)
    torch.testing.assert_close(found, torch.tensor([5.5, 10.0, 1.0]))
    torch.testing.assert_close(to_unit_range(found, SCORES), torch.tensor([0.0, 1.0, -1.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(to_unit_range(found, SCORES), (2 * found - 11) / 9, atol=1e-6, rtol=0)
    assert spread(ten, SCORES).item() == pytest.approx(0.0, abs=1e-6)
    assert spread(uniform, SCORES).item() == pytest.approx((99 / 12) ** 0.5)


def test_more_weight_on_higher_scores_is_a_higher_reward() -> None:
    logps = torch.randn(10, dtype=torch.float64).log_softmax(-1)
    moved = logps.exp()
    moved[7] += moved[3] / 2
    moved[3] /= 2
    assert expected_value(moved.log(), SCORES) > expected_value(logps, SCORES)
