"""From votes to a label: the probability that the first response is preferred."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Literal

from lightning_rlhf.annotation.agreement import weighted_probability
from lightning_rlhf.annotation.votes import STRENGTHS, Vote


Aggregate = Literal["mean", "majority", "weighted"]
Ties = Literal["half", "drop"]
LEAST_OVERLAP = 30
"""Comparisons of two votes below which nothing is said about a strength."""


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
    strengths: Mapping[int, float] | None = None,
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
        strengths: for ``mean`` and ``majority``, what a vote for a counts by its strength, in [0.5, 1]; a vote for b
            counts 1 less that, a missing strength counts as 1. Default, or empty: 1.

    Returns:
        The probability, in [0, 1]; None if no vote is left.
    """
    given = [(vote.annotator, vote.value) for vote in counted(votes, ties, both_bad)]
    values = [_soft(vote, strengths or {}) for vote in counted(votes, ties, both_bad)]
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


def strength_agreement(pairs: Sequence[Sequence[Vote]]) -> dict[int, float]:
    """Probability that another person takes the same side, by the strength of a vote.

    The posterior mean with the prior Beta(1, 1); a tie of the other person counts 1/2. A strength with fewer than
    `LEAST_OVERLAP` comparisons gets the value of all strengths together; with fewer of these, nothing is known.

    Args:
        pairs: the votes on each pair.

    Returns:
        The probability by strength, in [0.5, 1]; empty if nothing is known.
    """
    same, count = dict.fromkeys(STRENGTHS, 0.0), dict.fromkeys(STRENGTHS, 0)
    for votes in pairs:
        for vote, other in permutations(counted(votes), 2):
            if vote.verdict in ("a", "b") and other.value is not None:
                level = vote.strength or 1
                count[level] += 1
                same[level] += other.value if vote.verdict == "a" else 1 - other.value
    if sum(count.values()) < LEAST_OVERLAP:
        return {}
    # (1 + agreements) / (2 + comparisons)
    pooled = (1 + sum(same.values())) / (2 + sum(count.values()))
    found = {
        level: pooled if count[level] < LEAST_OVERLAP else (1 + same[level]) / (2 + count[level]) for level in STRENGTHS
    }
    # nobody is turned round
    return {level: max(value, 0.5) for level, value in found.items()}


def _soft(vote: Vote, strengths: Mapping[int, float]) -> float:
    value = vote.value
    # a tie is 1/2 at any strength; skips are not counted
    if value is None or value == 0.5 or not strengths:
        return 0.5 if value is None else value
    certainty = strengths[vote.strength or 1]
    return certainty if value == 1.0 else 1.0 - certainty
