"""Base of rewards by a language model's score, in this process or on a server: prompt, reward and report."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lightning_rlhf.judging.prompts import JudgePrompt, Sample, rating_prompt
from lightning_rlhf.judging.task import Style, load_task
from lightning_rlhf.judging.verdicts import expected_value, spread, to_unit_range
from lightning_rlhf.rewards.base import AbstractReward


class AbstractScoreReward(AbstractReward):
    """A reward that asks a language model about single responses.

    Args:
        task: the question: the name of a task, or a ``.yaml`` file.
        question: ``score`` asks for a score, ``check`` asks the task's yes-no question.
        style: which preamble.
        min_mass: least probability that the judge answers with a label, in [0, 1).
        max_candidate_chars: longest response in characters, >= 1.

    Raises:
        FileNotFoundError: if there is no such task.
        ValueError: if an option is out of range, or the task does not ask this.
    """

    def __init__(
        self,
        *,
        task: str,
        question: Literal["score", "check"],
        style: Style,
        min_mass: float,
        max_candidate_chars: int,
    ) -> None:
        # 1 would refuse every answer
        if not 0 <= min_mass < 1 or max_candidate_chars < 1:
            raise ValueError(
                f"min_mass must be in [0, 1) and max_candidate_chars >= 1; got {min_mass} and {max_candidate_chars}"
            )
        self.task = load_task(task)
        self.question: Literal["score", "check"] = question
        self.style, self.min_mass, self.max_candidate_chars = style, min_mass, max_candidate_chars
        self.rating = self.task.asked_for_ratings(question)
        self.prompt(Sample("", ("",)))  # fails now, not after a policy is trained, on a wrong style
        self.num_scored = 0
        self._mass = self._spread = 0.0

    def prompt(self, sample: Sample) -> JudgePrompt:
        """The prompt about a sample."""
        return rating_prompt(
            self.task,
            sample,
            question=self.question,
            style=self.style,
            max_candidate_chars=self.max_candidate_chars,
        )

    def rewards(self, logps: Tensor, masses: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards in [-1, 1] and their standard deviations under the judge, both [B] float32; noted for `report`.

        Args:
            logps: log-probabilities of the labels, [B, labels].
            masses: probability of a label at all, [B].
        """
        values = self.rating.values
        deviation = spread(logps, values)
        self.num_scored += len(masses)
        # sums, so that the report is a mean over responses and not over calls
        self._mass += masses.sum().item()
        self._spread += deviation.sum().item()
        # r = 2 (s - low) / (high - low) - 1, with s = sum_i i P(i); (2 s - 11) / 9 for scores of 1 to 10
        scale = 2 / (max(values) - min(values))
        return to_unit_range(expected_value(logps, values), values).float(), (deviation * scale).float()

    def report(self) -> dict[str, float]:
        """Means over all calls: ``mass``, the probability that the judge answers with a score; ``spread``, the standard
        deviation of its scores in the task's unit; and ``scored``, the number of responses."""
        count = max(self.num_scored, 1)
        return {"mass": self._mass / count, "spread": self._spread / count, "scored": float(self.num_scored)}
