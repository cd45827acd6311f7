"""A labeler as a reward: the probability of winning against baseline responses (arXiv 2410.12832)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch

from lightning_rlhf.labelers.base import AbstractLabeler
from lightning_rlhf.prompts.base import AbstractPromptSource
from lightning_rlhf.randomness import Key, Stream
from lightning_rlhf.rewards.base import AbstractReward, RewardOutput, prompt_name
from lightning_rlhf.runtime.plugins import check_plugin
from lightning_rlhf.types import Comparison, Prompt, PromptRow, Response


Scale = Literal["probability", "logit"]
LEAST = 1e-4
"""Probabilities are kept this far from 0 and 1 in a logit: 9.2 nats at most."""


class WinProbabilityReward(AbstractReward):
    """P(response preferred to a baseline) by a labeler, averaged over the baselines of the prompt.

    It turns a judge of pairs, such as a generative reward model, into the reward of reinforcement learning and of
    evaluation. With one reference answer per prompt and ``scale=logit`` it is log P/(1 - P), which for a
    Bradley-Terry judge is r(response) - r(reference) (Generative Reward Models, arXiv 2410.12832). Baselines that equal
    the response count 1/2, without being asked about.

    Args:
        labeler: judges pairs by their texts, such as `LLMLabeler`; baselines have no token ids of the policy.
        baselines: rows with one completion (reference answers, `DatasetCompletions`) or with pairs, both responses of
            which are baselines (`LedgerPrompts` reads samples of a policy). Several rows may have the same prompt.
        scale: ``probability`` in [0, 1], or its ``logit`` in nats.

    Raises:
        ValueError: if a row has no response.
    """

    def __init__(self, labeler: AbstractLabeler, baselines: AbstractPromptSource, scale: Scale = "probability") -> None:
        check_plugin("WinProbabilityReward.labeler", labeler, AbstractLabeler)
        check_plugin("WinProbabilityReward.baselines", baselines, AbstractPromptSource)
        if scale not in get_args(Scale):
            raise ValueError(f"WinProbabilityReward.scale is 'probability' or 'logit'; got {scale!r}")
        self.labeler, self.source = labeler, baselines
        self.scale: Scale = scale
        self._baselines: dict[str, list[str]] = {}

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        """Score ``responses[i]`` as an answer to ``prompts[i]``; float64, [B].

        Raises:
            ValueError: if a prompt has no baseline, or the labeler gives none of its pairs a label.
        """
        comparisons: list[Comparison] = []
        owners: list[int] = []
        wins: list[list[float]] = [[] for _ in prompts]
        for place, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            for baseline in self._of(prompt):
                comparison = Comparison(prompt, response, Response((0,), baseline, "eos", source="dataset"))
                if response.text == baseline:
                    wins[place].append(0.5)
                    continue
                comparisons.append(comparison)
                owners.append(place)
        # the key says nothing of batch or round: the same response has the same reward
        labels = self.labeler.label(comparisons, Key((Stream.LABELING,))) if comparisons else []
        for place, label in zip(owners, labels, strict=True):
            if label.probability is not None:
                wins[place].append(label.probability)
        values = []
        for prompt, found in zip(prompts, wins, strict=True):
            if not found:
                failed = [label for label in labels if label.status != "ok"]
                faults = sorted({str(label.meta.get("fault", label.status)) for label in failed})
                raise ValueError(
                    f"prompt {prompt.index}: {type(self.labeler).__name__} gave no verdict on the response against any "
                    f"baseline ({'; '.join(faults)}): lower max_candidate_chars or decoding.max_new_tokens, or take "
                    f"another judge"
                )
            # mean over the baselines of P(response preferred)
            values.append(sum(found) / len(found))
        mean = torch.tensor(values, dtype=torch.float64)
        return RewardOutput(mean if self.scale == "probability" else mean.logit(eps=LEAST))

    def _of(self, prompt: Prompt) -> list[str]:
        if not self._baselines:
            for row in self.source.load():
                self._baselines.setdefault(prompt_name(row.text, row.messages), []).extend(_responses(row))
        found = self._baselines.get(prompt_name(prompt.text, prompt.messages))
        if not found:
            raise ValueError(
                f"prompt {prompt.index} ({prompt.text[-80:]!r}) has no baseline among the {len(self._baselines)} "
                f"prompts of {type(self.source).__name__}: add a row with this prompt to the baselines"
            )
        return found


def _responses(row: PromptRow) -> list[str]:
    if row.pair is not None and not row.is_single:
        return [row.pair.chosen, row.pair.rejected]
    if row.completion is None:
        raise ValueError(
            f"{row.source} has no response to compare with: read baselines with DatasetCompletions or LedgerPrompts"
        )
    return [row.completion]
