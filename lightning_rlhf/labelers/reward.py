"""Labels from a reward function: the simulated annotator of experiments such as those of PILAF (arXiv 2502.04270)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch

from lightning_rlhf.labelers.base import AbstractLabeler
from lightning_rlhf.randomness import Key
from lightning_rlhf.rewards.base import AbstractReward, RewardOutput, checked_output, learns_from_samples
from lightning_rlhf.runtime.plugins import check_plugin
from lightning_rlhf.types import Comparison, Label


Rule = Literal["bernoulli", "soft", "argmax"]


def verdict(reward_a: float, reward_b: float, rule: Rule, uniform: float) -> float:
    """Turn two rewards into P(a preferred), under the Bradley-Terry model P* = sigmoid(reward_a - reward_b).

    Args:
        reward_a: reward of the first response.
        reward_b: reward of the second response.
        rule: ``"bernoulli"`` gives 1 with probability P* and 0 otherwise, ``"soft"`` gives P* itself, ``"argmax"``
            gives 1 if the first reward is higher, 0 if the second is, and exactly 0.5 if they are equal.
        uniform: a uniform random number from [0, 1); only ``"bernoulli"`` uses it.
    """
    if rule == "argmax":
        return 0.5 if reward_a == reward_b else float(reward_a > reward_b)
    # Bradley-Terry: P*(a > b) = sigmoid(r(a) - r(b))
    probability = torch.sigmoid(torch.tensor(reward_a - reward_b, dtype=torch.float64)).item()
    return probability if rule == "soft" else float(uniform < probability)


def comparison_key(key: Key, comparison: Comparison) -> Key:
    """Key of a comparison's random numbers, from its content: its prompt, and both responses in order.

    Where a prompt comes twice in a round its two comparisons so get numbers of their own, and neither batching nor
    ranks can change them.
    """
    return key.fold(comparison.prompt.index, Key(comparison.a.ids).seed(), Key(comparison.b.ids).seed())


class RewardLabeler(AbstractLabeler):
    """Labels by a reward: a simulated annotator whose preferences follow the Bradley-Terry model.

    The annotator prefers ``a`` with probability P* = sigmoid(r(a) - r(b)). Labels depend on seed, round, prompt and
    responses alone, not on the batches or the number of processes. ``meta`` of a label holds ``reward_a`` and
    ``reward_b``, and ``reward_a/<part>`` for each part of a reward that has parts. A reward that is not finite stops
    the run with an error.

    Args:
        reward: the reward that the annotator follows.
        rule: ``bernoulli`` samples a hard 0/1 label with probability P*, as a single human would give it; ``soft``
            returns P* itself, as infinitely many humans would; ``argmax`` prefers the higher reward, and calls equal
            rewards a tie (0.5).
        cost: price of one label, >= 0, in the unit of the label budget.
    """

    def __init__(self, reward: AbstractReward, rule: Rule = "bernoulli", cost: float = 1.0) -> None:
        if rule not in get_args(Rule):
            raise ValueError(f"rule must be one of {', '.join(get_args(Rule))}; got {rule!r}")
        # also refuses NaN
        if not cost >= 0:
            raise ValueError(f"the cost of a label must be >= 0; got {cost}")
        check_plugin("RewardLabeler.reward", reward, AbstractReward)
        # it would stay untrained: pairs are labeled without being shown to it
        if learns_from_samples(reward):
            raise ValueError(
                f"RewardLabeler.reward: {type(reward).__name__} learns from rollouts, which preference learning has "
                f"none of; use it as data.reward of RolloutDataModule"
            )
        self.reward = reward
        self.rule: Rule = rule
        self.cost = cost

    def label(self, comparisons: Sequence[Comparison], key: Key) -> list[Label]:
        """Score both responses of each comparison in one batch and judge by the rule."""
        # rewards need not handle an empty batch
        if not comparisons:
            return []
        prompts = [comparison.prompt for comparison in comparisons]
        responses = [comparison.a for comparison in comparisons] + [comparison.b for comparison in comparisons]
        # one call for both sides: rewards are models, and batches pay
        output = checked_output(self.reward, prompts + prompts, responses)
        rewards = output.mean.tolist()
        rewards_a, rewards_b = rewards[: len(comparisons)], rewards[len(comparisons) :]
        parts = [parts_of(output, place, place + len(comparisons)) for place in range(len(comparisons))]
        return [
            Label(
                probability=verdict(a, b, self.rule, comparison_key(key, comparison).uniforms(1).item()),
                cost=self.cost,
                meta={"reward_a": a, "reward_b": b, **part},
            )
            for comparison, a, b, part in zip(comparisons, rewards_a, rewards_b, parts, strict=True)
        ]


def parts_of(output: RewardOutput, a: int, b: int) -> dict[str, float]:
    """Parts of the rewards of two responses as entries of a label, without those that do not apply.

    Args:
        output: rewards of a batch.
        a: place of the first response.
        b: place of the second response.
    """
    found = {}
    for name, values in output.parts.items():
        for side, place in (("a", a), ("b", b)):
            value = values[place].item()
            # a ledger holds no NaN
            if not math.isnan(value):
                found[f"reward_{side}/{name}"] = value
    return found
