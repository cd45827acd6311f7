"""Imitating a teacher against learning from a critic, on a bandit of 100 actions whose reward is their index.

A Critical Evaluation of AI Feedback (Sharma et al. 2024, arXiv 2402.12366), figure 6: what a policy gains from a
critic's preferences is limited by the responses it can show to the critic. A policy that begins far below the teacher
does better to imitate it; one that begins close to it passes it by feedback. Expected gradients take the place of
samples, so that there is no noise and no seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


NUM_ACTIONS = 100
WIDTH = 300.0


def policy_around(mean: float) -> Tensor:
    """Law over the actions proportional to exp(-(action - mean)^2 / 300), float64, [actions]."""
    actions = torch.arange(NUM_ACTIONS, dtype=torch.float64)
    return (-((actions - mean) ** 2) / WIDTH).softmax(0)


def expected_reward(policy: Tensor) -> float:
    """Mean reward of a law over the actions; the reward of an action is its index."""
    return float(policy @ torch.arange(NUM_ACTIONS, dtype=torch.float64))


def reward_model(student: Tensor, learning_rate: float = 0.01, steps: int = 7500) -> Tensor:
    """Bradley-Terry rewards learnt from a perfect critic's preferences between pairs of the student's actions.

    Args:
        student: law that both actions of a pair are drawn from, [actions].
        learning_rate: step of gradient descent on the expected loss, > 0.
        steps: number of steps, >= 0.

    Returns:
        Rewards, zero at the start, [actions]; they stay near zero where the student never goes.
    """
    actions = torch.arange(NUM_ACTIONS, dtype=torch.float64)
    better = torch.sign(actions[:, None] - actions) / 2 + 0.5
    pairs = student[:, None] * student
    rewards = torch.zeros(NUM_ACTIONS, dtype=torch.float64)
    for _ in range(steps):
        error = pairs * (torch.sigmoid(rewards[:, None] - rewards) - better)
        rewards -= learning_rate * (error.sum(1) - error.sum(0))
    return rewards


def learnt_from_feedback(student: Tensor, beta: float = 0.1, learning_rate: float = 0.01, steps: int = 7500) -> Tensor:
    """The policy that RLAIF ends at: student * exp(reward / beta), normalised, [actions]; arguments as above."""
    return (student.log() + reward_model(student, learning_rate, steps) / beta).softmax(0)


def learnt_by_imitation(teacher: Tensor, learning_rate: float = 0.01, steps: int = 15000) -> Tensor:
    """The policy that supervised fine-tuning ends at, from a uniform start, by the expected gradient; [actions]."""
    logits = torch.zeros(NUM_ACTIONS, dtype=torch.float64)
    for _ in range(steps):
        logits -= learning_rate * (logits.softmax(0) - teacher)
    return logits.softmax(0)


@dataclass(frozen=True)
class FeedbackValue:
    """Expected rewards of one start.

    Args:
        start: of the student before anything.
        feedback: after learning from the critic.
        imitation: of the policy that imitates the teacher.
        teacher: of the teacher.
    """

    start: float
    feedback: float
    imitation: float
    teacher: float


def value_of_feedback(
    starts: Sequence[float] = (20, 30, 40, 50, 60, 70, 80), teacher: float = 80
) -> list[FeedbackValue]:
    """Compare feedback with imitation for students that begin at various distances from the teacher.

    Args:
        starts: means of the students.
        teacher: mean of the teacher.
    """
    law = policy_around(teacher)
    imitation = expected_reward(learnt_by_imitation(law))
    found = []
    for start in starts:
        student = policy_around(start)
        feedback = expected_reward(learnt_from_feedback(student))
        found.append(FeedbackValue(expected_reward(student), feedback, imitation, expected_reward(law)))
    return found
