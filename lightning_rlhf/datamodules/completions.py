"""The DataModule of supervised fine-tuning: prompts with completions -> batches, the same rows in every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from lightning_rlhf.batching.batches import ResponseBatch
from lightning_rlhf.batching.collate import collate_completions
from lightning_rlhf.batching.steps import Step
from lightning_rlhf.datamodules.base import AbstractStepDataModule
from lightning_rlhf.datamodules.options import (
    DEFAULT_BATCHING,
    DEFAULT_PROMPTS,
    BatchOptions,
    PromptOptions,
    at_least_one,
)
from lightning_rlhf.generation.base import Decoding
from lightning_rlhf.prompts import AbstractPromptSource, DatasetCompletions, DatasetPrompts
from lightning_rlhf.renamed import accepts_old_names
from lightning_rlhf.types import Prompt


@accepts_old_names("data")
class CompletionDataModule(AbstractStepDataModule[Prompt]):
    """Serves recorded completions to imitate, packed without padding.

    Args:
        prompts: where training rows come from; each with a completion, as `DatasetCompletions` reads them.
        heldout: rows for validation; default: no validation.
        rows_per_batch: rows per optimizer step over all processes, >= 1; times ``trainer.accumulate_grad_batches``.
        batching: how an optimizer step is split into micro-batches.
        max_completion_tokens: longest completion, EOS included; longer ones lose their end.
        prompt_options: how prompts become tokens.
        seed: decides the order of the rows.
    """

    ITEMS: ClassVar[str] = "rows_per_batch"
    UNIT: ClassVar[str] = "row"
    RESPONSE_LIMIT: ClassVar[str] = "max_completion_tokens"
    ROW_SOURCE: ClassVar[type[DatasetPrompts] | type[DatasetCompletions]] = DatasetCompletions

    def __init__(
        self,
        prompts: AbstractPromptSource,
        heldout: AbstractPromptSource | None = None,
        rows_per_batch: int = 16,
        max_completion_tokens: int = 512,
        batching: BatchOptions = DEFAULT_BATCHING,
        prompt_options: PromptOptions = DEFAULT_PROMPTS,
        seed: int = 0,
    ) -> None:
        at_least_one(max_completion_tokens=max_completion_tokens)
        super().__init__(
            prompts=prompts,
            heldout=heldout,
            # nothing is sampled: the base class reads the token limit of responses from the decoding options
            decoding=Decoding(max_new_tokens=max_completion_tokens),
            items_per_batch=rows_per_batch,
            batching=batching,
            prompt_options=prompt_options,
            seed=seed,
        )

    def setup(self, stage: str) -> None:
        """Read the rows, and check that each has a completion."""
        super().setup(stage)
        for what, rows in (("training", self._prompts), ("held-out", self._heldout)):
            for prompt in rows:
                if prompt.completion is None:
                    raise ValueError(
                        f"{what} row {prompt.index} ({prompt.text[-80:]!r}) has no completion to imitate; read "
                        f"the data with DatasetCompletions"
                    )

    def items(self, epoch: int) -> Sequence[Prompt]:
        """All rows."""
        del epoch
        return self._prompts

    def _items_per_epoch(self) -> int:
        return len(self._prompts)

    def length(self, item: Prompt) -> int:
        """Token positions of a row."""
        return len(item.ids) + completion_length(item)

    def collate(self, items: Sequence[Prompt], step: Step) -> ResponseBatch:
        """Make a batch of rows."""
        # mean_length = sum_i |y_i| / n over the step on all ranks, not over the share of this rank
        lengths = [completion_length(self._prompts[i]) for i in step.everyone]
        batch = collate_completions(items, sum(lengths) / len(lengths), self.decoding.max_new_tokens)
        # padding rows have weight 0; [-num_padding:] would be the whole batch where there are none
        batch.weight[len(batch) - step.num_padding :] = 0.0
        return replace(
            batch, num_global=step.num_global, micro_batches=step.micro_batches, num_padding=step.num_padding
        )


def completion_length(prompt: Prompt) -> int:
    """Tokens of the completion of a row."""
    assert prompt.completion is not None
    return len(prompt.completion.ids)
