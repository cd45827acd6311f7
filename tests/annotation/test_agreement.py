"""Agreement, accuracies and labels against published examples and closed forms."""

from __future__ import annotations

import math
import random
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_rlhf.annotation.aggregate import preference_probability
from lightning_rlhf.annotation.agreement import (
    alpha_interval,
    cohen_kappa,
    fleiss_kappa,
    krippendorff_alpha,
    one_coin_accuracies,
    pairwise_agreement,
    weighted_probability,
)
from lightning_rlhf.annotation.queues import Item, QueueOptions
from lightning_rlhf.annotation.report import agreement_rows, report
from lightning_rlhf.annotation.store import AnnotationStore
from lightning_rlhf.annotation.votes import Ballot, Verdict, Vote, coin


# Krippendorff 2011, section D: four observers, twelve units, 0 where an observer is silent
OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
    [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
]
UNITS = [[value for value in column if value] for column in zip(*OBSERVERS, strict=True)]


@pytest.mark.parametrize(("level", "published"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_of_the_published_example(level: str, published: float) -> None:
    assert round(krippendorff_alpha(UNITS, level), 3) == published  # type: ignore[arg-type]


@given(st.lists(st.lists(st.integers(-3, 3), max_size=4), max_size=8))
def test_alpha_is_one_less_the_ratio_of_mean_distances(units: list[list[int]]) -> None:
    # by definition: mean distance within units, weighted 1 / (m - 1), over the mean distance of all values
    judged = [values for values in units if len(values) > 1]
    pooled = [value for values in judged for value in values]
    within = sum(2 * (a - b) ** 2 / (len(v) - 1) for v in judged for a, b in combinations(v, 2))
    alpha = krippendorff_alpha(units, "interval")
    if len(set(pooled)) < 2:
        assert math.isnan(alpha)
        return
    between = sum(2 * (a - b) ** 2 for a, b in combinations(pooled, 2)) / (len(pooled) - 1)
    assert alpha == pytest.approx(1 - within / between, abs=1e-12)


def test_alpha_interval_holds_alpha() -> None:
    low, high = alpha_interval(UNITS * 5, samples=200)
    assert low < 0.743 < high < 1
    assert all(map(math.isnan, alpha_interval([[1], [1]], samples=40)))


def test_kappas_of_published_examples() -> None:
    # the two reviewers of 50 proposals that textbooks show for Cohen's kappa
    reviews = [("yes", "yes")] * 20 + [("yes", "no")] * 5 + [("no", "yes")] * 10 + [("no", "no")] * 15
    assert cohen_kappa(reviews) == pytest.approx(0.4)
    # fourteen raters, ten subjects, five categories: the worked example of Fleiss' kappa, 0.210
    table = [
        *([0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1]),
        *([7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]),
    ]
    units = [[value for value, count in enumerate(row) for _ in range(count)] for row in table]
    assert round(fleiss_kappa(units), 3) == 0.210
    assert math.isnan(cohen_kappa([("a", "a")] * 3))
    with pytest.raises(ValueError, match="same number of votes"):
        fleiss_kappa([[1, 1], [1, 2, 2]])
    assert pairwise_agreement([[1, 1, 2], [1]]) == (1, 3)


def test_one_coin_posterior_in_closed_form() -> None:
    # two people of accuracy p against one of q: odds (p / (1 - p))^2 (1 - q) / q
    accuracies = {"x": 0.8, "y": 0.8, "z": 0.9}
    odds = (0.8 / 0.2) ** 2 * (0.1 / 0.9)
    given = [("x", 1.0), ("y", 1.0), ("z", 0.0)]
    assert weighted_probability(given, accuracies) == pytest.approx(odds / (1 + odds))
    assert weighted_probability([*given, ("z", 0.5)], accuracies) == pytest.approx(odds / (1 + odds)), (
        "ties say nothing"
    )
    assert weighted_probability([], accuracies) == 0.5


def test_one_coin_accuracy_on_known_pairs_is_the_mode_of_its_posterior() -> None:
    votes = [(unit, "x", float(unit < 7)) for unit in range(10)]
    truths, accuracies = one_coin_accuracies(votes, known=dict.fromkeys(range(10), 1.0))
    # Beta(4, 1) and 7 of 10 right: mode (4 - 1 + 7) / (4 + 1 - 2 + 10)
    assert accuracies["x"] == pytest.approx(10 / 13)
    assert set(truths.values()) == {1.0}


def test_one_coin_model_recovers_accuracies_and_beats_the_majority() -> None:
    generator = random.Random(0)
    true = {"good": 0.95, "fair": 0.75, "coin": 0.52, "bad": 0.52}
    votes, answers = [], {}
    for unit in range(800):
        answers[unit] = generator.random() < 0.5
        for person, accuracy in true.items():
            votes.append((unit, person, float(answers[unit] == (generator.random() < accuracy))))
    truths, accuracies = one_coin_accuracies(votes)
    for person, accuracy in true.items():
        assert accuracies[person] == pytest.approx(accuracy, abs=0.05)
    weighted = sum((truths[unit] > 0.5) == answer for unit, answer in answers.items()) / 800
    majority = 0.0
    for unit, answer in answers.items():
        mean = sum(value for other, _, value in votes if other == unit) / 4
        majority += 0.5 if mean == 0.5 else float((mean > 0.5) == answer)
    assert weighted > 0.92 > majority / 800 + 0.05


def vote(verdict: Verdict, annotator: str = "x", late: bool = False) -> Vote:
    return Vote(f"uid{verdict}{annotator}", annotator, "a", verdict, late=late)


@pytest.mark.parametrize(
    ("verdicts", "options", "expected"),
    [
        (["a"], {}, 1.0),
        (["a", "a", "b"], {}, 2 / 3),
        (["a", "a", "b"], {"aggregate": "majority"}, 1.0),
        (["a", "b"], {"aggregate": "majority"}, 0.5),
        (["a", "tie"], {}, 0.75),
        (["a", "tie"], {"ties": "drop"}, 1.0),
        (["both_bad"], {}, 0.5),
        (["both_bad"], {"both_bad": "drop"}, None),
        (["tie"], {"ties": "drop"}, None),
        (["skip", "b"], {}, 0.0),
        (["skip"], {}, None),
        ([], {}, None),
    ],
)
def test_labels(verdicts: list[Verdict], options: dict[str, str], expected: float | None) -> None:
    votes = [vote(verdict, str(number)) for number, verdict in enumerate(verdicts)]
    assert preference_probability(votes, **options) == expected  # type: ignore[arg-type]


def test_late_votes_do_not_change_a_label_and_weights_need_accuracies() -> None:
    assert preference_probability([vote("a"), vote("b", "y", late=True)]) == 1.0
    assert preference_probability([vote("a")], "weighted", accuracies={"x": 0.8}) == pytest.approx(0.8)
    with pytest.raises(ValueError, match="needs the accuracies"):
        preference_probability([vote("a")], "weighted")


def test_report_finds_who_clicks_the_first_side(tmp_path: Path) -> None:
    store = AnnotationStore(tmp_path / "annotation.sqlite", repeat_every=1000)
    people = {name: store.add_person(name)[0] for name in ("ann", "bob", "lazy")}
    texts = ("good " * 5, "bad " * 4)
    items = [Item(f"k{n}", (), texts[n % 2], texts[1 - n % 2]) for n in range(60)]
    store.queues.push("run", items, QueueOptions(votes=3, overlap=0.0))
    for name, person in people.items():
        while (shown := store.assignments.next_pair(person)) is not None:
            right = "left" if shown.left.startswith("good") else "right"
            wrong = "right" if right == "left" else "left"
            answers = right if coin(name, shown.id, "noise") < 0.9 else wrong
            side = "left" if name == "lazy" else answers
            store.assignments.vote(person, Ballot(shown.id, f"{name}-{shown.id}", side, seconds=4.0))  # type: ignore[arg-type]
    whole = report(store)
    store.close()
    people_report = whole["people"]
    assert isinstance(people_report, dict)
    assert people_report["lazy"]["notes"] == ["first side 100%"]
    assert people_report["ann"]["notes"] == people_report["bob"]["notes"] == []
    assert people_report["ann"]["agreement"]["share"] > people_report["lazy"]["agreement"]["share"]
    assert whole["accuracies"]["lazy"] < 0.7 < whole["accuracies"]["ann"]  # type: ignore[index]
    assert people_report["ann"]["words_per_second"] == pytest.approx(9 / 4)
    assert people_report["ann"]["per_hour"] == pytest.approx(900)
    assert whole["pairs_with_several_votes"] == 60
    assert set(whole["fleiss_kappa"]) == {"3"}  # type: ignore[call-overload]
    assert "not known" not in str(agreement_rows(whole))
