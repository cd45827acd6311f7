"""The pairs of an offline round, made from their rows when they are asked for."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lightning_rlhf.batching.loader import AbstractEpochItems
from lightning_rlhf.labelers.recorded import RecordedLabeler
from lightning_rlhf.prompts.portions import has_equal_responses
from lightning_rlhf.prompts.table import PromptTable
from lightning_rlhf.randomness import Key, Stream
from lightning_rlhf.runtime.lazy import AbstractLazySequence
from lightning_rlhf.samplers.draws import coin
from lightning_rlhf.samplers.offline import recorded_comparison
from lightning_rlhf.types import Comparison, Preference, Prompt, free_tie


class RecordedPairs(AbstractEpochItems[Preference]):
    """The preferences that `OfflineSampler` and `RecordedLabeler` make of the rows of a round, bit for bit.

    Nothing is kept but the numbers of the rows.

    Args:
        prompts: all rows, each with a recorded pair.
        rows: number of the row of each pair; in a round that is larger than the data, one pass over all rows after
            another; int32, [pairs].
        key: key of the run.
        index: number of the round.
    """

    def __init__(self, prompts: Sequence[Prompt], rows: NDArray[np.int32], key: Key, index: int) -> None:
        self.prompts, self.rows, self.round = prompts, rows, index
        self._sampling, self._labeling = key.fold(Stream.SAMPLING, index), key.fold(Stream.LABELING, index)
        self._labeler = RecordedLabeler()

    def __len__(self) -> int:
        return len(self.rows)

    def make(self, place: int) -> Preference:
        """Make the preference of a row."""
        prompt = self.prompts[int(self.rows[place])]
        # the second pair of a prompt has another key, as in a round that is sampled in chunks
        key = self._sampling.fold(place // len(self.prompts))
        comparison = recorded_comparison(prompt, chosen_first=coin(prompt, key) < 0.5)
        if comparison.has_equal_responses:
            return Preference(comparison, free_tie(), self.round)
        (label,) = self._labeler.label([comparison], self._labeling)
        return Preference(comparison, label, self.round)

    @property
    def comparisons(self) -> Sequence[Comparison]:
        """The pairs without their labels."""
        return _Comparisons(self)

    @cached_property
    def ties(self) -> int:
        """Pairs of equal responses."""
        if isinstance(self.prompts, PromptTable) and not self.prompts.facts["ties"]:
            return 0
        return sum(has_equal_responses(self.prompts[int(row)]) for row in self.rows)

    @property
    def lengths(self) -> Sequence[int]:
        """Token positions of each pair, its prompt counted once."""
        if isinstance(self.prompts, PromptTable):
            tokens = self.prompts.lengths.sum(axis=1, dtype=np.int64)
        else:
            tokens = np.array([_tokens(prompt) for prompt in self.prompts], np.int64)
        # 8 bytes a pair, where a list of numbers takes 40
        return array("q", tokens[self.rows].tobytes())


class _Comparisons(AbstractLazySequence[Comparison]):
    """The comparisons of `RecordedPairs`."""

    def __init__(self, pairs: RecordedPairs) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def make(self, place: int) -> Comparison:
        """The pair of a row."""
        return self.pairs[place].comparison


def sampled(preferences: Sequence[Preference]) -> Sequence[Preference]:
    """Preferences that a sampler of responses or a labeler may have made: none where they are rows of the data."""
    return () if isinstance(preferences, RecordedPairs) else preferences


def all_have_pairs(prompts: Sequence[Prompt]) -> bool:
    """Whether each row has a recorded pair, or a single response."""
    if isinstance(prompts, PromptTable):
        return prompts.facts["pairs"] == len(prompts)
    return all(prompt.pair is not None for prompt in prompts)


def _tokens(prompt: Prompt) -> int:
    return len(prompt.ids) + sum(len(response.ids) for response in prompt.pair or ())
