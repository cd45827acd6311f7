"""The votes of a run in a few numbers: how far people agree, and how much each of them did; without torch."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import TypedDict

from lightning_rlhf.annotation.agreement import (
    fleiss_kappa,
    krippendorff_alpha,
    one_coin_accuracies,
    pairwise_agreement,
)
from lightning_rlhf.annotation.intervals import wilson_interval
from lightning_rlhf.annotation.votes import Vote


class PersonSummary(TypedDict):
    """What one person did.

    Attributes:
        votes: verdicts, without skips.
        skips: pairs that were skipped.
        seconds: active time, summed.
        first_share: share of the verdicts for a side that are for the response shown first; None without any.
        accuracy: accuracy by the one-coin model of Dawid and Skene.
    """

    votes: int
    skips: int
    seconds: float
    first_share: float | None
    accuracy: float | None


class PeopleSummary(TypedDict):
    """What the people of a run did.

    Attributes:
        votes: verdicts that count, without skips.
        pairs: pairs with a verdict.
        agreement: share of pairs of verdicts for a side, on one pair, that are equal; None where no pair has two.
        agreement_interval: its Wilson interval of 95 %.
        alpha: Krippendorff's alpha of sides and ties; None where undefined.
        kappa: Fleiss' kappa by the number of verdicts on a pair.
        people: by name.
    """

    votes: int
    pairs: int
    agreement: float | None
    agreement_interval: tuple[float, float] | None
    alpha: float | None
    kappa: dict[str, float | None]
    people: dict[str, PersonSummary]


def people_summary(votes: Sequence[tuple[Hashable, Vote]]) -> PeopleSummary:
    """Summarize the votes of a run.

    Args:
        votes: pair and vote; late votes are left out.
    """
    given = [(pair, vote) for pair, vote in votes if not vote.late]
    judged = [(pair, vote.annotator, vote.value) for pair, vote in given if vote.value is not None]
    sides: defaultdict[Hashable, list[float]] = defaultdict(list)
    for pair, _, value in judged:
        sides[pair].append(value)
    # ties say nothing about the side
    equal, decided = pairwise_agreement([[value for value in values if value != 0.5] for values in sides.values()])
    by_size: defaultdict[int, list[list[float]]] = defaultdict(list)
    for values in sides.values():
        by_size[len(values)].append(values)
    accuracies = one_coin_accuracies(judged)[1]
    own: defaultdict[str, list[Vote]] = defaultdict(list)
    for _, vote in given:
        own[vote.annotator].append(vote)
    return {
        "votes": len(judged),
        "pairs": len(sides),
        "agreement": equal / decided if decided else None,
        "agreement_interval": wilson_interval(equal, decided) if decided else None,
        "alpha": _known(krippendorff_alpha(list(sides.values()))),
        "kappa": {str(size): _known(fleiss_kappa(by_size[size])) for size in sorted(by_size) if size > 1},
        "people": {name: _person(own[name], accuracies.get(name)) for name in sorted(own)},
    }


def people_line(found: PeopleSummary) -> str:
    """The summary as one line for the terminal."""
    people = len(found["people"])
    text = f"{found['votes']} votes of {people} {'person' if people == 1 else 'people'} on {found['pairs']} pairs"
    if found["agreement"] is not None and found["agreement_interval"] is not None:
        low, high = found["agreement_interval"]
        text += f"; two agree on {found['agreement']:.1%} [{low:.1%}, {high:.1%}]"
    return text


def _person(votes: Sequence[Vote], accuracy: float | None) -> PersonSummary:
    decided = [vote for vote in votes if vote.verdict in ("a", "b")]
    first = sum(vote.verdict == vote.first for vote in decided)
    return {
        "votes": sum(vote.value is not None for vote in votes),
        "skips": sum(vote.verdict == "skip" for vote in votes),
        "seconds": sum(vote.seconds for vote in votes),
        "first_share": first / len(decided) if decided else None,
        "accuracy": accuracy,
    }


def _known(value: float) -> float | None:
    """None in place of NaN, which JSON does not know."""
    return None if math.isnan(value) else value
