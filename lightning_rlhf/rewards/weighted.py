"""A weighted sum of rewards, with a curve for each of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from lightning_rlhf.rewards.base import AbstractReward, RewardOutput, as_output, check_rows, columns_read
from lightning_rlhf.rewards.function import FunctionReward
from lightning_rlhf.runtime.plugins import check_plugin
from lightning_rlhf.types import Prompt, Response


class WeightedReward(AbstractReward):
    """The sum of several rewards, each times its weight: r = sum_k w_k r_k.

    `RolloutMonitor` logs mean and std of each r_k, without its weight, as ``rollout/rewards/<name>/mean`` and ``/std``;
    labels of `RewardLabeler` hold it as ``reward_a/<name>``. Async functions run while the others are computed. Where
    a function does not apply it counts with its ``unscored``, and is left out of its curve.

    Args:
        rewards: rewards by the names of their curves.
        weights: weights by the same names; a reward without one has weight 1.

    Raises:
        ValueError: if there is no reward, a weight has no reward or is not finite, or a reward has an `earned` of its
            own, such as `UncertaintyPenalty`, which belongs around the sum.
    """

    def __init__(self, rewards: dict[str, AbstractReward], weights: dict[str, float] | None = None) -> None:
        if not rewards:
            raise ValueError("WeightedReward needs at least one reward; got none")
        for name, reward in rewards.items():
            check_plugin(f"WeightedReward.rewards.{name}", reward, AbstractReward)
            # the ledger keeps the sum alone, from which a member cannot learn
            if getattr(type(reward), "earned", AbstractReward.earned) is not AbstractReward.earned:
                kind = type(reward).__name__
                raise ValueError(f"WeightedReward.rewards.{name}: put {kind} around the WeightedReward, not into it")
        given = weights or {}
        unknown = sorted(set(given) - set(rewards))
        if unknown:
            raise ValueError(f"WeightedReward.weights names {unknown[0]!r}, which is none of {', '.join(rewards)}")
        if not all(map(math.isfinite, given.values())):
            raise ValueError(f"WeightedReward.weights must be finite; got {given}")
        self.rewards = dict(rewards)
        self.weights = {name: float(given.get(name, 1.0)) for name in rewards}

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Let every reward check the rows."""
        for reward in self.rewards.values():
            check_rows(reward, prompts)

    def columns_read(self, names: Sequence[str]) -> set[str]:
        """Columns that any of the rewards reads."""
        return set().union(*(columns_read(reward, names) for reward in self.rewards.values()))

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        """Score each response by all rewards."""
        total = torch.zeros(len(responses), dtype=torch.float64)
        variance: Tensor | None = None
        parts: dict[str, Tensor] = {}
        for name, output in self._outputs(prompts, responses).items():
            weight = self.weights[name]
            total += weight * output.mean.detach().double().cpu()
            # independent terms: var = sum_k w_k^2 var_k
            if output.std is not None:
                known = weight**2 * output.std.detach().double().cpu().square()
                variance = known if variance is None else variance + known
            parts |= named_parts(name, output)
        return RewardOutput(total, None if variance is None else variance.sqrt(), parts=parts)

    def _outputs(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> dict[str, RewardOutput]:
        """Output of each reward, in their order; async functions wait in threads while the others compute."""
        waiting = [name for name, r in self.rewards.items() if isinstance(r, FunctionReward) and r.is_async]
        found: dict[str, RewardOutput] = {}
        with ThreadPoolExecutor(max(len(waiting), 1)) as pool:
            futures: dict[str, Future[RewardOutput]] = {
                name: pool.submit(self.rewards[name].score, prompts, responses) for name in waiting
            }
            for name, reward in self.rewards.items():
                if name not in futures:
                    found[name] = as_output(reward, reward.score(prompts, responses), len(responses))
            found |= {name: future.result() for name, future in futures.items()}
        return {name: found[name] for name in self.rewards}


def named_parts(name: str, output: RewardOutput) -> dict[str, Tensor]:
    """Parts of a sum that one of its rewards gives.

    Args:
        name: name of the reward.
        output: its output; a single part of its own is the reward itself, several get its name in front.
    """
    if not output.parts:
        return {name: output.mean}
    if len(output.parts) == 1:
        return {name: next(iter(output.parts.values()))}
    return {f"{name}/{inner}": values for inner, values in output.parts.items()}
