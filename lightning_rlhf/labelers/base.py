"""What a labeler promises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from lightning_rlhf.randomness import Key
from lightning_rlhf.types import Comparison, Label


class AbstractLabeler(ABC):
    """Says which of two responses is better, and how sure it is.

    Subclass it, implement `label`, and name your class by its path: ``--data.labeler=my_file.MyLabeler``.
    """

    @abstractmethod
    def label(self, comparisons: Sequence[Comparison], key: Key) -> list[Label]:
        """Label each comparison, in order.

        Called on rank zero, once per chunk of a round; what it returns is written to the ledger before anything else
        happens, and is never asked for again. A labeler that draws folds ``comparison.prompt.index`` into ``key``. A
        comparison that could not be judged gets a label with another status than ``"ok"``, never a made-up probability.
        """
