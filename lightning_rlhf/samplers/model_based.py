"""Samplers that ask a preference model which two responses of a pool are compared."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch

from lightning_rlhf.generation.base import AbstractEngine, Request
from lightning_rlhf.preference_models.base import AbstractPreferenceModel, Posterior
from lightning_rlhf.randomness import Key
from lightning_rlhf.samplers.base import AbstractPairSampler
from lightning_rlhf.samplers.draws import COIN, pool_requests, repeated
from lightning_rlhf.types import Comparison, Prompt, Response


class AbstractModelSampler(AbstractPairSampler):
    """Samples n responses, and pairs two of them by the posterior of their rewards.

    All n are samples of the policy, or the last ``references`` of them samples of the reference. Samples of a policy
    that has become good at what is asked hardly differ; those of the reference still do, and a model learns from them.

    Implement `choose`. Equal responses of a pool count once, so that a pair has equal responses only where all n are
    equal. While there is no fitted model, the first two different responses are a pair.

    Args:
        n: responses per prompt, >= 2; each is decoded, and two are labeled.
        references: how many of the n are samples of the reference, from 0 to n.

    Attributes:
        preference_model: the fitted model of the run, which the DataModule sets; None before its first fit.

    Raises:
        ValueError: if n is smaller than 2, or ``references`` is not from 0 to n.
    """

    preference_model: AbstractPreferenceModel | None = None

    def __init__(self, n: int, references: int = 0) -> None:
        if n < 2:
            raise ValueError(f"n must be at least 2, since a pair needs two candidates; got {n}")
        if not 0 <= references <= n:
            raise ValueError(f"references must be from 0 to n={n}; got {references}")
        self.n, self.references = n, references
        self.passes_per_pair = float(n)

    @abstractmethod
    def choose(self, posterior: Posterior, key: Key) -> tuple[int, int]:
        """Choose the positions of two different responses.

        Args:
            posterior: rewards of the different responses to one prompt, at least two.
            key: source of random numbers of the prompt.
        """

    def requests(self, prompts: Sequence[Prompt], key: Key) -> list[Request]:
        """Requests for the pools, prompt by prompt, samples of the policy before those of the reference."""
        own = self.n - self.references
        return [
            # mix = -1: (1 + mix) h_theta - mix h_ref = h_ref
            request if i % self.n < own else replace(request, mix=-1.0, source="reference")
            for i, request in enumerate(pool_requests(prompts, self.n, key))
        ]

    def sample(self, prompts: Sequence[Prompt], engine: AbstractEngine, key: Key) -> list[Comparison]:
        """Sample a pool per prompt in one batch and keep one pair.

        Branch ``"posterior"``, where ``meta["gap_std"]`` is the standard deviation of the reward gap in nats, or
        ``"base"`` where no model was asked.
        """
        model, posterior = self.preference_model, None
        needs_logps = model is not None and model.needs_reference_logps
        pool = engine.generate(self.requests(prompts, key), reference_logps=needs_logps)
        if model is not None:
            posterior = model.posterior(repeated(prompts, self.n), pool)
        comparisons = []
        for i, prompt in enumerate(prompts):
            kept = different(prompt, pool[i * self.n : (i + 1) * self.n])
            if posterior is None or len(kept) < 2:
                # kept[0] is 0; where all n responses are equal, the pair is a free tie
                first, second = 0, kept[1] if len(kept) > 1 else 1
                a, b = pool[i * self.n + first], pool[i * self.n + second]
                comparisons.append(Comparison(prompt, a, b, branch="base", passes=self.passes_per_pair))
                continue
            # rewards are Gaussian up to a constant per prompt: only the block of this prompt counts
            own = block(posterior, [i * self.n + position for position in kept])
            first, second = self.choose(own, key.fold(prompt.index, COIN))
            _, variance = own.gap(torch.tensor([first]), torch.tensor([second]))
            a, b = pool[i * self.n + kept[first]], pool[i * self.n + kept[second]]
            meta = {"gap_std": float(variance.sqrt())}
            comparisons.append(Comparison(prompt, a, b, branch="posterior", passes=self.passes_per_pair, meta=meta))
        return comparisons


def different(prompt: Prompt, responses: Sequence[Response]) -> list[int]:
    """Positions of responses that equal no earlier one, see `Comparison.has_equal_responses`."""
    kept: list[int] = []
    for i, response in enumerate(responses):
        if not any(Comparison(prompt, responses[j], response).has_equal_responses for j in kept):
            kept.append(i)
    return kept


def block(posterior: Posterior, positions: Sequence[int]) -> Posterior:
    """The posterior of some of the responses alone."""
    index = torch.tensor(positions)
    return Posterior(posterior.mean[index], posterior.covariance[index][:, index])
