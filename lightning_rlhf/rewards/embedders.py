"""Frozen embeddings of texts, for rewards that compare texts or look for new ones."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.logprobs.packing import Group
from lightning_rlhf.logprobs.scores import pooled_states
from lightning_rlhf.models.load import context_window, load_policy, load_tokenizer
from lightning_rlhf.models.options import DEFAULT_OPTIONS, ModelOptions
from lightning_rlhf.randomness import Key
from lightning_rlhf.runtime.fingerprint import KeepsArguments


class AbstractEmbedder(KeepsArguments, ABC):
    """Maps texts to vectors; it is never trained."""

    @abstractmethod
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Vector of each text, [texts, width], float32 on the CPU; the same whatever other texts there are."""


class HashEmbedder(AbstractEmbedder):
    """Mean of a fixed random unit vector per word, in lower case and without punctuation; a text without words is 0.

    It needs no model. Similarity is the overlap of words: synonyms are strangers.

    Args:
        width: dimensions, >= 1; two different words have a cosine of std 1/sqrt(width).
    """

    def __init__(self, width: int = 256) -> None:
        if width < 1:
            raise ValueError(f"HashEmbedder.width must be at least 1; got {width}")
        self.width = width

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Mean vector of the words of each text."""
        rows = []
        for text in texts:
            words = ["".join(filter(str.isalnum, word)) for word in text.lower().split()]
            vectors = [word_vector(word, self.width) for word in words if word]
            rows.append(torch.stack(vectors).mean(0) if vectors else torch.zeros(self.width))
        return torch.stack(rows)


@lru_cache(maxsize=65536)
def word_vector(word: str, width: int) -> Tensor:
    """Random unit vector of a word, the same in every process; [width]."""
    digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
    generator = Key((int.from_bytes(digest, "little") >> 1,)).generator()
    vector = torch.randn(width, generator=generator)
    unit: Tensor = vector / vector.norm()
    return unit


class ModelEmbedder(AbstractEmbedder):
    """Mean over tokens of the last hidden state of a language model, less the mean over some texts.

    Hidden states of language models have a large common part, which makes all texts alike; the mean over ``centers``
    removes it.

    Args:
        model: a causal LM, as ``model.policy`` names one.
        centers: texts whose mean embedding is the origin; default: a few sentences about everyday things.
        options: how the checkpoint is loaded; ``scoring_batch_tokens`` limits the tokens of a pass.
        device: where to compute: ``cpu``, ``cuda``; default: a GPU if there is one.
    """

    def __init__(
        self,
        model: str,
        centers: Sequence[str] | None = None,
        options: ModelOptions = DEFAULT_OPTIONS,
        device: str | None = None,
    ) -> None:
        self.model, self.options = model, options
        self.centers = tuple(CENTERS if centers is None else centers)
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._parts: tuple[PreTrainedModel, PreTrainedTokenizerBase, Tensor] | None = None

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Mean hidden state of each text less that of the centers."""
        trunk, tokenizer, center = self._load()
        return self._states(trunk, tokenizer, texts) - center

    def _load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Tensor]:
        # at first use: a run that reads its rewards from the ledger loads nothing
        if self._parts is None:
            trunk = cast(PreTrainedModel, load_policy(self.model, **self.options.load_arguments()).eval().base_model)
            nn.Module.to(trunk.requires_grad_(False), self.device)
            tokenizer = load_tokenizer(self.model, trust_remote_code=self.options.trust_remote_code)
            states = self._states(trunk, tokenizer, self.centers)
            self._parts = trunk, tokenizer, states.mean(0) if self.centers else torch.zeros(1)
        return self._parts

    def _states(self, trunk: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
        window, end = context_window(trunk.config), tokenizer.eos_token_id
        groups: list[Group] = []
        for text in texts:
            ids = tokenizer(text, verbose=False)["input_ids"][: window and window - 1]
            # a token in front, since neither part of a group may be empty
            groups.append(((end,), (ids or [end],)))
        with torch.no_grad():
            states = pooled_states(trunk, groups, "mean", tokens_per_batch=self.options.scoring_batch_tokens)
        return states.float().cpu()


CENTERS = (
    "The train to the coast leaves at nine in the morning.",
    "Write a short poem about winter.",
    "I do not know the answer to that.",
    "Mix the flour with two eggs and a cup of milk.",
    "def add(a, b): return a + b",
    "How many people live in the capital of Norway?",
    "She closed the door and went up the stairs.",
    "Thank you for your letter of last week.",
)
"""Texts of different kinds, whose mean embedding is the common part of all texts."""
