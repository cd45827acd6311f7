"""Rollouts: responses of the policy with what policy gradients need of the moment they were drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from torch import Tensor

from lightning_rlhf.generation.base import Request
from lightning_rlhf.generation.engine import with_logps
from lightning_rlhf.models.shared_prefix import Group
from lightning_rlhf.types import Rollout


class RolloutDrawer:
    """Draws responses with log-probabilities of the law that drew them, of the reference, and values of their states.

    At temperature 1 the policy's log-probabilities are those of the pass that chose the token. At another one they are
    computed anew, for policy and reference alike, at that temperature: the gradient is that of the law that is sampled.

    Args:
        engine: decodes; a `DecodeEngine` or a `VLLMEngine` with a reference.
        values: computes V of the state before each token, one tensor per response; None without a value model.

    Raises:
        ValueError: if the nucleus is cut: the law that is sampled is then none that the loss could follow.
    """

    def __init__(self, engine: Any, values: Callable[[Sequence[Group]], list[Tensor]] | None = None) -> None:
        if engine.decoding.top_p < 1.0:
            raise ValueError(
                f"policy gradients need log-probabilities of the law that was sampled, which a nucleus cuts; set "
                f"data.decoding.top_p to 1 (got {engine.decoding.top_p})"
            )
        self.engine, self.values = engine, values

    def draw(self, requests: Sequence[Request]) -> list[Rollout]:
        """Draw one rollout per request, in order; requests with equal prompts should stand together."""
        temperature = self.engine.decoding.temperature
        prompts = [request.prompt for request in requests]
        responses = self.engine.generate(requests, reference_logps=temperature == 1.0)
        if temperature != 1.0:
            responses = [replace(r, policy_logps=None, reference_logps=None) for r in responses]
            budget = self.engine.tokens_per_batch
            responses = with_logps(self.engine.policy, "policy_logps", prompts, responses, budget, temperature)
            with self.engine.reference.active() as model:
                responses = with_logps(model, "reference_logps", prompts, responses, budget, temperature)
        values: list[tuple[float, ...] | None] = [None] * len(responses)
        if self.values is not None:
            groups = [
                (ids, [responses[i].ids for i in same])
                for ids, same in groupby(range(len(responses)), key=lambda i: prompts[i].ids)
            ]
            values = [tuple(found.tolist()) for found in self.values(groups)]
        return [Rollout(*parts[:2], temperature, parts[2]) for parts in zip(prompts, responses, values, strict=True)]
