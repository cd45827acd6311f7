"""The score of a language model on a server as the reward: direct-RLAIF (arXiv 2309.00267, section 2.2.2)."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch

from lightning_rlhf.judging.prompts import Sample, fitted, sample_of
from lightning_rlhf.judging.replies import Reading
from lightning_rlhf.judging.server import JudgeServer, ServerError, Session, UnansweredError
from lightning_rlhf.judging.task import Style
from lightning_rlhf.rewards.base import RewardOutput
from lightning_rlhf.rewards.judge import AbstractScoreReward
from lightning_rlhf.types import LabelStatus, Prompt, Response


class ServerScoreReward(AbstractScoreReward):
    """The expected score that a judge on a server gives, from the likelihoods of "1" to "10", mapped to [-1, 1].

    s = sum_i i P(i), with P normalized over the ten scores, and r = (2 s - 11) / 9. Scores that are not among the
    ``top_logprobs`` are bounded by the rest of the list, as with `ServerLabeler`.

    **"10" and "1".** Where "10" is one token, both are read from one list. Where it is "1" and "0", P("1") belongs to
    both: if the judge's own answer is one of them the second token is listed, too; otherwise a server with
    ``assistant_prefill`` is asked once more, behind the "1". Without, P("1") counts for neither, and a response for
    which it is more than a twentieth of the scores' mass is ``invalid``: set ``assistant_prefill``, or use a task with
    scores of one digit.

    ``std`` of the output is the standard deviation of the judge's scores, on the scale of the reward.

    Args:
        server: the endpoint.
        task: the question: ``helpful``, ``harmless``, ``summary``, ``sentiment``, or a ``.yaml`` file of your own.
        question: ``score`` asks for a score, ``check`` asks the task's yes-no question.
        style: ``base`` is the task alone, ``detailed`` adds guidelines.
        min_mass: probability of the scores below which a response is not scored, in [0, 1).
        unscored: reward of a response that could not be scored, e.g. -1; default: an error.
        max_candidate_chars: longest response in characters; the rest is cut off and marked.
        max_prompt_chars: longest prompt in characters, a longer one loses a part of its context; default: unlimited.

    Raises:
        FileNotFoundError: if there is no such task.
        ValueError: if an option is out of range, or the task does not ask this.
    """

    def __init__(
        self,
        server: JudgeServer,
        task: str = "helpful",
        question: Literal["score", "check"] = "score",
        style: Style = "base",
        min_mass: float = 0.05,
        unscored: float | None = None,
        max_candidate_chars: int = 8000,
        max_prompt_chars: int | None = None,
    ) -> None:
        super().__init__(
            task=task, question=question, style=style, min_mass=min_mass, max_candidate_chars=max_candidate_chars
        )
        if max_prompt_chars is not None and max_prompt_chars < 1:
            raise ValueError(f"max_prompt_chars must be >= 1; got {max_prompt_chars}")
        self.server, self.unscored, self.max_prompt_chars = server, unscored, max_prompt_chars
        self._failed = 0

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        """Score ``responses[i]`` as an answer to ``prompts[i]``; float32, [B].

        Raises:
            ServerError: if the endpoint cannot be used as it is set up, or a response could not be scored and
                ``unscored`` is not given. Earlier replies are in the journal.
        """
        samples = [self._fitted(sample_of(p, r.text)) for p, r in zip(prompts, responses, strict=True)]
        outcomes = self.server.ask([functools.partial(self._ask, sample) for sample in samples])
        faults = [outcome for outcome in outcomes if not isinstance(outcome, Reading)]
        # a made-up reward would be learned
        if faults and self.unscored is None:
            counts = ", ".join(f"{count} {status}" for status, count in Counter(s for s, _ in faults).items())
            raise ServerError(
                f"{len(faults)} of {len(outcomes)} responses could not be scored by {self.server.base_url} ({counts}), "
                f"the first because: {faults[0][1]}. Earlier replies are kept: start again to ask for the rest, or set "
                f"unscored to the reward of such responses"
            )
        # `unscored` where there is no reading
        mean, std = torch.full((len(outcomes),), self.unscored or 0.0), torch.zeros(len(outcomes))
        scored = {i: outcome for i, outcome in enumerate(outcomes) if isinstance(outcome, Reading)}
        if scored:
            logps = torch.stack([reading.logps for reading in scored.values()])
            masses = torch.tensor([reading.mass for reading in scored.values()], dtype=torch.float64)
            mean[list(scored)], std[list(scored)] = self.rewards(logps, masses)
        self._failed += len(faults)
        return RewardOutput(mean, std=std)

    def report(self) -> dict[str, float]:
        """Metrics of the scores, the number of responses that ``failed``, and `JudgeServer.report`."""
        return super().report() | {"failed": float(self._failed)} | self.server.report()

    async def _ask(self, sample: Sample | None, session: Session) -> Reading | tuple[LabelStatus, str]:
        # nothing is asked, so nothing is paid
        if sample is None:
            return "truncated", "the response alone is longer than max_prompt_chars"
        try:
            reading, _ = await session.read(self.prompt(sample), self.rating.labels)
        except UnansweredError as error:
            return error.status, error.fault
        # P over the scores would be normalized noise
        if reading.mass < self.min_mass:
            fault = f"the judge answers with a score with a probability of {reading.mass:.2g} only"
            return "invalid", f"{fault} (min_mass={self.min_mass})"
        # a "1" that may be a "10" moves the mean score by up to 9
        if (unclear := sum(reading.open.values())) > UNCLEAR * (reading.mass + unclear):
            stems = ", ".join(map(repr, reading.open))
            return "invalid", (
                f"{stems} with a probability of {unclear:.2g} may be the beginning of another score: set "
                f"assistant_prefill=true if the server can go on with an answer, or use a task with scores of one digit"
            )
        return reading

    def _fitted(self, sample: Sample) -> Sample | None:
        # the server itself refuses prompts that are too long
        if self.max_prompt_chars is None:
            return sample
        most = self.max_prompt_chars
        return fitted(sample, self.task.dialogue, lambda shown: len(self.prompt(shown).text) - most)


UNCLEAR = 0.05
"""Share of the scores' mass that may belong to one score or another."""
