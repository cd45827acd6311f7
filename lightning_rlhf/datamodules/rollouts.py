"""The DataModule of reinforcement learning: prompts -> rollouts -> reward -> ledger -> batches.

A round of one batch and one epoch is on-policy (REINFORCE, RLOO); several epochs per round are the inner epochs of PPO
and GRPO. A round is read from the ledger, so that a killed run continues with the responses and scores it had.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_rlhf.batching.batches import ResponseBatch, RolloutGroup
from lightning_rlhf.batching.collate import collate_rollouts
from lightning_rlhf.batching.steps import Step
from lightning_rlhf.collectors.rollouts import RolloutCollector, RolloutRound
from lightning_rlhf.datamodules.base import DEFAULT_DECODING
from lightning_rlhf.datamodules.options import (
    DEFAULT_BATCHING,
    DEFAULT_PROMPTS,
    DEFAULT_ROUNDS,
    BatchOptions,
    PromptOptions,
    RoundOptions,
    at_least_one,
)
from lightning_rlhf.datamodules.rounds import AbstractRoundDataModule
from lightning_rlhf.evaluation.metrics import merge_moments, moments_of
from lightning_rlhf.generation.base import Decoding
from lightning_rlhf.ledger.rollouts import RolloutTable
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.prompts import AbstractPromptSource
from lightning_rlhf.protocols import RolloutModule, module_of
from lightning_rlhf.renamed import accepts_old_names
from lightning_rlhf.rewards import AbstractReward
from lightning_rlhf.rewards.base import RoundSamples, check_rows, learns_from_samples
from lightning_rlhf.runtime.plugins import check_plugin
from lightning_rlhf.types import Rollout, State


@dataclass(frozen=True)
class RewardShaping:
    """How scores become the rewards of training.

    Args:
        normalize_rewards: ``std`` divides rewards by their standard deviation over all rounds so far, ``mean_std`` also
            subtracts their mean; ``none`` keeps them, so that beta has the meaning that the objective gives it.
        missing_eos_penalty: subtracted from the reward of a response that the token limit cut, >= 0, in units of the
            normalized reward.
    """

    normalize_rewards: Literal["none", "std", "mean_std"] = "none"
    missing_eos_penalty: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.missing_eos_penalty < float("inf"):
            raise ValueError(
                f"data.shaping.missing_eos_penalty must be finite and at least 0; got {self.missing_eos_penalty}"
            )


NO_SHAPING = RewardShaping()


@accepts_old_names("data")
class RolloutDataModule(AbstractRoundDataModule[RolloutGroup]):
    """Samples responses in rounds with the current policy, scores them, and serves them as batches.

    Args:
        prompts: where training prompts come from.
        reward: scores the responses; the policy is trained for it.
        heldout: prompts for validation; default: no validation.
        heldout_reward: scores held-out responses; default: ``reward``.
        decoding: length, temperature and batch of decoding; ``top_p`` must be 1.
        responses_per_prompt: responses sampled per prompt and round, >= 1; RLOO and GRPO need two.
        rounds: how rounds are cut; a round of one batch is on-policy.
        prompts_per_batch: prompts per optimizer step over all processes, with all their responses, >= 1; times
            ``trainer.accumulate_grad_batches``.
        batching: how an optimizer step is split into micro-batches.
        shaping: how scores become the rewards of training.
        prompt_options: how prompts become tokens.
        seed: decides prompt order and samples.
    """

    FREE_SETTINGS: ClassVar[frozenset[str]] = AbstractRoundDataModule.FREE_SETTINGS | {"heldout_reward"}
    ITEMS: ClassVar[str] = "prompts_per_batch"
    UNIT: ClassVar[str] = "prompt"
    ROUND_ITEMS: ClassVar[str] = "rollouts"

    def __init__(
        self,
        prompts: AbstractPromptSource,
        reward: AbstractReward,
        heldout: AbstractPromptSource | None = None,
        heldout_reward: AbstractReward | None = None,
        decoding: Decoding = DEFAULT_DECODING,
        responses_per_prompt: int = 4,
        rounds: RoundOptions = DEFAULT_ROUNDS,
        prompts_per_batch: int = 8,
        batching: BatchOptions = DEFAULT_BATCHING,
        shaping: RewardShaping = NO_SHAPING,
        prompt_options: PromptOptions = DEFAULT_PROMPTS,
        seed: int = 0,
    ) -> None:
        super().__init__(
            prompts=prompts,
            heldout=heldout,
            decoding=decoding,
            rounds=rounds,
            items_per_batch=prompts_per_batch,
            batching=batching,
            prompt_options=prompt_options,
            seed=seed,
        )
        at_least_one(responses_per_prompt=responses_per_prompt)
        check_plugin("data.reward", reward, AbstractReward)
        if heldout_reward is not None:
            check_plugin("data.heldout_reward", heldout_reward, AbstractReward)
        self.reward, self.heldout_reward = reward, heldout_reward or reward
        self.responses_per_prompt = responses_per_prompt
        self.shaping = shaping
        self.round: RolloutRound | None = None
        """The newest round, for callbacks."""
        # number, mean and sum of squared deviations of all rewards so far
        self._moments = torch.zeros(3, dtype=torch.float64)
        # rounds whose responses the reward has learned from
        self._learned = 0
        self._groups: list[RolloutGroup] = []
        # a copy: `observe` may change the lists and tensors of the state in place
        self._initial_reward = copy.deepcopy(reward.state_dict())

    @property
    def labels_per_prompt(self) -> int:
        """Scores that a prompt of a round costs."""
        return self.responses_per_prompt

    def length(self, item: RolloutGroup) -> int:
        """Token positions of a prompt with its responses."""
        return len(item.rollouts[0].prompt.ids) + sum(len(rollout.response.ids) for rollout in item.rollouts)

    def collate(self, items: Sequence[RolloutGroup], step: Step) -> ResponseBatch:
        """Make a batch of prompts with their responses."""
        # mean_length = sum_{i,k} |y_ik| / n over the step on all ranks, not over the share of this rank
        lengths = [len(r.response.ids) for i in step.everyone for r in self._groups[i].rollouts]
        batch = collate_rollouts(items, sum(lengths) / len(lengths), self.decoding.max_new_tokens)
        # padding prompts have weight 0; [-num_padding:] would be the whole batch where there are none
        batch.weight[len(batch) - step.num_padding :] = 0.0
        return replace(
            batch, num_global=step.num_global, micro_batches=step.micro_batches, num_padding=step.num_padding
        )

    def rewards(self) -> list[AbstractReward]:
        """Rewards of the run, which may read columns of the rows."""
        return [self.reward, *super().rewards()]

    def check_rewards(self) -> None:
        """Let the rewards check the rows that they score."""
        check_rows(self.reward, self._prompts, self._named_source())
        super().check_rewards()

    def forget_rounds(self) -> None:
        """Forget the round and the statistics of the rewards, and reset the reward to its initial state."""
        self.round, self._groups, self._learned = None, [], 0
        self._moments = torch.zeros(3, dtype=torch.float64)
        self.reward.load_state_dict(copy.deepcopy(self._initial_reward))

    def buffer(self, due: int, epoch: int) -> list[RolloutGroup]:
        """Prompts of the round that is due, with their rollouts and advantages."""
        # all epochs of a round train on the same rewards and advantages
        if self.round is None or self.round.index != due:
            module = self._module()
            self.round = self._collect(due)
            # a spent budget leaves a round without prompts
            self._groups = module.compute_advantages(self.round.groups, self.round.rewards) if self.round.groups else []
        return self._groups

    def sample_round(self, index: int) -> None:
        """Sample the rollouts of a round."""
        module = self._module()
        self._collector().sample(
            index, self._round_prompts(index), module.rollout_generator(self.decoding), self._chunk()
        )

    def labels_before(self, store: PreferenceStore, index: int) -> int:
        """Scores in rounds before ``index``."""
        return RolloutTable(store).count_scores(before=index)

    def state_dict(self) -> State:
        """Id of the ledger, statistics of the rewards and state of the reward, for the checkpoint."""
        own = {"moments": self._moments.tolist(), "reward": self.reward.state_dict(), "learned": self._learned}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: State) -> None:
        """Restore `state_dict`; raises as the base class does."""
        # first, since it raises for another run: moments and reward then stay as they are
        super().load_state_dict(state_dict)
        self._moments = torch.tensor(state_dict["moments"], dtype=torch.float64)
        self.reward.load_state_dict(state_dict["reward"])
        # checkpoints of 0.1 know of no reward that learns from responses
        self._learned = state_dict.get("learned", self._observed)

    def _module(self) -> RolloutModule:
        return module_of(self.trainer, RolloutModule, type(self).__name__)

    def _collect(self, index: int) -> RolloutRound:
        module = self._module()
        module.start_round(index)
        generator, prompts = module.rollout_generator(self.decoding), self._round_prompts(index)
        # a checkpoint may have been written between the learning and the end of a round: it learns once
        learn = self._learn if learns_from_samples(self.reward) and index >= self._learned else None
        result = self._collector(learn).collect(index, prompts, generator, self._chunk())
        scores = result.scores()
        # a round that a resumed run reads again is in the restored moments already
        fresh = index >= self._observed
        # all ranks hold all scores, so that they learn the same
        if fresh:
            self.reward.observe(scores)
        earned = self.reward.earned(scores).double()
        if fresh:
            self._moments = merge_moments(torch.stack([self._moments, moments_of(earned)]))
            module.observe_round(result.groups)
            self._observed = index + 1
        result.rewards = self._normalized(earned, result.rollouts).tolist()
        return result

    def _learn(self, samples: RoundSamples) -> None:
        # rounds are sampled in inference mode or under autocast; the reward learns in neither
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(self._device_type(), enabled=False):
            self.reward.learn(samples)
        self._learned = samples.index + 1

    def _device_type(self) -> str:
        return self.trainer.strategy.root_device.type

    def _normalized(self, rewards: Tensor, rollouts: Sequence[Rollout]) -> Tensor:
        """Rewards of training: normalized by mean and std over all rounds so far, minus the missing-EOS penalty."""
        # (r - mean) / std - penalty * [response was cut off]
        count, mean, deviations = self._moments.tolist()
        # std = sqrt(sum_i (r_i - mean)^2 / (n - 1)); max(): a single reward would divide by 0
        std = (deviations / max(count - 1, 1)) ** 0.5
        if self.shaping.normalize_rewards == "mean_std":
            rewards = rewards - mean
        # equal rewards have std 0 and are not divided
        if self.shaping.normalize_rewards != "none" and std > 0:
            rewards = rewards / std
        cut = torch.tensor([rollout.response.finish_reason == "length" for rollout in rollouts])
        return rewards - self.shaping.missing_eos_penalty * cut.double()

    def _collector(self, learn: Callable[[RoundSamples], None] | None = None) -> RolloutCollector:
        table = None if self._store is None else RolloutTable(self._store)
        return RolloutCollector(
            table, self.reward, self.key, self.responses_per_prompt, progress=self._progress, learn=learn
        )

    def _chunk(self) -> int:
        # the responses of a chunk fill a decoding batch on every rank
        return max(self.decoding.rows // self.responses_per_prompt, 1) * self.trainer.world_size
