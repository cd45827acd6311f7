"""The difference model: it reads two responses together and says by how much one is better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar, cast, get_args

from torch import Tensor, nn

from lightning_rlhf.batching.batches import PreferenceBatch
from lightning_rlhf.estimators.difference import WeightRule, difference_weight
from lightning_rlhf.evaluation.metrics import MeanWithError
from lightning_rlhf.logprobs.packing import Group
from lightning_rlhf.models.scorer import Scorer
from lightning_rlhf.modules.base import ItemLosses
from lightning_rlhf.modules.reward import RewardModule
from lightning_rlhf.types import State


class DifferenceModule(RewardModule):
    """Difference model of Reward Difference Optimization (arXiv 2408.09385), antisymmetric by construction.

    A head on the last token scores the text "prompt, first response, second response" as f(x, a, b), and
    D(a, b) = (f(x, a, b) - f(x, b, a)) / 2. The loss of a pair with D = D(chosen, rejected) and the label p is
    -p log sigma(D) - (1 - p) log sigma(-D). In contrast to a reward model, D may prefer a to b, b to c and c to a. The
    abstract of the paper says that the model reads both responses; this loss and form are ours.

    Everything else is as in `RewardModule`: arguments, sampling in rounds, ensembles (D is the mean over members) and
    metrics, which here are about D. ``model.loss.center_coefficient`` weighs (f(x, a, b) + f(x, b, a))^2 / 4, the
    preference for a place that D leaves out. ``lightning_rlhf.labelers.DifferenceLabeler`` reads the saved folder. It
    holds the mean coefficients of the last validation, with which weights have mean 1. A prompt and the longer response
    take at most half of the model's context window. `RewardModelReward` refuses the folder.

    Logged on training steps: ``train/rewards/margins``, the mean of D, and ``/accuracies``.
    """

    READING: ClassVar[str] = "pair"

    mean_coefficients: dict[str, float] | None = None
    """Mean coefficient by rule on the held-out pairs of the last validation; None before the first."""

    def configure_model(self) -> None:
        """Load the backbone, once, and make the metrics of the coefficients."""
        super().configure_model()
        if not hasattr(self, "coefficients"):
            # one per rule of `difference_weight`; in a ModuleList, so that they move to the device with the module
            self.coefficients = nn.ModuleList(MeanWithError() for _ in get_args(WeightRule))

    @cached_property
    def context_window(self) -> int | None:
        """Longest prompt and response in tokens, so that the prompt and two responses fit into the model's window."""
        # W - |closing|
        window = super().context_window
        if window is None:
            return None
        # |x| + |a| + |b| + between <= 2 (|x| + max(|a|, |b|)) + between <= W; between: EOS, closing, opening
        return (window - 1 - len(self.turns.closing) - len(self.turns.opening)) // 2

    def item_losses(self, batch: PreferenceBatch) -> ItemLosses:
        """Loss of each pair; the two entries of the metrics named rewards are f(x, a, b) / 2 and f(x, b, a) / 2."""
        out = super().item_losses(batch)
        # both orders hold both responses
        responses = sum(map(len, batch.chosen)) + sum(map(len, batch.rejected))
        return replace(out, num_tokens=out.num_tokens + responses)

    def sums_to_log(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """D, and its agreement with the label."""
        sums = super().sums_to_log(metrics)
        return {name: sums[name] for name in ("rewards/margins", "rewards/accuracies")}

    def update_metrics(self, members: Tensor, labels: Tensor) -> None:
        """Take held-out pairs into the metrics, and their coefficients into the means."""
        super().update_metrics(members, labels)
        difference = (members[:, 0] - members[:, 1]).mean(1)
        for rule, metric in self._by_rule():
            metric.update(difference_weight(difference, labels, rule))

    def held_out_metrics(self) -> dict[str, float]:
        """Metrics of D; f in one order says nothing about a response."""
        metrics = super().held_out_metrics()
        return {name: value for name, value in metrics.items() if not name.endswith(("/chosen", "/rejected"))}

    def on_validation_epoch_end(self) -> None:
        """Log the metrics, and keep the mean coefficients."""
        super().on_validation_epoch_end()
        # moments of f in one order say nothing about D
        self.scorer.means = self.scorer.stds = None
        means: dict[str, float] = {rule: metric.compute()[0].item() for rule, metric in self._by_rule()}
        self.log("val/mean_coefficient", means["clip"], sync_dist=True)  # equal on all ranks already
        self.mean_coefficients = means
        for _, metric in self._by_rule():
            metric.reset()

    def on_save_checkpoint(self, checkpoint: State) -> None:
        """Keep trained weights, and the mean coefficients of the last validation."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["mean_coefficients"] = self.mean_coefficients

    def on_load_checkpoint(self, checkpoint: State) -> None:
        """Restore the mean coefficients; checkpoints of 0.1 have none."""
        super().on_load_checkpoint(checkpoint)
        self.mean_coefficients = checkpoint.get("mean_coefficients")

    def save_pretrained(self, folder: Path) -> None:
        """Write a folder that `DifferenceLabeler` opens; every rank calls, rank zero writes."""
        for model in self.scorer.models:
            # those of a checkpoint that this run began with are of another model
            model.config.mean_coefficients = self.mean_coefficients
        super().save_pretrained(folder)

    def _by_rule(self) -> list[tuple[WeightRule, MeanWithError]]:
        return [(rule, cast(MeanWithError, m)) for rule, m in zip(get_args(WeightRule), self.coefficients, strict=True)]

    def _scores(
        self, groups: Sequence[Group], tokens_per_batch: int | None = None, member: int | None = None
    ) -> Tensor:
        """f(x, a, b) / 2 and f(x, b, a) / 2 of each pair by every member, [2 * pairs, members]: they differ by D."""
        scorer: Scorer = self.scorer
        eos = int(self.tokenizer.eos_token_id)
        both: list[Group] = []
        for prompt, responses in groups:
            a, b = (tuple(response) for response in responses)
            both.append((prompt, (self.turns.joined(prompt, a, b, eos), self.turns.joined(prompt, b, a, eos))))
        scores = scorer.scores(both, layout=self.options.layout, tokens_per_batch=tokens_per_batch, member=member)
        return scores / 2
