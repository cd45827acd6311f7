"""Labels that came with the data: offline preference rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from lightning_rlhf.labelers.base import AbstractLabeler
from lightning_rlhf.randomness import Key
from lightning_rlhf.types import Comparison, Label


class RecordedLabeler(AbstractLabeler):
    """Repeats the label of the data row about its own pair of completions; asks nobody and costs nothing.

    For offline runs, together with the offline sampler. The label is the recorded P(chosen preferred), 1 in an ordinary
    preference row, turned round where the sampler put the recorded rejected completion first. Of a single response it
    is the recorded P(desirable).
    """

    judges: ClassVar[Literal["pairs", "singles", "both"]] = "both"

    def label(self, comparisons: Sequence[Comparison], key: Key) -> list[Label]:
        """Look up the recorded probability of each comparison; nothing is random."""
        del key
        return [Label(probability=recorded_probability(comparison), cost=0.0) for comparison in comparisons]


def recorded_probability(comparison: Comparison) -> float:
    """P(a preferred) by the data row of the prompt, in [0, 1].

    Raises:
        ValueError: if the row recorded no pair, or if the comparison does not say which of its responses is the
            recorded chosen one, as when its responses were newly sampled.
    """
    recorded = comparison.prompt.recorded
    # rows with a prompt alone hold no label
    if recorded is None:
        raise ValueError(
            f"prompt {comparison.prompt.index} has no recorded pair, so RecordedLabeler cannot label it; "
            f"use rows with 'chosen' and 'rejected', or a labeler that judges, such as RewardLabeler"
        )
    # newly sampled responses are not those that the row is about
    first = comparison.meta.get("recorded_first")
    # without the order, chosen and rejected may be swapped
    if not isinstance(first, bool):
        raise ValueError(
            f"RecordedLabeler expected meta['recorded_first'] = True or False in the comparison of prompt "
            f"{comparison.prompt.index}; got {first!r} (branch {comparison.branch!r}). A recorded label is about the "
            f"recorded responses only: use the offline sampler with it, or another labeler with this sampler"
        )
    # P(a preferred) = 1 - P(chosen preferred) where a is the rejected response
    return recorded.probability if first else 1.0 - recorded.probability
