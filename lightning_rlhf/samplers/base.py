"""What a pair sampler promises."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from lightning_rlhf.fingerprint import KeepsArguments
from lightning_rlhf.generation.base import AbstractEngine
from lightning_rlhf.randomness import Key
from lightning_rlhf.types import Comparison, Label, Prompt


class AbstractPairSampler(KeepsArguments, ABC):
    """Draws the pairs of responses that a labeler will be asked about.

    Subclass it, implement `sample`, and name your class by its path: ``--data.sampler=my_file.MySampler``. Samplers
    know no labeler and no Lightning. They hold no random state: draw with keys folded from the one you are given, so
    that pairs do not depend on the number of processes or on restarts.

    Attributes:
        passes_per_pair: model forward passes per token position and pair, on average (Table 1 of PILAF).
        annotations_per_pair: responses shown to the annotator per pair.
        needs_engine: False if the sampler never decodes, as with recorded pairs.
        method: name in the cost table; the class name when empty.
        first_law: what y^a is drawn from, for the cost table.
        second_law: what y^b is drawn from, for the cost table.
        label_share: share of a round's comparisons that `worth_labels` chooses, in (0, 1].
    """

    passes_per_pair: float = 2.0
    annotations_per_pair: float = 2.0
    needs_engine: bool = True
    method: str = ""
    first_law: str = "—"
    second_law: str = "—"
    label_share: float = 1.0

    @abstractmethod
    def sample(self, prompts: Sequence[Prompt], engine: AbstractEngine, key: Key) -> list[Comparison]:
        """Draw one comparison per prompt, in order.

        Called once per round for chunks of the round's prompts, under ``torch.inference_mode`` with the policy in eval
        mode; every chunk of a round gets the same ``key``, so fold in ``prompt.index`` before drawing.
        """

    def most_labels(self, count: int) -> int:
        """Most comparisons that `worth_labels` may choose of ``count``: ``label_share`` of them, rounded up."""
        return math.ceil(self.label_share * count - 1e-9)

    def worth_labels(self, comparisons: Sequence[Comparison]) -> list[int]:
        """Positions of a drawn round's comparisons that are labelled, in any order; the default labels all.

        Called on rank zero once a round is drawn, with all of its comparisons in order, and again if the run is
        restarted before their labels are there: the answer must depend on them and on what was observed alone. Where it
        leaves comparisons out, say so by ``label_share``, so that a budget of labels is met: `most_labels`
        of them at most.
        """
        return list(range(len(comparisons)))

    def verdicts(self, comparisons: Sequence[Comparison]) -> list[Label | None]:
        """Labels that came with the draws, None for a comparison that the labeler is asked about; all by default.

        Called on rank zero, with comparisons of one round, in order. For samplers that ask an oracle while they draw.
        """
        return [None] * len(comparisons)

    def observe(self, comparisons: Sequence[Comparison]) -> None:
        """Learn from the finished round.

        Called once per round, in order, with all comparisons of the round, on every rank alike (also when the round is
        read back from the ledger after a restart). The default learns nothing.
        """
        del comparisons

    def state_dict(self) -> dict[str, Any]:
        """What `observe` has learnt, as plain data for the checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        del state
