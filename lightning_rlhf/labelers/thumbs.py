"""Thumbs up or down: labels of single responses by a reward and a threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

from lightning_rlhf.labelers.base import AbstractLabeler
from lightning_rlhf.labelers.reward import Rule, comparison_key, parts_of, verdict
from lightning_rlhf.randomness import Key
from lightning_rlhf.rewards.base import AbstractReward, checked_output
from lightning_rlhf.runtime.plugins import check_plugin
from lightning_rlhf.types import Comparison, Label


class ThumbsLabeler(AbstractLabeler):
    """Says of single responses whether they are desirable: a simulated user who gives a thumb up or down.

    P(desirable) = sigmoid(r(y) - threshold), the Bradley-Terry probability against a response whose reward is the
    threshold. Any reward serves, such as the score of a judge (`LLMScoreReward`). ``meta`` of a label holds
    ``reward_a``, and ``reward_a/<part>`` for each part of a reward that has parts.

    Args:
        reward: the reward of a response.
        threshold: reward at which a response is as often called desirable as not.
        rule: ``bernoulli`` samples a label with P(desirable), as one user would give it; ``soft`` returns the
            probability; ``argmax`` calls a response desirable if its reward is above the threshold, and gives 0.5 at
            the threshold.
        cost: price of one label, >= 0, in the unit of the label budget.

    Raises:
        ValueError: if rule, threshold or cost is out of range.
    """

    judges: ClassVar[Literal["pairs", "singles", "both"]] = "singles"

    def __init__(
        self, reward: AbstractReward, threshold: float = 0.0, rule: Rule = "bernoulli", cost: float = 1.0
    ) -> None:
        if rule not in get_args(Rule):
            raise ValueError(f"rule must be one of {', '.join(get_args(Rule))}; got {rule!r}")
        if not math.isfinite(threshold) or not cost >= 0:
            raise ValueError(f"threshold must be finite and cost >= 0; got {threshold} and {cost}")
        check_plugin("ThumbsLabeler.reward", reward, AbstractReward)
        self.reward, self.threshold, self.cost = reward, threshold, cost
        self.rule: Rule = rule

    def label(self, comparisons: Sequence[Comparison], key: Key) -> list[Label]:
        """Score the responses in one batch and judge by the rule.

        Raises:
            ValueError: if a comparison holds a pair.
        """
        # rewards need not handle an empty batch
        if not comparisons:
            return []
        pair = next((comparison for comparison in comparisons if not comparison.is_single), None)
        if pair is not None:
            raise ValueError(
                f"ThumbsLabeler judges single responses, and prompt {pair.prompt.index} came with a pair (branch "
                f"{pair.branch!r}): use SingleSampler, or RewardLabeler for pairs"
            )
        output = checked_output(self.reward, [c.prompt for c in comparisons], [c.a for c in comparisons])
        labels = []
        for place, (comparison, reward) in enumerate(zip(comparisons, output.mean.tolist(), strict=True)):
            uniform = comparison_key(key, comparison).uniforms(1).item()
            # P(desirable) = sigma(r(y) - threshold)
            probability = verdict(reward, self.threshold, self.rule, uniform)
            parts = {name: value for name, value in parts_of(output, place, place).items() if "reward_b" not in name}
            labels.append(Label(probability, cost=self.cost, meta={"reward_a": reward, **parts}))
        return labels
