"""One round of rollouts: sample, store, score, store; a chunk is in the ledger before the next one begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
from typing import TypedDict

import torch

from lightning_rlhf.collectors.base import AbstractRoundCollector
from lightning_rlhf.collectors.progress import Progress
from lightning_rlhf.generation import PolicyEngine
from lightning_rlhf.generation.base import Request
from lightning_rlhf.generation.rollouts import RolloutGenerator
from lightning_rlhf.ledger.rollouts import RolloutTable, ScoredParts
from lightning_rlhf.randomness import Key, Stream
from lightning_rlhf.rewards import AbstractReward, RewardOutput, checked_output
from lightning_rlhf.rewards.base import RoundSamples, metrics_of
from lightning_rlhf.runtime import distributed, preemption
from lightning_rlhf.types import Preference, Prompt, Rollout


class PartMoments(TypedDict):
    """Statistics of one part of a reward over the responses of a round to which it applies.

    Attributes:
        mean: mean value.
        std: standard deviation, divided by the number of values.
        count: number of values.
    """

    mean: float
    std: float
    count: int


@dataclass
class RolloutRound:
    """One round: responses that were sampled and scored together.

    Args:
        index: number of the round, from 0.
        groups: scored rollouts, prompt by prompt, in the order of the round.
        rewards: reward of each rollout in training, group after group, normalized and with penalties; set by the
            DataModule.
        sampling_seconds: wall time of sampling in this process.
        labeling_seconds: wall time of scoring in this process.
        labels_bought: scores bought in this process; those read back from the ledger are not counted.
        parts: mean, std and number of the values of each part of the reward, by name; empty for a reward without
            parts.
        metrics: metrics of a reward that learns from the responses, by name.
        failed: always empty: a reward that cannot score stops the run.
        preferences: always empty; for callbacks that report on pairs.
        ties: always 0, likewise.
    """

    index: int
    groups: list[list[Rollout]]
    rewards: list[float] = field(default_factory=list)
    sampling_seconds: float = 0.0
    labeling_seconds: float = 0.0
    labels_bought: int = 0
    parts: dict[str, PartMoments] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    preferences: Sequence[Preference] = ()
    ties: int = 0

    @property
    def rollouts(self) -> list[Rollout]:
        """All rollouts, prompt by prompt."""
        return list(chain.from_iterable(self.groups))

    def scores(self) -> RewardOutput:
        """Scores of the rollouts, as the ledger holds them; ``std`` only if every rollout has one."""
        rewards = torch.tensor([rollout.reward for rollout in self.rollouts], dtype=torch.float64)
        stds = [rollout.std for rollout in self.rollouts if rollout.std is not None]
        return RewardOutput(rewards, torch.tensor(stds, dtype=torch.float64) if len(stds) == len(rewards) else None)


class RolloutCollector(AbstractRoundCollector[RolloutGenerator, list[Rollout], RolloutRound]):
    """Samples rounds of rollouts and scores them, through the ledger; an item is the rollouts of one prompt.

    Args:
        table: rollouts of the ledger; None on ranks other than zero.
        reward: scores them, on rank zero.
        key: key of the run; rounds are folded in.
        responses_per_prompt: rollouts of each prompt, >= 1.
        progress: makes progress bars; see `lightning_rlhf.collectors.preferences.RoundCollector`.
        learn: lets the reward learn from the responses of a round before they are scored, on every rank; default: it
            does not.
    """

    def __init__(
        self,
        table: RolloutTable | None,
        reward: AbstractReward,
        key: Key,
        responses_per_prompt: int,
        progress: Progress | None = None,
        learn: Callable[[RoundSamples], None] | None = None,
    ) -> None:
        super().__init__(None if table is None else table.store, key, progress)
        self.table, self.reward, self.learn = table, reward, learn
        self.responses_per_prompt = responses_per_prompt

    def _new_round(self, index: int) -> RolloutRound:
        return RolloutRound(index, [])

    def _held(self, index: int) -> list[int]:
        return self._rollouts.positions(index)

    def _engine(self, source: RolloutGenerator) -> PolicyEngine:
        return source.engine

    @property
    def _rollouts(self) -> RolloutTable:
        assert self.table is not None  # asked on rank zero
        return self.table

    def _sample_chunk(self, prompts: Sequence[Prompt], source: RolloutGenerator, key: Key) -> list[list[Rollout]]:
        # between chunks: all earlier chunks are in the ledger and nothing is lost
        preemption.check()
        size = self.responses_per_prompt
        # prompt after prompt, [prompts * responses_per_prompt]; each sample has random numbers of its own
        requests: list[Request] = []
        for prompt in prompts:
            requests.extend(Request(prompt, key.fold(prompt.index, sample)) for sample in range(size))
        rollouts = source.generate(requests)
        return [rollouts[i : i + size] for i in range(0, len(rollouts), size)]

    def _keep(self, index: int, items: Sequence[list[Rollout]], positions: Sequence[int]) -> None:
        self._rollouts.add(index, items, positions)

    def _finish(self, index: int, num_prompts: int, chunk: int) -> int:
        bought = self._score(index, chunk * self.responses_per_prompt)
        info: dict[str, object] = {"prompts": num_prompts}
        # from the ledger, which also has the chunks that were scored before a restart
        parts = {name: part_moments(values) for name, values in self._rollouts.parts(index).items()}
        metrics = metrics_of(self.reward)
        if parts:
            info["parts"] = parts
        if metrics:
            info["metrics"] = metrics
        self._ledger.close_round(index, info)
        if parts:
            self._rollouts.forget_parts()
        return bought

    def _before_labels(self, index: int, prompts: Sequence[Prompt]) -> None:
        if self.learn is None:
            return
        self._note_columns(prompts)
        rollouts = [
            replace(rollout, prompt=self._with_columns(rollout.prompt), reward=None, std=None)
            for _, _, rollout in self._rows(index)
        ]
        # a spent budget leaves a round without responses
        if rollouts:
            self.learn(RoundSamples(index, rollouts, self._earlier, self.key.fold(Stream.LEARNING, index)))

    def _earlier(self, index: int) -> list[Rollout]:
        """Responses of an earlier round, without the columns of their rows; every rank must ask."""
        return [rollout for _, _, rollout in self._rows(index)]

    def _rows(self, index: int) -> list[tuple[int, int, Rollout]]:
        return distributed.from_rank_zero(lambda: self._rollouts.rollouts(index))

    def _read(self, result: RolloutRound, index: int) -> None:
        rows = self._rows(index)
        # rows come by position, so that the rollouts of a place are adjacent
        for _, same in groupby(rows, key=lambda row: row[1]):
            result.groups.append([rollout for _, _, rollout in same])
        info = distributed.from_rank_zero(lambda: self._ledger.round_info(index)) or {}
        result.parts, result.metrics = info.get("parts", {}), info.get("metrics", {})

    def _score(self, index: int, chunk: int) -> int:
        """Buy the scores that are missing, chunk by chunk in the order of the round; returns their number."""
        rows = self._rollouts.rollouts(index)
        missing = [place for place, (_, _, rollout) in enumerate(rows) if rollout.reward is None]
        if not missing:
            return 0
        with self.progress(f"round {index}: scoring", len(missing)) as bar:
            for start in range(0, len(missing), chunk):
                preemption.check()
                places = missing[start : start + chunk]
                rollouts = [rows[place][2] for place in places]
                prompts = [self._with_columns(rollout.prompt) for rollout in rollouts]
                output = checked_output(self.reward, prompts, [rollout.response for rollout in rollouts])
                parts = {name: values.tolist() for name, values in output.parts.items()}
                # chunk by chunk: a run that is killed has lost one chunk of paid scores at most
                self._rollouts.add_scores(
                    [rows[place][0] for place in places],
                    output.mean.tolist(),
                    [None] * len(places) if output.std is None else output.std.tolist(),
                    ScoredParts(index, places[0], parts) if parts else None,
                )
                bar.update(len(places))
        return len(missing)


def part_moments(values: Sequence[float]) -> PartMoments:
    """Statistics of the values of a part of a reward; NaN marks responses to which it does not apply."""
    found = torch.tensor(values, dtype=torch.float64)
    known = found[~found.isnan()]
    # an empty tensor would give NaN, which is no JSON
    if not len(known):
        return PartMoments(mean=0.0, std=0.0, count=0)
    return PartMoments(mean=known.mean().item(), std=known.std(correction=0).item(), count=len(known))
