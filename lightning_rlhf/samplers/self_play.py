"""Self-play (SPIN): recorded completions against samples of the policy; no labels are bought."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_rlhf.generation.base import AbstractEngine, Request
from lightning_rlhf.randomness import Key
from lightning_rlhf.samplers.base import AbstractPairSampler
from lightning_rlhf.samplers.draws import SECOND
from lightning_rlhf.types import Comparison, Label, Prompt, Response


class SelfPlaySampler(AbstractPairSampler):
    """Pairs the recorded completion of each prompt with a sample of the policy, and prefers the recorded one.

    SPIN, self-play fine-tuning (Chen et al. 2024, arXiv 2401.01335, eq. 4.7, with the logistic loss, `DPOLoss`)::

        y^a = the completion in the data,   y^b ~ pi_theta at the start of the round,   P(y^a preferred) = 1

    The completion is the ``chosen`` one of the row. The opponent of the paper is the policy of the previous iteration,
    and the reference, too: ``--model.reference.rule=previous``, with a round of the whole data set. The labels are
    free, and the labeler is not asked.
    """

    method = "SPIN (Chen 2024)"
    first_distribution, second_distribution = "data", "π_θ"
    passes_per_pair = 1.0
    annotations_per_pair = 0.0

    def sample(self, prompts: Sequence[Prompt], engine: AbstractEngine, key: Key) -> list[Comparison]:
        """Sample y^b for each prompt; branch ``"self_play"``.

        Raises:
            ValueError: if a prompt has no recorded completion.
        """
        recorded = [recorded_completion(prompt) for prompt in prompts]
        sampled = engine.generate([Request(prompt, key.fold(prompt.index, SECOND)) for prompt in prompts])
        return [
            Comparison(prompt, a, b, branch="self_play", passes=self.passes_per_pair)
            for prompt, a, b in zip(prompts, recorded, sampled, strict=True)
        ]

    def verdicts(self, comparisons: Sequence[Comparison]) -> list[Label | None]:
        """The recorded completion is preferred; costs nothing."""
        return [Label(1.0, cost=0.0) for _ in comparisons]


def recorded_completion(prompt: Prompt) -> Response:
    """The completion of a supervised row, or the chosen one of a recorded pair.

    Raises:
        ValueError: if the prompt has neither.
    """
    if prompt.completion is not None:
        return prompt.completion
    if prompt.pair is None or prompt.is_single:  # a single response may be one to avoid
        raise ValueError(
            f"prompt {prompt.index} ({prompt.text[-80:]!r}) has no recorded completion; SelfPlaySampler needs rows "
            f"with 'chosen' and 'rejected': use such a data set, or another sampler, such as VanillaSampler"
        )
    return prompt.pair[0]
