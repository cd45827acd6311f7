"""The DataModule of supervised fine-tuning: prompts with completions -> batches, the same rows in every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from lightning_rlhf.batching.batches import ResponseBatch
from lightning_rlhf.batching.collate import collate_completions
from lightning_rlhf.batching.steps import Step
from lightning_rlhf.datamodules.base import AbstractStepDataModule, at_least_one
from lightning_rlhf.generation.base import Decoding
from lightning_rlhf.prompts import AbstractPromptSource
from lightning_rlhf.types import Prompt


class CompletionDataModule(AbstractStepDataModule):
    """Serves recorded completions to imitate, packed without filling.

    Args:
        prompts: where training rows come from; each with a completion, as `DatasetCompletions` reads them.
        heldout: rows for validation; no validation when not given.
        rows_per_batch: rows per optimizer step over all processes, >= 1; times ``trainer.accumulate_grad_batches``.
        tokens_per_batch: most token positions of one forward and backward pass per process, >= 1; ``auto`` is 1024 on a
            CPU and 8192 elsewhere; null makes one pass.
        length_window: group rows of about one length within windows of this many batches, >= 1.
        max_completion_tokens: longest completion, EOS included; longer ones lose their end.
        max_prompt_tokens: longest prompt; what the context window leaves beside the completion when not given.
        on_long_prompt: ``error`` stops, ``drop`` leaves the row out, ``truncate`` keeps the end of the prompt.
        system_prompt: system turn put before conversational prompts.
        seed: decides the order of the rows.
    """

    ITEMS: ClassVar[str] = "rows_per_batch"
    UNIT: ClassVar[str] = "row"
    RESPONSE_LIMIT: ClassVar[str] = "max_completion_tokens"

    def __init__(
        self,
        prompts: AbstractPromptSource,
        heldout: AbstractPromptSource | None = None,
        rows_per_batch: int = 16,
        tokens_per_batch: int | Literal["auto"] | None = "auto",
        length_window: int = 1,
        max_completion_tokens: int = 512,
        max_prompt_tokens: int | None = None,
        on_long_prompt: Literal["error", "drop", "truncate"] = "error",
        system_prompt: str | None = None,
        seed: int = 0,
    ) -> None:
        at_least_one(max_completion_tokens=max_completion_tokens)
        super().__init__(
            prompts,
            heldout,
            Decoding(max_new_tokens=max_completion_tokens),
            rows_per_batch,
            tokens_per_batch,
            length_window,
            max_prompt_tokens,
            on_long_prompt,
            system_prompt,
            seed,
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

    def length(self, item: Prompt) -> int:
        """Token positions of a row."""
        return len(item.ids) + completion_length(item)

    def collate(self, items: Sequence[Prompt], step: Step) -> ResponseBatch:
        """Make a batch of rows."""
        lengths = [completion_length(self._prompts[i]) for i in step.everyone]
        batch = collate_completions(items, sum(lengths) / len(lengths), self.decoding.max_new_tokens)
        batch.weight[len(batch) - step.num_idle :] = 0.0
        return replace(batch, num_global=step.num_global, passes=step.passes, num_idle=step.num_idle)


def completion_length(prompt: Prompt) -> int:
    """Tokens of the completion of a row."""
    assert prompt.completion is not None
    return len(prompt.completion.ids)
