"""The interface of labelers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning_rlhf.randomness import Key
from lightning_rlhf.runtime.fingerprint import KeepsArguments
from lightning_rlhf.types import Comparison, Label


class AbstractLabeler(KeepsArguments, ABC):
    """Says which of two responses is better, and how sure it is.

    Subclass it, implement `label`, and name your class by its path: ``--data.labeler=my_file.MyLabeler``.
    """

    @abstractmethod
    def label(self, comparisons: Sequence[Comparison], key: Key) -> list[Label]:
        """Label each comparison, in order.

        Called on rank zero, once per chunk of a round. Its labels are written to the ledger before anything else
        happens, and are never asked for again. A random labeler folds ``comparison.prompt.index`` into ``key``. A
        comparison that could not be judged gets a label with another status than ``"ok"``, never a made-up probability.
        """


def cost_parts(prices: Mapping[str, float]) -> dict[str, str]:
    """The parts of a label's cost, as an entry of its ``meta``; none for a label that costs nothing.

    Args:
        prices: price of each part, by a name without spaces or colons that is the same when it is asked for again.
    """
    # repr gives back the same float when it is read again
    parts = " ".join(f"{name}:{price!r}" for name, price in prices.items() if price)
    return {"cost_parts": parts} if parts else {}


def booked_once(label: Label, earlier: Sequence[Label]) -> Label:
    """A label without that part of its cost which earlier attempts at the same comparison have booked.

    Args:
        label: a new attempt.
        earlier: attempts that are in the ledger.
    """
    # labels with one price have no parts that could repeat
    if "cost_parts" not in label.meta:
        return label
    # a reply that earlier attempts have paid for comes from the journal, and costs nothing now
    booked = set().union(*map(_parts, earlier))
    return replace(label, cost=sum(price for name, price in _parts(label).items() if name not in booked))


def _parts(label: Label) -> dict[str, float]:
    parts = (part.partition(":") for part in str(label.meta.get("cost_parts", "")).split())
    return {name: float(price) for name, _, price in parts}
