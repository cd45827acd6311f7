"""From votes to a label: strengths by table and by agreement, people by accuracy, weights, and earlier rounds."""

from __future__ import annotations

import math

import pytest

from lightning_rlhf.annotation.aggregate import strength_agreement
from lightning_rlhf.annotation.summary import people_summary
from lightning_rlhf.annotation.votes import Verdict, Vote
from lightning_rlhf.labelers.base import Memory
from lightning_rlhf.labelers.human import HumanLabeler
from lightning_rlhf.labelers.votes import VoteModel, VoteOptions, fit_votes, label_of_votes
from lightning_rlhf.types import PAIR_WEIGHT


def vote(who: str, verdict: Verdict, strength: int | None = None, late: bool = False) -> Vote:
    return Vote(f"uid-{who}-{verdict}-{strength}", who, "a", verdict, strength, seconds=2.0, late=late)


def test_strength_by_table_and_weights() -> None:
    votes = [vote("ann", "a", 3), vote("bob", "b", 1), vote("eve", "tie"), vote("dan", "skip")]
    plain = label_of_votes(votes, VoteOptions())
    assert plain.probability == 0.5 and plain.cost == 4.0 and plain.weight == 1.0
    assert plain.meta == {"source": "human", "votes": 3, "agreement": 1 / 3, "strength": 2 / 3, "seconds": 8.0}
    table = label_of_votes(votes, VoteOptions(strength="table", weight="votes"))
    assert table.probability == pytest.approx((0.95 + 0.35 + 0.5) / 3)
    assert table.meta[PAIR_WEIGHT] == 3.0
    strength = label_of_votes(votes[:2], VoteOptions(weight="strength"))
    assert (strength.probability, strength.weight) == (0.5, 1.0)
    assert label_of_votes([vote("ann", "b", 2)], VoteOptions(weight="strength")).weight == 2.0
    assert label_of_votes(votes[2:3], VoteOptions(ties="drop", weight="votes")).status == "tie"
    # without a strength on the page a vote counts as the weakest one
    assert label_of_votes([vote("ann", "a")], VoteOptions(strength="table")).probability == 0.65
    with pytest.raises(ValueError, match="weighted weighs people"):
        VoteOptions(aggregate="weighted", strength="table")


def test_strength_is_calibrated_by_what_others_say() -> None:
    # 60 pairs: a strong vote meets the same side 9 times of 10, a weak one 6 times of 10
    pairs = []
    for n in range(60):
        pairs.append([vote("ann", "a", 3), vote("bob", "a" if n % 10 else "b", 3)])
        pairs.append([vote("ann", "a", 1), vote("bob", "a" if n % 10 < 6 else "b", 1)])
    found = strength_agreement(pairs)
    assert found[3] == pytest.approx((1 + 2 * 54) / (2 + 120))
    assert found[1] == pytest.approx((1 + 2 * 36) / (2 + 120))
    # nobody voted with strength 2: the value of all
    assert found[2] == pytest.approx((1 + 2 * 90) / (2 + 240))
    model = VoteModel(agreement=found)
    options = VoteOptions(strength="calibrated")
    assert label_of_votes([vote("ann", "b", 3)], options, model).probability == pytest.approx(1 - found[3])
    assert strength_agreement(pairs[:10]) == {}, "too few to say"
    assert label_of_votes([vote("ann", "b", 3)], options, VoteModel()).probability == 0.0
    against = [[vote("ann", "a", 1), vote("bob", "b", 1)]] * 40
    assert strength_agreement(against)[1] == 0.5


def test_people_are_weighted_by_what_they_did_in_closed_rounds() -> None:
    history = []
    for n in range(40):
        truth: Verdict = "a" if n % 2 else "b"
        wrong: Verdict = "b" if n % 2 else "a"
        history += [((0, n), vote("ann", truth)), ((0, n), vote("bob", truth))]
        history.append(((0, n), vote("eve", truth if n % 5 < 3 else wrong)))
        history.append(((0, n), vote("late", wrong, late=True)))
    labeler = HumanLabeler(votes=VoteOptions(aggregate="weighted"))
    labeler.recall(Memory(votes=history))
    model = labeler._model
    assert model == fit_votes(history) and "late" not in model.accuracies
    assert model.accuracies["ann"] > 0.95 > 0.7 > model.accuracies["eve"]
    label = label_of_votes([vote("ann", "a"), vote("eve", "b")], labeler.votes, model)

    def logit(p: float) -> float:
        return math.log(p / (1 - p))

    expected = logit(model.accuracies["ann"]) - logit(model.accuracies["eve"])
    assert label.probability == pytest.approx(1 / (1 + math.exp(-expected)))
    # somebody new has the mean of the prior, 4 / 5
    assert label_of_votes([vote("new", "a")], labeler.votes, model).probability == pytest.approx(0.8)


def test_people_in_the_summary() -> None:
    votes = [(0, vote("ann", "a")), (0, vote("bob", "a")), (1, vote("ann", "b")), (1, vote("bob", "a"))]
    votes += [(2, vote("ann", "skip")), (2, vote("bob", "tie")), (0, vote("eve", "b", late=True))]
    found = people_summary(votes)
    assert (found["votes"], found["pairs"], found["agreement"]) == (5, 3, 0.5)
    assert found["agreement_interval"] == pytest.approx((0.0945, 0.9055), abs=1e-4)
    # of 4 votes 3 are for a: expected agreement 10/16, observed 1/2
    assert found["kappa"] == {"2": pytest.approx((0.5 - 0.625) / 0.375)}
    assert set(found["people"]) == {"ann", "bob"}
    ann = found["people"]["ann"]
    assert (ann["votes"], ann["skips"], ann["seconds"], ann["first_share"]) == (2, 1, 6.0, 0.5)
    assert people_summary([])["agreement"] is None
