"""A mixture of samplers: each prompt is assigned to one of them at random."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from lightning_rlhf.generation.base import AbstractEngine
from lightning_rlhf.randomness import Key
from lightning_rlhf.samplers.base import AbstractPairSampler, AbstractSelectiveSampler, SamplerState
from lightning_rlhf.samplers.draws import coin
from lightning_rlhf.types import Comparison, Label, Prompt


class MixtureSampler(AbstractPairSampler):
    """Assigns each prompt to one of several samplers at random.

    ``meta["member"]`` of a comparison is the position of the sampler that generated it. Each member observes its own
    comparisons.

    Args:
        samplers: the members; at least one, none of them a mixture.
        weights: unnormalized probability of each member, >= 0, not all zero. Default: equal.

    Raises:
        ValueError: if there is no member, a member is a mixture, or the weights do not fit the members.
    """

    method = "Mixture"

    def __init__(self, samplers: list[AbstractPairSampler], weights: list[float] | None = None) -> None:
        if not samplers:
            raise ValueError("a mixture needs at least one sampler; got an empty list")
        # the outer mixture would overwrite meta["member"] of the inner one, which `observe` reads
        if any(isinstance(sampler, MixtureSampler) for sampler in samplers):
            raise ValueError("a mixture cannot hold a mixture; list all samplers in one and multiply the weights")
        # the mixture is no selective sampler: the collector would label all pairs of such a member
        for sampler in samplers:
            if isinstance(sampler, AbstractSelectiveSampler) and sampler.label_fraction < 1:
                raise ValueError(
                    f"a mixture labels all of its pairs, but {type(sampler).__name__} labels only a fraction of "
                    f"{sampler.label_fraction:g} of its own; set its label_fraction=1"
                )
        weights = [1.0] * len(samplers) if weights is None else list(weights)
        if len(weights) != len(samplers):
            raise ValueError(f"got {len(weights)} weights for {len(samplers)} samplers; give one weight per sampler")
        # also refuses NaN
        if not all(0.0 <= weight < math.inf for weight in weights) or sum(weights) <= 0.0:
            raise ValueError(f"weights must be finite, >= 0 and not all zero; got {weights}")
        self.samplers = list(samplers)
        self.shares = [weight / sum(weights) for weight in weights]
        self.needs_engine = any(sampler.needs_engine for sampler in samplers)
        self.passes_per_pair = self._average([sampler.passes_per_pair for sampler in samplers])
        self.annotations_per_pair = self._average([sampler.annotations_per_pair for sampler in samplers])
        self.first_distribution = self.second_distribution = f"one of {len(samplers)} samplers"

    def sample(self, prompts: Sequence[Prompt], engine: AbstractEngine, key: Key) -> list[Comparison]:
        """Generate one comparison per prompt, each by the member that the prompt is assigned to.

        Raises:
            ValueError: if a member does not return one comparison per prompt.
        """
        members = [self._member(coin(prompt, key)) for prompt in prompts]
        # each member samples its prompts as one batch: back to the order of the prompts afterwards
        by_position: dict[int, Comparison] = {}
        for i, sampler in enumerate(self.samplers):
            positions = [position for position, member in enumerate(members) if member == i]
            if not positions:
                continue
            # fold(i): a member that uses `coin` must not get the number that chose the member
            comparisons = sampler.sample([prompts[position] for position in positions], engine, key.fold(i))
            if len(comparisons) != len(positions):
                raise ValueError(
                    f"{type(sampler).__name__}.sample returned {len(comparisons)} comparisons for {len(positions)} "
                    f"prompts; return one per prompt, in order"
                )
            for position, comparison in zip(positions, comparisons, strict=True):
                by_position[position] = replace(comparison, meta={**comparison.meta, "member": i})
        return [by_position[position] for position in range(len(prompts))]

    def verdicts(self, comparisons: Sequence[Comparison]) -> list[Label | None]:
        """Ask each member about its own comparisons."""
        labels: list[Label | None] = [None] * len(comparisons)
        for i, sampler in enumerate(self.samplers):
            places = [place for place, comparison in enumerate(comparisons) if comparison.meta["member"] == i]
            for place, label in zip(places, sampler.verdicts([comparisons[p] for p in places]), strict=True):
                labels[place] = label
        return labels

    def observe(self, comparisons: Sequence[Comparison]) -> None:
        """Pass each member its own comparisons."""
        for i, sampler in enumerate(self.samplers):
            sampler.observe([comparison for comparison in comparisons if comparison.meta["member"] == i])

    def state_dict(self) -> SamplerState:
        """States of the members, by position."""
        return {str(i): sampler.state_dict() for i, sampler in enumerate(self.samplers)}

    def load_state_dict(self, state: SamplerState) -> None:
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
        """Position of the member that a uniform number on [0, 1) selects, by inverse transform."""
        cumulative = 0.0
        for i, share in enumerate(self.shares):
            cumulative += share
            if uniform < cumulative:
                return i
        # rounding can leave the sum of the shares below 1: take the last member with a share
        return max(i for i, share in enumerate(self.shares) if share > 0.0)

    def _average(self, values: Sequence[float]) -> float:
        """Mean of one value per member over the prompts."""
        # E[value] = sum_i P(member i) value_i
        return sum(share * value for share, value in zip(self.shares, values, strict=True))
