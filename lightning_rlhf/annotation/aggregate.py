"""From votes to a label: the probability that the first response is preferred."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from lightning_rlhf.annotation.agreement import weighted_probability
from lightning_rlhf.annotation.votes import Vote


Aggregate = Literal["mean", "majority", "weighted"]
Ties = Literal["half", "drop"]


def counted(votes: Sequence[Vote], ties: Ties = "half", both_bad: Ties = "half") -> list[Vote]:
    """The votes that a label is made of: no skips, no late ones, and no ties where those are dropped."""
    left_out = {"skip"}
    left_out |= {"tie"} if ties == "drop" else set()
    left_out |= {"both_bad"} if both_bad == "drop" else set()
    return [vote for vote in votes if not vote.late and vote.verdict not in left_out]


def preference_probability(
    votes: Sequence[Vote],
    aggregate: Aggregate = "mean",
    *,
    ties: Ties = "half",
    both_bad: Ties = "half",
    accuracies: Mapping[str, float] | None = None,
) -> float | None:
    """P(a preferred) by the votes of people.

    ``mean`` is an unbiased estimate of the probability that a person prefers a, which PILAF's theory needs, also where
    there is one vote. ``majority`` is 0, 1/2 or 1. ``weighted`` is the posterior of the one-coin model of Dawid and
    Skene, see `one_coin_accuracies`.

    Args:
        votes: votes on one pair.
        aggregate: how they become one number.
        ties: a tie counts 1/2, or is left out. Half shrinks margins; leaving out is exact under Davidson's model of
            ties, and overshoots under Rao and Kupper's.
        both_bad: the same for two bad responses.
        accuracies: accuracy of each annotator, for ``weighted``.

    Returns:
        The probability, in [0, 1]; None if no vote is left.
    """
    given = [(vote.annotator, vote.value) for vote in counted(votes, ties, both_bad)]
    values = [value for _, value in given if value is not None]
    if not values:
        return None
    mean = sum(values) / len(values)
    if aggregate == "mean":
        return mean
    if aggregate == "majority":
        return 0.5 if mean == 0.5 else float(mean > 0.5)
    if accuracies is None:
        raise ValueError("aggregate=weighted needs the accuracies of the annotators; see one_coin_accuracies")
    return weighted_probability([(who, value) for who, value in given if value is not None], accuracies)
