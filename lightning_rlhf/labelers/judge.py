"""Base of labelers that ask a language model, in this process or on a server: prompt, settings and verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from lightning_rlhf.judging.options import ChainOfThought
from lightning_rlhf.judging.prompts import JudgePrompt, Sample, pair_prompt
from lightning_rlhf.judging.task import Style, load_task
from lightning_rlhf.judging.verdicts import first_probability, majority, preference
from lightning_rlhf.labelers.base import AbstractLabeler


class AbstractJudgeLabeler(AbstractLabeler):
    """A labeler that asks a language model about pairs, in both orders.

    Args:
        task: the question: the name of a task, or a ``.yaml`` file.
        style: which preamble.
        shots: judged examples in the prompt, >= 0.
        chain_of_thought: let the judge write rationales before it answers.
        min_mass: label mass below which there is no verdict, in [0, 1).
        max_candidate_chars: longest response in characters, >= 1.

    Raises:
        FileNotFoundError: if there is no such task.
        ValueError: if an option is out of range, or the task does not compare responses.
    """

    def __init__(
        self,
        *,
        task: str,
        style: Style,
        shots: int,
        chain_of_thought: ChainOfThought | None,
        min_mass: float,
        max_candidate_chars: int,
    ) -> None:
        if shots < 0 or max_candidate_chars < 1:
            raise ValueError(f"shots must be >= 0 and max_candidate_chars >= 1; got {shots} and {max_candidate_chars}")
        # 1 would refuse every answer; also refuses NaN
        if not 0 <= min_mass < 1:
            raise ValueError(f"min_mass must be in [0, 1); got {min_mass}")
        self.task = load_task(task)
        self.style, self.shots, self.chain_of_thought = style, shots, chain_of_thought
        self.min_mass, self.max_candidate_chars = min_mass, max_candidate_chars
        # fails now, not after a policy is trained, on a wrong style or number of exemplars
        self.prompt(Sample("", ("", "")))

    @property
    def num_rationales(self) -> int:
        """Judgments per order whose verdicts are averaged; 1 without a chain of thought."""
        return 1 if self.chain_of_thought is None else self.chain_of_thought.samples

    def prompt(self, sample: Sample, rationale: str | None = None) -> JudgePrompt:
        """The prompt about a sample, up to where the label begins, or, before a rationale, up to where that begins."""
        return pair_prompt(
            self.task,
            sample,
            style=self.style,
            shots=self.shots,
            thinking=self.chain_of_thought is not None,
            rationale=rationale,
            max_candidate_chars=self.max_candidate_chars,
        )

    def verdict(self, logps: Tensor, masses: Tensor) -> tuple[float | None, dict[str, float]]:
        """P(a preferred), and the metrics of a label's ``meta``.

        None where the label mass is below ``min_mass``, or a log-probability is not a number, as where float16
        overflows; such metrics are left out of ``meta``.

        Args:
            logps: log-probabilities of the labels with a and with b shown first, [2, samples, 2].
            masses: probability of a label at all, [2, samples].
        """
        forward, reverse = logps
        # the mass is the smaller one of the two orders: a label in the tail of either order is noise
        meta = {
            "first_forward": first_probability(forward).mean().item(),
            "first_reverse": first_probability(reverse).mean().item(),
            "mass": masses.mean(1).min().item(),
        }
        meta = {name: value for name, value in meta.items() if math.isfinite(value)}
        if len(meta) < 3 or meta["mass"] < self.min_mass:
            return None, meta
        # P(a) = (P_forward(first) + 1 - P_reverse(first)) / 2 (section 2.1.1), averaged over rationales
        prefers = self.task.asked_for_pairs().prefers
        if self.chain_of_thought is not None and self.chain_of_thought.vote == "majority":
            probability = majority(forward, reverse, prefers).item()
        else:
            probability = preference(forward, reverse, prefers).mean().item()
        # rounding may leave [0, 1]
        return min(max(probability, 0.0), 1.0), meta

    def fault(self, metrics: Mapping[str, float]) -> str:
        """Why `verdict` gave no probability, from its metrics."""
        # `verdict` leaves out metrics that are not finite
        if len(metrics) < 3:
            return (
                "the judge's log-probabilities are not finite: float16 overflows in some models, take dtype=bfloat16 "
                "or float32"
            )
        return f"the judge answers with a label with a probability of {metrics['mass']:.2g} only " + (
            f"(min_mass={self.min_mass})"
        )


def both_orders(sample: Sample) -> tuple[Sample, Sample]:
    """A sample with a shown first, and with b shown first."""
    return sample, replace(sample, candidates=sample.candidates[::-1])
