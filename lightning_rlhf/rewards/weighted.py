"""A weighted sum of rewards, with a curve for each of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from lightning_rlhf.evaluation.metrics import merge_moments, moments_of
from lightning_rlhf.rewards.base import (
    AbstractReward,
    RewardOutput,
    RoundSamples,
    as_output,
    check_rows,
    columns_read,
    learns_from_samples,
    metrics_of,
)
from lightning_rlhf.rewards.function import FunctionReward
from lightning_rlhf.runtime import distributed
from lightning_rlhf.runtime.plugins import check_plugin
from lightning_rlhf.types import Prompt, Response, State


class WeightedReward(AbstractReward):
    """The sum of several rewards, each times its weight: r = sum_k w_k r_k.

    `RolloutMonitor` logs mean and std of each r_k, without its weight, as ``rollout/rewards/<name>/mean`` and ``/std``;
    labels of `RewardLabeler` hold it as ``reward_a/<name>``. Async functions run while the others are computed. Where
    a function does not apply it counts with its ``unscored``, and is left out of its curve.

    With ``standardize`` r = sum_k w_k (r_k - m_k) / s_k, where m_k and s_k are mean and std of r_k over all training
    responses up to the present round, so that a weight means the same for rewards of any scale. Whole rounds are then
    scored at once; before the first round the rewards are taken as they are. The log has m_k and s_k as
    ``rollout/rewards/<name>/running_mean`` and ``/running_std``.

    Args:
        rewards: rewards by the names of their curves.
        weights: weights by the same names; a reward without one has weight 1.
        standardize: give every reward mean 0 and std 1 before it is weighted.

    Raises:
        ValueError: if there is no reward, a weight has no reward or is not finite, or a reward has an `earned` of its
            own, such as `UncertaintyPenalty`, which belongs around the sum.
    """

    def __init__(
        self, rewards: dict[str, AbstractReward], weights: dict[str, float] | None = None, standardize: bool = False
    ) -> None:
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
        self.standardize = standardize
        # count, mean and sum of squared deviations of each reward
        self._moments = {name: torch.zeros(3, dtype=torch.float64) for name in rewards}
        # outputs of the newest round, and the place of each response in them
        self._outputs_of_round: dict[str, RewardOutput] = {}
        self._places: dict[tuple[object, ...], int] = {}

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
        for name, output in self._known_outputs(prompts, responses).items():
            mean, std = self._scale(name)
            # w_k (r_k - m_k) / s_k; without standardization m_k = 0 and s_k = 1
            weight = self.weights[name] / std
            total += weight * (output.mean.detach().double().cpu() - mean)
            # independent terms: var = sum_k w_k^2 var_k
            if output.std is not None:
                known = weight**2 * output.std.detach().double().cpu().square()
                variance = known if variance is None else variance + known
            parts |= named_parts(name, output)
        return RewardOutput(total, None if variance is None else variance.sqrt(), parts=parts)

    @property
    def learns_from_samples(self) -> bool:
        """Whether a reward learns from the responses of a round, or means and stds do."""
        return self.standardize or any(map(learns_from_samples, self.rewards.values()))

    def learn(self, samples: RoundSamples) -> None:
        """Let the rewards learn, then take their values on the round into means and stds."""
        for reward in self.rewards.values():
            if learns_from_samples(reward):
                reward.learn(samples)
        if not self.standardize:
            return
        prompts, responses = samples.prompts, samples.responses
        # rank zero alone: a judge is asked once
        outputs = distributed.from_rank_zero(lambda: self._checked_outputs(prompts, responses))
        for name, output in outputs.items():
            self._moments[name] = merge_moments(torch.stack([self._moments[name], moments_of(output.mean)]))
        self._outputs_of_round = outputs
        self._places = {_name(p, r): place for place, (p, r) in enumerate(zip(prompts, responses, strict=True))}

    def metrics(self) -> Mapping[str, float]:
        """Metrics of the rewards, and their means and stds so far."""
        found: dict[str, float] = {}
        for name, reward in self.rewards.items():
            found |= metrics_of(reward)
            if self.standardize:
                found[f"{name}/running_mean"], found[f"{name}/running_std"] = self._scale(name)
        return found

    def state_dict(self) -> dict[str, object]:
        """State of the rewards, and of their means and stds."""
        states = {name: reward.state_dict() for name, reward in self.rewards.items() if hasattr(reward, "state_dict")}
        return {"rewards": states, "moments": {name: values.tolist() for name, values in self._moments.items()}}

    def load_state_dict(self, state: State) -> None:
        """Restore the state of `state_dict`."""
        # checkpoints of 0.1 hold none
        for name, inner in state.get("rewards", {}).items():
            self.rewards[name].load_state_dict(inner)
        for name, values in state.get("moments", {}).items():
            self._moments[name] = torch.tensor(values, dtype=torch.float64)
        self._outputs_of_round, self._places = {}, {}

    def _scale(self, name: str) -> tuple[float, float]:
        """Mean and std that a reward is standardized by; 0 and 1 without standardization."""
        count, mean, deviations = self._moments[name].tolist()
        if not self.standardize or not count:
            return 0.0, 1.0
        std = math.sqrt(deviations / count)
        # a reward that never varies adds nothing
        return mean, std if std > 0 else 1.0

    def _checked_outputs(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> dict[str, RewardOutput]:
        """Outputs of each reward with finite means, float64 on the CPU."""
        with torch.no_grad():
            found = self._outputs(prompts, responses)
        for name, output in found.items():
            if not bool(output.mean.isfinite().all()):
                raise ValueError(
                    f"WeightedReward.rewards.{name} returned a reward that is not finite: return a low number for an "
                    f"answer that cannot be scored"
                )
            parts = {part: values.detach().cpu() for part, values in output.parts.items()}
            std = None if output.std is None else output.std.detach().double().cpu()
            found[name] = RewardOutput(output.mean.detach().double().cpu(), std, parts=parts)
        return found

    def _known_outputs(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> dict[str, RewardOutput]:
        """Outputs of each reward, those of the newest round without asking again."""
        names = [_name(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        if not all(name in self._places for name in names) or not names:
            return self._outputs(prompts, responses)
        places = torch.tensor([self._places[name] for name in names])
        return {name: _rows(output, places) for name, output in self._outputs_of_round.items()}

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


def _name(prompt: Prompt, response: Response) -> tuple[object, ...]:
    return prompt.index, prompt.ids, prompt.text, response.ids, response.text


def _rows(output: RewardOutput, places: Tensor) -> RewardOutput:
    parts = {name: values[places] for name, values in output.parts.items()}
    return RewardOutput(output.mean[places], None if output.std is None else output.std[places], parts=parts)
