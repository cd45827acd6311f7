"""Rollouts: responses of the policy with their log-probabilities and values at sampling time, for policy gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby

from torch import Tensor

from lightning_rlhf.generation.base import Request
from lightning_rlhf.generation.engine import DecodeEngine, with_logps
from lightning_rlhf.generation.external import AbstractExternalEngine
from lightning_rlhf.logprobs.packing import Group
from lightning_rlhf.types import Rollout


class RolloutGenerator:
    """Generates responses with their log-probabilities under policy and reference, and the values of their states.

    At temperature 1 the log-probabilities of the policy come from the forward passes that generated the tokens. At
    other temperatures they are recomputed at that temperature, for policy and reference alike, since the policy
    gradient needs the log-probabilities of the sampling distribution.

    Args:
        engine: generates responses; with a reference.
        values: computes V of the state before each token, one tensor per response. Default: no value model.

    Raises:
        ValueError: if top_p is below 1: the sampling distribution then has no log-probabilities for the loss.
    """

    def __init__(
        self,
        engine: DecodeEngine | AbstractExternalEngine,
        values: Callable[[Sequence[Group]], list[Tensor]] | None = None,
    ) -> None:
        if engine.decoding.top_p < 1.0:
            raise ValueError(
                f"policy gradients need log-probabilities of the sampling distribution, which top-p truncates; set "
                f"data.decoding.top_p to 1 (got {engine.decoding.top_p})"
            )
        self.engine, self.values = engine, values

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        """Generate one rollout per request, in order; requests with equal prompts should be adjacent.

        Args:
            requests: responses to generate.
        """
        temperature = self.engine.decoding.temperature
        prompts = [request.prompt for request in requests]
        # at other temperatures the reference is scored below; scores at temperature 1 would be wasted
        responses = self.engine.generate(requests, reference_logps=temperature == 1.0)
        if temperature != 1.0:
            # the engine reports log-probabilities at temperature 1: replace them by log softmax(h / T)
            assert self.engine.reference is not None
            responses = [replace(r, policy_logps=None, reference_logps=None) for r in responses]
            budget = self.engine.tokens_per_batch
            responses = with_logps(self.engine.policy, "policy_logps", prompts, responses, budget, temperature)
            with self.engine.reference.active() as model:
                responses = with_logps(model, "reference_logps", prompts, responses, budget, temperature)
        values: list[tuple[float, ...] | None] = [None] * len(responses)
        if self.values is not None:
            # adjacent responses of one prompt form a group, whose prompt runs once
            groups: list[Group] = []
            for ids, members in groupby(range(len(responses)), key=lambda i: prompts[i].ids):
                groups.append((ids, [responses[i].ids for i in members]))
            values = [tuple(found.tolist()) for found in self.values(groups)]
        return [
            Rollout(prompt, response, temperature, value)
            for prompt, response, value in zip(prompts, responses, values, strict=True)
        ]
