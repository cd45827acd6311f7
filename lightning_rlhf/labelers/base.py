"""The interface of labelers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from lightning_rlhf.annotation.votes import Vote
from lightning_rlhf.randomness import Key
from lightning_rlhf.runtime.fingerprint import KeepsArguments
from lightning_rlhf.types import Comparison, Label


@dataclass(frozen=True)
class Question:
    """A comparison that a labeler is asked about.

    Args:
        id: names it over restarts: run, comparison and attempt.
        comparison: the pair.
        is_late: whether its round is closed, so that the round which is open now does not wait for it.
        earlier: attempts at it that are in the ledger, oldest first.
        priority: pairs with a larger one are shown to people first.
        suggestion: P(a preferred) by another labeler, which people may see after their verdict.
    """

    id: str
    comparison: Comparison
    is_late: bool = False
    earlier: tuple[Label, ...] = ()
    priority: float = 0.0
    suggestion: float | None = None


@dataclass(frozen=True)
class Answer:
    """A label with the votes behind it.

    Args:
        label: the label.
        votes: votes of people; none for other labelers.
        guidelines: texts of guidelines by the hash that the votes name.
    """

    label: Label
    votes: tuple[Vote, ...] = ()
    guidelines: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Memory:
    """Labels and votes of the closed rounds of a run, read from the ledger when it is asked for.

    Args:
        overlap: pairs that two labelers judged: the answer with status `ROUTED`, and the label.
        votes: votes of people behind the labels, with round and position of their pair; late ones are left out.
    """

    overlap: Sequence[tuple[Label, Label]] = ()
    votes: Sequence[tuple[tuple[int, int], Vote]] = ()


class AbstractLabeler(KeepsArguments, ABC):
    """Says which of two responses is better, and how sure it is.

    Subclass it, implement `label`, and name your class by its path: ``--data.labeler=my_file.MyLabeler``.

    Attributes:
        whole_rounds: whether `stream` is asked about all pairs of a round at once, rather than `label` chunk by chunk.
        max_lag: closed rounds whose open pairs are asked about again, with `stream`.
        judges: ``pairs``, or ``singles``: comparisons with one response (`Comparison.is_single`), or ``both``.
    """

    whole_rounds: ClassVar[bool] = False
    judges: ClassVar[Literal["pairs", "singles", "both"]] = "pairs"
    max_lag: int = 0

    @abstractmethod
    def label(self, comparisons: Sequence[Comparison], key: Key) -> list[Label]:
        """Label each comparison, in order.

        Called on rank zero, once per chunk of a round. Its labels are written to the ledger before anything else
        happens, and are never asked for again. A random labeler folds ``comparison.prompt.index`` into ``key``. A
        comparison that could not be judged gets a label with another status than ``"ok"``, never a made-up probability.
        """

    def stream(self, questions: Sequence[Question], answered: int, key: Key) -> Iterator[list[tuple[int, Answer]]]:
        """Answer questions as answers come, for labelers with ``whole_rounds``.

        Answers are written to the ledger before more are asked for. Questions without an answer when the iterator ends
        stay open; those of the last ``max_lag`` rounds are asked again.

        Args:
            questions: pairs without a label.
            answered: pairs of the round that have an answer, e.g. from before a restart.
            key: randomness, as in `label`.

        Yields:
            Positions in ``questions``, each with its answer. An answer with status `ROUTED` says that another one to
            the same question follows, perhaps after a restart; the question then has it among its ``earlier`` ones.
        """
        del answered
        labels = self.label([question.comparison for question in questions], key)
        yield [(place, Answer(label)) for place, label in enumerate(labels)]

    def recall(self, memory: Memory) -> None:
        """Take note of what closed rounds have brought; called before a round is labeled, with ``whole_rounds``.

        Labels of the round itself are not among it: a restart finds the same.
        """
        del memory


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
