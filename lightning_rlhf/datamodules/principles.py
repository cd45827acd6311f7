"""The DataModule of a principle-conditioned reward model: principles are sampled anew in every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lightning_rlhf.datamodules.base import DEFAULT_DECODING
from lightning_rlhf.datamodules.options import (
    DEFAULT_BATCHING,
    DEFAULT_PRINCIPLE_ROUNDS,
    DEFAULT_PROMPTS,
    BatchOptions,
    PrincipleRoundOptions,
    PromptOptions,
)
from lightning_rlhf.datamodules.preferences import PreferenceDataModule
from lightning_rlhf.estimators.principles import dominant_score, principle_signs, variance_scaled
from lightning_rlhf.generation.base import Decoding
from lightning_rlhf.judging.principle import conditioned, statement
from lightning_rlhf.labelers import AbstractLabeler
from lightning_rlhf.labelers.principle import SCORE, UsesPrinciples
from lightning_rlhf.prompts import AbstractPromptSource, tokenize_rows
from lightning_rlhf.protocols import StepModule, module_of
from lightning_rlhf.randomness import Stream
from lightning_rlhf.samplers import AbstractPairSampler
from lightning_rlhf.types import Preference, Prompt, PromptRow, Response


class PrincipleDataModule(PreferenceDataModule):
    """Rounds of pairs whose labels follow from sampled principles (SALMON, arXiv 2310.05910).

    `PrincipleLabeler` scores each pair once by every principle; scores are divided by their variance over the pairs. In
    each epoch every pair gets a geometric number of principles, each of them negated with some probability. The
    principle with the largest absolute score says which response is better, and pairs without one are left out. The
    prompt of the pair is rewritten with the principles behind it, so that the module, a `RewardModule`, learns
    r(x, y | P). Principles of epochs depend on the seed, epoch, prompt and responses alone.

    Args:
        prompts: where training prompts (or recorded pairs) come from.
        sampler: generates pairs of responses.
        labeler: scores pairs by principles.
        heldout: prompts for validation, e.g. `PrincipledPrompts`; default: no validation.
        decoding: length, temperature and batch of decoding.
        rounds: how rounds are cut, labeled and replayed, and how principles are sampled.
        pairs_per_batch: pairs per optimizer step over all processes, >= 1.
        batching: how an optimizer step is split into micro-batches.
        prompt_options: how prompts become tokens. Principles must fit into the model's window too: a long prompt is cut
            on the left, never they.
        seed: decides prompt order, samples, labels and principles.
    """

    def __init__(
        self,
        prompts: AbstractPromptSource,
        sampler: AbstractPairSampler,
        labeler: AbstractLabeler,
        heldout: AbstractPromptSource | None = None,
        decoding: Decoding = DEFAULT_DECODING,
        rounds: PrincipleRoundOptions = DEFAULT_PRINCIPLE_ROUNDS,
        pairs_per_batch: int = 8,
        batching: BatchOptions = DEFAULT_BATCHING,
        prompt_options: PromptOptions = DEFAULT_PROMPTS,
        seed: int = 0,
    ) -> None:
        super().__init__(
            prompts=prompts,
            sampler=sampler,
            labeler=labeler,
            heldout=heldout,
            decoding=decoding,
            rounds=rounds,
            pairs_per_batch=pairs_per_batch,
            batching=batching,
            prompt_options=prompt_options,
            seed=seed,
        )
        if not isinstance(labeler, UsesPrinciples):
            raise ValueError(
                f"PrincipleDataModule needs a score per principle, and {type(labeler).__name__} gives none: "
                f"set data.labeler=PrincipleLabeler, or data=PreferenceDataModule"
            )
        self.principles = labeler.principles
        self.rounds = rounds

    def buffer(self, due: int, epoch: int) -> list[Preference]:
        """Preferences of an epoch, with principles in their prompts and the labels that follow from these."""
        # equal responses have no scores
        pairs = [pair for pair in super().buffer(due, epoch) if not pair.label.is_free_tie]
        if not pairs:
            return []
        names = [f"{SCORE}{principle.id}" for principle in self.principles]
        # [pairs, principles]
        scores = variance_scaled(torch.tensor([[pair.label.meta[n] for n in names] for pair in pairs]).double())
        signs = torch.stack([self._signs(pair, epoch) for pair in pairs])
        leads = dominant_score(scores, signs).tolist()
        kept = [place for place, lead in enumerate(leads) if lead != 0]
        if not kept:
            raise ValueError(
                f"no principle prefers a response in both orders in any of the {len(pairs)} pairs (or not in different "
                f"pairs differently): the judge of {type(self.labeler).__name__} names positions only; take a better "
                f"judge, or more pairs"
            )
        prompts = self._conditioned(
            [pairs[i].comparison.prompt for i in kept],
            [statement(self.principles, signs[i].tolist()) for i in kept],
        )
        found = []
        for place, prompt in zip(kept, prompts, strict=True):
            right = 1.0 - self.rounds.flipped
            label = replace(pairs[place].label, probability=right if leads[place] > 0 else 1.0 - right)
            comparison = pairs[place].comparison
            # log-probabilities were computed without the principles
            comparison = replace(
                comparison, prompt=prompt, a=_without_logps(comparison.a), b=_without_logps(comparison.b)
            )
            found.append(replace(pairs[place], comparison=comparison, label=label))
        return found

    def _items_per_epoch(self) -> int | None:
        # ties are left out, and differ between epochs
        return None

    def _signs(self, pair: Preference, epoch: int) -> torch.Tensor:
        comparison, count = pair.comparison, len(self.principles)
        key = self.key.fold(Stream.PRINCIPLES, epoch, pair.round, comparison.prompt.index, *comparison.a.ids)
        return principle_signs(
            key.uniforms(1 + 2 * count),
            count,
            stop=self.rounds.stop,
            most=self.rounds.most_principles,
            negated=self.rounds.negated,
        )

    def _conditioned(self, prompts: Sequence[Prompt], statements: Sequence[str]) -> list[Prompt]:
        """Prompts with principles, as token ids of the module."""
        if not prompts:
            return []
        module = module_of(self.trainer, StepModule, type(self).__name__)
        rows = []
        for prompt, stated in zip(prompts, statements, strict=True):
            asked = conditioned(prompt, stated)
            text = asked.text if asked.messages is None else None
            rows.append(
                PromptRow(f"prompt {prompt.index}", text, asked.messages, template_options=prompt.template_options)
            )
        window = module.context_window
        written, _ = tokenize_rows(
            rows,
            module.tokenizer,
            max_prompt_tokens=1_000_000 if window is None else window - self.decoding.max_new_tokens,
            max_response_tokens=self.decoding.max_new_tokens,
            on_long_prompt="truncate",
            system_prompt=self.prompt_options.system_prompt,
            end_ids=module.configured_end_ids,
        )
        return [replace(new, index=prompt.index) for new, prompt in zip(written, prompts, strict=True)]


def _without_logps(response: Response) -> Response:
    return replace(response, policy_logps=None, reference_logps=None)
