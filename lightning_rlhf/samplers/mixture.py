"""A mixture of samplers: each prompt goes to one of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning_rlhf.generation.base import AbstractEngine
from lightning_rlhf.randomness import Key
from lightning_rlhf.samplers.base import AbstractPairSampler
from lightning_rlhf.samplers.draws import coin
from lightning_rlhf.types import Comparison, Label, Prompt


class MixtureSampler(AbstractPairSampler):
    """Gives each prompt to one of several samplers, at random.

    ``meta["member"]`` of a comparison is the position of the sampler that drew it; each member observes its own
    comparisons.

    Args:
        samplers: the members; at least one, none of them a mixture.
        weights: share of the prompts for each member, >= 0, not all zero; need not add up to 1. Omit them for equal
            shares.

    Raises:
        ValueError: if there is no member, a member is a mixture, or the weights do not fit the members.
    """

    method = "Mixture"

    def __init__(self, samplers: list[AbstractPairSampler], weights: list[float] | None = None) -> None:
        if not samplers:
            raise ValueError("a mixture needs at least one sampler; got an empty list")
        if any(isinstance(sampler, MixtureSampler) for sampler in samplers):
            raise ValueError("a mixture cannot hold a mixture; list all samplers in one and multiply the weights")
        thrifty = next((sampler for sampler in samplers if sampler.label_share < 1), None)
        if thrifty is not None:
            raise ValueError(
                f"a mixture labels all of its pairs, and {type(thrifty).__name__} would label a share of "
                f"{thrifty.label_share:g} of them; give it label_share=1"
            )
        weights = [1.0] * len(samplers) if weights is None else list(weights)
        if len(weights) != len(samplers):
            raise ValueError(f"got {len(weights)} weights for {len(samplers)} samplers; give one weight per sampler")
        if not all(0.0 <= weight < math.inf for weight in weights) or sum(weights) <= 0.0:
            raise ValueError(f"weights must be finite, >= 0 and not all zero; got {weights}")
        self.samplers = list(samplers)
        self.shares = [weight / sum(weights) for weight in weights]
        self.needs_engine = any(sampler.needs_engine for sampler in samplers)
        self.passes_per_pair = self._average([sampler.passes_per_pair for sampler in samplers])
        self.annotations_per_pair = self._average([sampler.annotations_per_pair for sampler in samplers])
        self.first_law = self.second_law = f"one of {len(samplers)} samplers"

    def sample(self, prompts: Sequence[Prompt], engine: AbstractEngine, key: Key) -> list[Comparison]:
        """Draw one comparison per prompt, by the member that the prompt fell to."""
        members = [self._member(coin(prompt, key)) for prompt in prompts]
        drawn: dict[int, Comparison] = {}
        for i, sampler in enumerate(self.samplers):
            places = [place for place, member in enumerate(members) if member == i]
            if not places:
                continue
            # its own sub-stream: a member that tosses a coin must not see ours again
            comparisons = sampler.sample([prompts[place] for place in places], engine, key.fold(i))
            if len(comparisons) != len(places):
                raise ValueError(
                    f"{type(sampler).__name__}.sample returned {len(comparisons)} comparisons for {len(places)} "
                    f"prompts; return one per prompt, in order"
                )
            for place, comparison in zip(places, comparisons, strict=True):
                drawn[place] = replace(comparison, meta={**comparison.meta, "member": i})
        return [drawn[place] for place in range(len(prompts))]

    def verdicts(self, comparisons: Sequence[Comparison]) -> list[Label | None]:
        """What each member says of its own comparisons."""
        labels: list[Label | None] = [None] * len(comparisons)
        for i, sampler in enumerate(self.samplers):
            places = [place for place, comparison in enumerate(comparisons) if comparison.meta["member"] == i]
            for place, label in zip(places, sampler.verdicts([comparisons[p] for p in places]), strict=True):
                labels[place] = label
        return labels

    def observe(self, comparisons: Sequence[Comparison]) -> None:
        """Let each member learn from its own comparisons."""
        for i, sampler in enumerate(self.samplers):
            sampler.observe([comparison for comparison in comparisons if comparison.meta["member"] == i])

    def state_dict(self) -> dict[str, Any]:
        """States of the members, by position."""
        return {str(i): sampler.state_dict() for i, sampler in enumerate(self.samplers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the states of the members.

        Raises:
            ValueError: if the state belongs to a mixture of another size.
        """
        if len(state) != len(self.samplers):
            raise ValueError(
                f"the checkpoint holds a mixture of {len(state)} samplers, this one has {len(self.samplers)}; "
                f"resume with the samplers of the first run"
            )
        for i, sampler in enumerate(self.samplers):
            sampler.load_state_dict(state[str(i)])

    def _member(self, uniform: float) -> int:
        """Position of the member whose share of [0, 1) holds a number."""
        edge = 0.0
        for i, share in enumerate(self.shares):
            edge += share
            if uniform < edge:
                return i
        # rounding left the last edge below 1
        return max(i for i, share in enumerate(self.shares) if share > 0.0)

    def _average(self, values: Sequence[float]) -> float:
        return sum(share * value for share, value in zip(self.shares, values, strict=True))
