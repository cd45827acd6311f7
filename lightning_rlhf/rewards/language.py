"""A frozen similarity of instruction and response as a reward, for pretraining on many instructions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_rlhf.rewards.base import AbstractReward, RewardOutput
from lightning_rlhf.rewards.embedders import AbstractEmbedder
from lightning_rlhf.runtime.plugins import check_plugin
from lightning_rlhf.types import Prompt, Response


class LanguageAlignmentReward(AbstractReward):
    """Cosine of the embeddings of instruction and response, in [-1, 1]; the embeddings are frozen and noisy.

    After the language reward of LAMP (Adeniji et al. 2023, arXiv 2308.12270), with texts in place of videos. It is a
    reward for pretraining: alone it is easily hacked, by a response that repeats the instruction.

    Args:
        embedder: embeds the texts.
        instruction_column: column of the rows with the instruction; default: the last turn of the user, or the plain
            prompt.
        baseline: a text whose embedding is subtracted from that of the response, so that the change counts: the state
            at the start; default: none.
    """

    def __init__(
        self, embedder: AbstractEmbedder, instruction_column: str | None = None, baseline: str | None = None
    ) -> None:
        check_plugin("LanguageAlignmentReward.embedder", embedder, AbstractEmbedder)
        self.embedder, self.instruction_column, self.baseline = embedder, instruction_column, baseline
        self._instructions: dict[str, Tensor] = {}
        self._baseline: Tensor | None = None

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Check that each row has an instruction."""
        for prompt in prompts:
            self.instruction(prompt)

    def columns_read(self, names: Sequence[str]) -> set[str]:
        """The column with the instruction."""
        return {self.instruction_column} & set(names) if self.instruction_column else set()

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        """Score ``responses[i]`` by the instruction of ``prompts[i]``; float32, [B]."""
        wanted = [self.instruction(prompt) for prompt in prompts]
        new = [text for text in dict.fromkeys(wanted) if text not in self._instructions]
        if new:
            self._instructions |= dict(zip(new, self.embedder.embed(new), strict=True))
        found = self.embedder.embed([response.text for response in responses])
        if self.baseline is not None:
            # frozen, and so computed once
            if self._baseline is None:
                self._baseline = self.embedder.embed([self.baseline])
            found = found - self._baseline
        # cos(phi(y) - phi(baseline), e(l)); 0 where the response changes nothing
        return RewardOutput(F.cosine_similarity(found, torch.stack([self._instructions[text] for text in wanted])))

    def instruction(self, prompt: Prompt) -> str:
        """The instruction of a prompt.

        Raises:
            ValueError: if it has no such column, or no text in it.
        """
        if self.instruction_column is not None:
            value = prompt.columns.get(self.instruction_column)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(
                    f"prompt {prompt.index}: column {self.instruction_column!r} holds {value!r:.40}; "
                    f"LanguageAlignmentReward needs a text there: fix the row, or set instruction_column"
                )
            return value
        return prompt.text if prompt.messages is None else str(prompt.messages[-1].get("content") or "")
