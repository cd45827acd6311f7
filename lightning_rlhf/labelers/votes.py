"""From the votes of people on a pair to its label, and what earlier votes say about people and strengths."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lightning_rlhf.annotation.aggregate import Aggregate, Ties, counted, preference_probability, strength_agreement
from lightning_rlhf.annotation.agreement import PRIOR, one_coin_accuracies
from lightning_rlhf.annotation.votes import Vote
from lightning_rlhf.types import PAIR_WEIGHT, Label


@dataclass(frozen=True)
class VoteOptions:
    """How votes become labels.

    Args:
        aggregate: ``mean`` of the votes, an unbiased estimate of P(a preferred); their ``majority``, 0, 1/2 or 1; or
            ``weighted`` by the accuracies of people, estimated from the votes of earlier rounds (one-coin model of
            Dawid and Skene).
        ties: a tie counts 1/2, or is dropped; a pair with nothing else then gets no label, with status ``tie``.
        both_bad: the same for pairs of two bad responses, with status ``both_bad``.
        cost: price of a vote; a label costs as much as its votes, skips included.
        strength: ``ignore``: a vote is 1 or 0. ``table``: a vote for a of strength s counts ``table[s - 1]``.
            ``calibrated``: it counts the share of people who took the same side on the same pair as somebody who
            voted with that strength, in earlier rounds; 1 until there are `LEAST_OVERLAP` such comparisons.
        table: P(a preferred) of a vote for a that is slightly better, better and much better; in [0.5, 1].
        weight: weight of the pair in the loss: ``one``; its number of ``votes``; or the mean ``strength``, 0 to 3, with
            sign, so that a tie has none (the scaled Bradley-Terry loss of HelpSteer2-Preference, arXiv 2410.01257).

    Raises:
        ValueError: if the table is out of range, or the strength is to be used with ``aggregate=weighted``.
    """

    aggregate: Aggregate = "mean"
    ties: Ties = "half"
    both_bad: Ties = "half"
    cost: float = 1.0
    strength: Literal["ignore", "calibrated", "table"] = "ignore"
    table: tuple[float, float, float] = (0.65, 0.8, 0.95)
    weight: Literal["one", "votes", "strength"] = "one"

    def __post_init__(self) -> None:
        if not all(0.5 <= value <= 1.0 for value in self.table):
            raise ValueError(f"votes.table needs three probabilities in [0.5, 1]; got {self.table}")
        if self.aggregate == "weighted" and self.strength != "ignore":
            raise ValueError(
                "votes.aggregate=weighted weighs people, and takes a vote as right or wrong: set "
                "votes.strength=ignore, or votes.aggregate=mean"
            )


@dataclass(frozen=True)
class VoteModel:
    """What earlier votes say.

    Args:
        accuracies: accuracy of each person, in [0.5, 0.99].
        agreement: by strength, the probability that another person takes the same side; empty if it is not known.
    """

    accuracies: Mapping[str, float] = field(default_factory=dict)
    agreement: Mapping[int, float] = field(default_factory=dict)


def fit_votes(votes: Sequence[tuple[Hashable, Vote]]) -> VoteModel:
    """Estimate accuracies and the meaning of strengths.

    Args:
        votes: pair and vote; late votes are left out.
    """
    given = [(pair, vote) for pair, vote in votes if not vote.late]
    judged = [(pair, vote.annotator, vote.value) for pair, vote in given if vote.value is not None]
    by_pair: dict[Hashable, list[Vote]] = {}
    for pair, vote in given:
        by_pair.setdefault(pair, []).append(vote)
    return VoteModel(one_coin_accuracies(judged)[1], strength_agreement(list(by_pair.values())))


def label_of_votes(votes: Sequence[Vote], options: VoteOptions, model: VoteModel | None = None) -> Label:
    """The label that votes on one pair give.

    ``meta`` holds ``source`` (``human``), ``votes``, ``agreement`` (share of the votes on the side of the majority),
    ``strength`` (mean, from -3 for b to 3 for a) and ``seconds`` (active time, summed).

    Args:
        votes: the votes; those of people who skipped count for the price, too.
        options: how they become a label.
        model: what earlier votes say; default: nothing.
    """
    model = model or VoteModel()
    accuracies = dict.fromkeys((vote.annotator for vote in votes), PRIOR[0] / sum(PRIOR)) | dict(model.accuracies)
    tables = {"table": dict(enumerate(options.table, 1)), "calibrated": model.agreement}
    probability = preference_probability(
        votes,
        options.aggregate,
        ties=options.ties,
        both_bad=options.both_bad,
        accuracies=accuracies,
        strengths=tables.get(options.strength),
    )
    known = [vote for vote in counted(votes) if vote.value is not None]
    sides = [vote.verdict for vote in known]
    meta: dict[str, float | int | str] = {"source": "human", "votes": len(known)}
    if known:
        meta["agreement"] = max(sides.count(side) for side in sides) / len(sides)
        meta["strength"] = sum(vote.signed or 0 for vote in known) / len(known)
    meta["seconds"] = sum(vote.seconds for vote in votes)
    cost = options.cost * len(votes)
    if probability is not None:
        if options.weight != "one":
            meta[PAIR_WEIGHT] = float(len(known)) if options.weight == "votes" else abs(float(meta["strength"]))
        return Label(probability, "ok", cost, meta)
    # of votes that are dropped, the more frequent kind names the status
    bad, ties = sides.count("both_bad"), sides.count("tie")
    status: Literal["skipped", "both_bad", "tie"] = "skipped" if not known else "both_bad" if bad > ties else "tie"
    return Label(None, status, cost, meta)
