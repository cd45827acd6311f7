"""Imitation of a teacher compared with feedback from a critic, on a bandit of 100 actions whose reward is their index.

A Critical Evaluation of AI Feedback (Sharma et al. 2024, arXiv 2402.12366), figure 6. The gain from a critic's
preferences is limited by the responses that the policy can sample. A policy that starts far below the teacher gains
more from imitation; one that starts close to the teacher surpasses it with feedback. Gradients are expectations, so
that there is no noise and no seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


NUM_ACTIONS = 100
WIDTH = 300.0


def policy_around(mean: float) -> Tensor:
    """Discretized Gaussian distribution over the actions; float64, [actions].

    Args:
        mean: its mean, an action.
    """
    actions = torch.arange(NUM_ACTIONS, dtype=torch.float64)
    # pi(a) ∝ exp(-(a - mean)^2 / 300)
    return (-((actions - mean) ** 2) / WIDTH).softmax(0)


def expected_reward(policy: Tensor) -> float:
    """Mean reward of a distribution over the actions; the reward of an action is its index."""
    return float(policy @ torch.arange(NUM_ACTIONS, dtype=torch.float64))


def reward_model(student: Tensor, learning_rate: float = 0.01, steps: int = 7500) -> Tensor:
    """Bradley-Terry rewards fitted to the preferences of a perfect critic between pairs of the student's actions.

    Args:
        student: distribution of both actions of a pair, [actions].
        learning_rate: step size of gradient descent on the expected loss, > 0.
        steps: number of steps, >= 0.

    Returns:
        Rewards, [actions]. They start at zero, and stay near zero at actions that the student does not sample.
    """
    actions = torch.arange(NUM_ACTIONS, dtype=torch.float64)
    # P(a preferred to b) of the critic: 1, 0, or 1/2 for a tie
    better = torch.sign(actions[:, None] - actions) / 2 + 0.5
    pairs = student[:, None] * student
    rewards = torch.zeros(NUM_ACTIONS, dtype=torch.float64)
    for _ in range(steps):
        # dL/d(r_a - r_b) = q(a, b) (sigma(r_a - r_b) - P(a preferred))
        error = pairs * (torch.sigmoid(rewards[:, None] - rewards) - better)
        rewards -= learning_rate * (error.sum(1) - error.sum(0))
    return rewards


def learned_from_feedback(student: Tensor, beta: float = 0.1, learning_rate: float = 0.01, steps: int = 7500) -> Tensor:
    """The optimal policy of RLAIF with these rewards; [actions]. Arguments as in `reward_model`, beta > 0."""
    # pi ∝ student exp(r / beta)
    return (student.log() + reward_model(student, learning_rate, steps) / beta).softmax(0)


def learned_by_imitation(teacher: Tensor, learning_rate: float = 0.01, steps: int = 15000) -> Tensor:
    """The policy after supervised fine-tuning on the teacher, from a uniform start; [actions]. Arguments as above."""
    # gradient of E_teacher[-log softmax(logits)] = softmax(logits) - teacher
    logits = torch.zeros(NUM_ACTIONS, dtype=torch.float64)
    for _ in range(steps):
        logits -= learning_rate * (logits.softmax(0) - teacher)
    return logits.softmax(0)


@dataclass(frozen=True)
class FeedbackValue:
    """Expected rewards for one initial student.

    Args:
        start: reward of the initial student.
        feedback: reward after feedback from the critic.
        imitation: reward after imitation of the teacher.
        teacher: reward of the teacher.
    """

    start: float
    feedback: float
    imitation: float
    teacher: float


def value_of_feedback(
    starts: Sequence[float] = (20, 30, 40, 50, 60, 70, 80), teacher: float = 80
) -> list[FeedbackValue]:
    """Compare feedback with imitation for students at various distances from the teacher.

    Args:
        starts: means of the initial students.
        teacher: mean of the teacher.
    """
    teacher_policy = policy_around(teacher)
    imitation = expected_reward(learned_by_imitation(teacher_policy))
    found = []
    for start in starts:
        student = policy_around(start)
        feedback = expected_reward(learned_from_feedback(student))
        found.append(FeedbackValue(expected_reward(student), feedback, imitation, expected_reward(teacher_policy)))
    return found
