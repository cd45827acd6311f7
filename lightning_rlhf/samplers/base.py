"""The interface of pair samplers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeAlias

from lightning_rlhf.generation.base import AbstractEngine
from lightning_rlhf.randomness import Key
from lightning_rlhf.renamed import adopt_old_selection
from lightning_rlhf.runtime.fingerprint import KeepsArguments
from lightning_rlhf.types import Comparison, Label, Prompt


SamplerState: TypeAlias = dict[str, Any]
"""State of a sampler as plain data for the checkpoint: numbers, strings, lists, dictionaries and tensors."""


class AbstractPairSampler(KeepsArguments, ABC):
    """Generates the pairs of responses that a labeler compares.

    Subclass it, implement `sample`, and name your class by its path: ``--data.sampler=my_file.MySampler``. A sampler
    depends neither on the labeler nor on Lightning. It has no random state: use keys folded from the ``key`` argument,
    so that pairs do not depend on the number of processes or on restarts.

    Attributes:
        passes_per_pair: model forward passes per token position and pair, on average (Table 1 of PILAF).
        annotations_per_pair: responses shown to the annotator per pair.
        needs_engine: False if the sampler never decodes, as with recorded pairs.
        makes_singles: True if the comparisons hold one response alone, which is judged by itself.
        method: name in the cost table. Default: the class name.
        first_distribution: distribution of y^a, for the cost table.
        second_distribution: distribution of y^b, for the cost table.
    """

    passes_per_pair: float = 2.0
    annotations_per_pair: float = 2.0
    needs_engine: bool = True
    makes_singles: bool = False
    method: str = ""
    first_distribution: str = "—"
    second_distribution: str = "—"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let samplers written for version 0.1 select with ``worth_labels``."""
        super().__init_subclass__(**kwargs)
        adopt_old_selection(cls)

    @abstractmethod
    def sample(self, prompts: Sequence[Prompt], engine: AbstractEngine, key: Key) -> list[Comparison]:
        """Generate one comparison per prompt, in order.

        Called for chunks of the prompts of a round, under ``torch.inference_mode`` with the policy in eval mode. Every
        chunk of a round gets the same ``key``: fold in ``prompt.index`` before use.

        Args:
            prompts: prompts of the chunk.
            engine: generates responses and their log-probabilities.
            key: source of random numbers of the round.
        """

    def verdicts(self, comparisons: Sequence[Comparison]) -> list[Label | None]:
        """Labels that came with the responses; None for a comparison that the labeler is asked about. Default: None.

        Called on rank zero, with comparisons of one round, in order. For samplers that ask an oracle while they sample.
        """
        return [None] * len(comparisons)

    def observe(self, comparisons: Sequence[Comparison]) -> None:
        """Update the state of the sampler with a finished round. Default: no state.

        Called once per round, in order, with all comparisons of the round, on every rank alike, also when the round is
        read back from the ledger after a restart.
        """
        del comparisons

    def state_dict(self) -> SamplerState:
        """State that `observe` has accumulated, for the checkpoint."""
        return {}

    def load_state_dict(self, state: SamplerState) -> None:
        """Restore the state that `state_dict` returned."""
        del state


class AbstractSelectiveSampler(AbstractPairSampler):
    """A sampler that leaves some comparisons of a round without a label.

    Attributes:
        label_fraction: fraction of the comparisons of a round that `select_for_labeling` selects, in (0, 1]; label
            budgets count on it.
    """

    label_fraction: float = 1.0

    @abstractmethod
    def select_for_labeling(self, comparisons: Sequence[Comparison]) -> list[int]:
        """Select the comparisons of a round that are labeled: at most `most_labels` positions, in any order.

        Called on rank zero when the round is sampled, with all of its comparisons in order, and again if the run
        restarts before they are labeled. The result must therefore depend on the comparisons and on earlier `observe`
        calls only.
        """

    def most_labels(self, count: int) -> int:
        """Largest number of comparisons that may be selected of ``count``: ``label_fraction``, rounded up."""
        # minus an epsilon: 0.07 * 100 is slightly above 7 in floating point, and must not become 8
        return math.ceil(self.label_fraction * count - 1e-9)

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        # samplers of version 0.1 got the methods from `adopt_old_selection`, but have another base class
        adopted = cls is AbstractSelectiveSampler and hasattr(other, "select_for_labeling")
        return True if adopted else super().__subclasshook__(other)
