"""Feedback against imitation, on the bandit of arXiv 2402.12366."""

from __future__ import annotations

import pytest
import torch

from lightning_rlhf.worlds.feedback_bandit import (
    expected_reward,
    learned_by_imitation,
    learned_from_feedback,
    policy_around,
    reward_model,
    value_of_feedback,
)


def test_a_weak_student_does_better_to_imitate_and_a_strong_one_passes_its_teacher() -> None:
    found = value_of_feedback()
    weak, strong = found[2], found[-1]
    assert weak.start == pytest.approx(40, abs=0.1)
    assert weak.imitation - weak.feedback > 10
    assert strong.feedback > strong.teacher + 5
    feedback = [row.feedback for row in found]
    assert feedback == sorted(feedback)


def test_the_gradient_is_that_of_the_expected_loss() -> None:
    student = policy_around(40)
    rewards = torch.zeros(100, dtype=torch.float64, requires_grad=True)
    better = (torch.arange(100)[:, None] > torch.arange(100)).double() + torch.eye(100, dtype=torch.float64) / 2
    difference = rewards[:, None] - rewards
    loss = -(better * difference.sigmoid().log() + (1 - better) * (-difference).sigmoid().log())
    (student[:, None] * student * loss).sum().backward()  # type: ignore[no-untyped-call]
    assert rewards.grad is not None
    torch.testing.assert_close(reward_model(student, 0.5, 1), -0.5 * rewards.grad)


def test_without_training_nothing_changes() -> None:
    student = policy_around(40)
    torch.testing.assert_close(learned_from_feedback(student, steps=0), student)
    torch.testing.assert_close(learned_by_imitation(student, steps=0), torch.full_like(student, 0.01))
    assert expected_reward(learned_by_imitation(student, 1.0, 30_000)) == pytest.approx(
        expected_reward(student), abs=0.5
    )
