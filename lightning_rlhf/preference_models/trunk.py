"""Features of responses: sums of hidden states under a frozen model, by default the policy as it was before training.

The trunk never learns, so that features are a function of prompt and response alone. Rows are computed in chunks of 64
in the order that they are given in, and cached by chunk: the features of a list of rows are then the same bits whether
they were in the cache or not, as a resumed run needs. A cache by row would mix results of other batches, which differ
by rounding.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.logprobs.compute import embedding
from lightning_rlhf.logprobs.eval_mode import evaluating
from lightning_rlhf.models.load import load_policy
from lightning_rlhf.models.options import ModelOptions
from lightning_rlhf.models.rotary import rotary_window
from lightning_rlhf.types import Prompt, Response


CHUNK = 64
"""Rows per chunk."""

Row = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a prompt and of a response, without EOS."""


@dataclass(frozen=True)
class TrunkFeatures:
    """Features of rows; float32 on the CPU.

    Args:
        prompt: mean over prompt tokens of the input embedding; [rows, width].
        tokens: sum over response tokens of the input embedding; [rows, width].
        middle: sum over response tokens of the hidden state behind half of the layers; [rows, width].
        hidden: sum over response tokens of the last hidden state; [rows, width].
        lengths: response tokens; [rows].
    """

    prompt: Tensor
    tokens: Tensor
    middle: Tensor
    hidden: Tensor
    lengths: Tensor


def content(response: Response) -> tuple[int, ...]:
    """Token ids of a response without its EOS, whose features say no more than that the response has ended."""
    return response.ids[:-1] if response.finish_reason == "eos" else response.ids


class FrozenTrunk:
    """A causal LM without its head, in eval mode and without gradients.

    Args:
        checkpoint: the checkpoint, as ``model.policy`` names it.
        options: how it is loaded; `ModelOptions.scoring_batch_tokens` limits the tokens of a forward pass.
        device: where it runs.
        tokenizer: the tokenizer of a checkpoint with another vocabulary than the policy's: it encodes prompts and
            responses from their texts. Default: their token ids are used.
        cached_rows: rows whose features are kept, >= 0; the chunks that were used last.
    """

    def __init__(
        self,
        checkpoint: str,
        options: ModelOptions,
        device: torch.device,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        cached_rows: int = 16384,
    ) -> None:
        model = cast(PreTrainedModel, load_policy(checkpoint, **options.load_arguments()))
        self._model = model.to(device).eval().requires_grad_(False)  # type: ignore[arg-type]
        # the decoder below the head, which computes no logits
        self._trunk = cast(PreTrainedModel, self._model.base_model)
        self._modules = list(self._model.modules())
        self._tokenizer = tokenizer
        self._most_tokens = options.scoring_batch_tokens
        self._most_chunks = cached_rows // CHUNK
        self._cache: OrderedDict[tuple[Row, ...], TrunkFeatures] = OrderedDict()

    @property
    def width(self) -> int:
        """Dimensions of an embedding."""
        return int(embedding(self._model).shape[1])

    def features(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> TrunkFeatures:
        """Features of prompts with responses, equal bit by bit for equal arguments.

        Args:
            prompts: the prompt of each response.
            responses: the responses; EOS is left out.
        """
        rows = [self._row(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        chunks = [self._chunk(tuple(rows[i : i + CHUNK])) for i in range(0, len(rows), CHUNK)]
        return self._joined(chunks)

    def _row(self, prompt: Prompt, response: Response) -> Row:
        if self._tokenizer is None:
            return prompt.ids, content(response)
        encode = self._tokenizer
        # special tokens of the beginning belong to the prompt alone
        return tuple(encode(prompt.text).input_ids), tuple(encode(response.text, add_special_tokens=False).input_ids)

    def _chunk(self, rows: tuple[Row, ...]) -> TrunkFeatures:
        found = self._cache.pop(rows, None)
        if found is None:
            # the same numbers within a training step under autocast and outside of it
            with evaluating(self._modules), torch.autocast(self._model.device.type, enabled=False):
                found = self._joined([self._compute(batch) for batch in self._batches(rows)])
        # at the end of the order: used last
        self._cache[rows] = found
        while len(self._cache) > self._most_chunks:
            self._cache.popitem(last=False)
        return found

    def _batches(self, rows: Sequence[Row]) -> Iterator[list[Row]]:
        """Split rows, in order, so that each padded batch has few enough tokens."""
        batch: list[Row] = []
        longest = 0
        for row in rows:
            longest = max(longest, len(row[0]) + len(row[1]))
            if batch and longest * (len(batch) + 1) > self._most_tokens:
                yield batch
                batch, longest = [], len(row[0]) + len(row[1])
            batch.append(row)
        yield batch

    def _compute(self, rows: Sequence[Row]) -> TrunkFeatures:
        prompt_lengths = torch.tensor([len(prompt) for prompt, _ in rows])
        lengths = torch.tensor([len(response) for _, response in rows])
        # at least one position, where neither prompt nor response has a token
        ids = torch.zeros(len(rows), max(1, int((prompt_lengths + lengths).max())), dtype=torch.long)
        for number, (prompt, response) in enumerate(rows):
            ids[number, : len(prompt) + len(response)] = torch.tensor([*prompt, *response], dtype=torch.long)
        places = torch.arange(ids.shape[1])[None]
        # lengths and not pad ids: padding and EOS may be one token; [rows, positions]
        in_prompt = places < prompt_lengths[:, None]
        in_response = ~in_prompt & (places < (prompt_lengths + lengths)[:, None])
        inputs = {"input_ids": ids.to(self._model.device)}
        if rotary_window(self._model) is not None:
            # each row's own length; causal attention never sees the padding on its right
            position_ids = torch.where(in_prompt | in_response, places, 0)
            inputs["position_ids"] = position_ids.to(self._model.device)
        states = self._trunk(**inputs, use_cache=False, output_hidden_states=True).hidden_states
        # the first entry is not always the embedding: Gemma scales it, GPT-2 adds the position
        embedded = self._model.get_input_embeddings()(inputs["input_ids"])

        def summed(values: Tensor, mask: Tensor) -> Tensor:
            # [rows, positions] x [rows, positions, width] -> [rows, width]
            values = values.float()
            return torch.einsum("rp,rpw->rw", mask.to(values), values).cpu()

        return TrunkFeatures(
            prompt=summed(embedded, in_prompt) / prompt_lengths.clamp_min(1)[:, None],
            tokens=summed(embedded, in_response),
            middle=summed(states[(len(states) - 1) // 2], in_response),
            hidden=summed(states[-1], in_response),
            lengths=lengths.float(),
        )

    def _joined(self, parts: Sequence[TrunkFeatures]) -> TrunkFeatures:
        if not parts:
            embedded, state = (
                torch.zeros(0, self.width),
                torch.zeros(0, self._model.config.get_text_config().hidden_size),
            )
            return TrunkFeatures(embedded, embedded, state, state, torch.zeros(0))
        names = [field.name for field in fields(TrunkFeatures)]
        return TrunkFeatures(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
