"""MixedLabeler: which pairs go where, what a restart does, what it costs, and how good the first labeler is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from lightning_rlhf.collectors.preferences import RoundCollector
from lightning_rlhf.estimators import fit_temperature, tempered
from lightning_rlhf.evaluation.audit import Judged, alignment, alignment_lines
from lightning_rlhf.evaluation.feedback import feedback_summary
from lightning_rlhf.labelers import AbstractLabeler, MixedLabeler
from lightning_rlhf.labelers.base import Memory
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.prompts import AbstractPromptSource, MixedPairs
from lightning_rlhf.randomness import Key
from lightning_rlhf.samplers import OfflineSampler
from lightning_rlhf.types import PAIR_WEIGHT, Comparison, Label, Preference, Prompt, PromptRow, RecordedPair, Response


KEY = Key((0, 5))


class Table(AbstractLabeler):
    """Answers by the number of the prompt; fails where there is none, and after so many calls."""

    def __init__(self, answers: dict[int, float], cost: float, most: int | None = None, **meta: float) -> None:
        self.answers, self.cost, self.most, self.meta = answers, cost, most, meta
        self.asked: list[int] = []

    def label(self, comparisons: Sequence[Comparison], key: Key) -> list[Label]:
        del key
        labels = []
        for comparison in comparisons:
            if self.most is not None and len(self.asked) >= self.most:
                raise KeyboardInterrupt
            index = comparison.prompt.index
            self.asked.append(index)
            p = self.answers.get(index)
            labels.append(Label(None, "invalid", self.cost) if p is None else Label(p, "ok", self.cost, {**self.meta}))
        return labels


def prompts(count: int, start: int = 0) -> list[Prompt]:
    def response(text: str) -> Response:
        return Response(tuple(text.encode()), text, "eos", reference_logps=(-1.0,) * len(text))

    return [Prompt(n, (1,), f"q{n}", pair=(response(f"a{n}"), response(f"b{n}"))) for n in range(start, start + count)]


def pairs(count: int) -> list[Comparison]:
    return [Comparison(prompt, *prompt.pair) for prompt in prompts(count) if prompt.pair is not None]


def sources(labels: Sequence[Label]) -> str:
    return "".join(str(label.meta["source"])[0] for label in labels)


def test_margin_share_disagreement_and_failures_route_pairs() -> None:
    ai = Table({0: 0.9, 1: 0.6, 2: 0.45, 3: 0.1, 4: 0.71}, cost=0.01)
    people = Table(dict.fromkeys(range(6), 1.0), cost=1.0)
    labels = MixedLabeler(ai, people, unsure=0.2, audit=0.0).label(pairs(6), KEY)
    assert sources(labels) == "appaap"
    assert [label.probability for label in labels] == [0.9, 1.0, 1.0, 0.1, 0.71, 1.0]
    assert [label.cost for label in labels] == pytest.approx([0.01, 1.01, 1.01, 0.01, 0.01, 1.01])
    assert labels[1].meta == {"source": "people", "routed": "unsure", "propensity": 1.0, "ai_probability": 0.6}
    assert labels[5].meta == {"source": "people", "routed": "failed", "propensity": 1.0}
    # a third of six are two: the failed one, and the one that is least sure
    labels = MixedLabeler(ai, people, route="share", share=1 / 3, audit=0.0).label(pairs(6), KEY)
    assert sources(labels) == "aapaap"
    same = Table({0: 0.5}, 0.0, first_forward=0.9, first_reverse=0.8)
    other = Table({0: 0.5}, 0.0, first_forward=0.9, first_reverse=0.2)
    for first, expected in ((same, "p"), (other, "a")):
        labels = MixedLabeler(first, people, route="disagree", audit=0.0).label(pairs(1), KEY)
        assert sources(labels) == expected
    with pytest.raises(ValueError, match="no first_forward and first_reverse"):
        MixedLabeler(ai, people, route="disagree").label(pairs(1), KEY)


def test_audited_pairs_are_a_random_share_that_the_content_decides() -> None:
    ai, people = Table(dict.fromkeys(range(400), 0.95), 0.0), Table(dict.fromkeys(range(400), 1.0), 1.0)
    labeler = MixedLabeler(ai, people, audit=0.2)
    labels = labeler.label(pairs(400), KEY)
    audited = [label.meta.get("routed") == "audit" for label in labels]
    # 80 expected, standard deviation 8
    assert 48 <= sum(audited) <= 112
    assert {label.meta["propensity"] for label in labels if "routed" in label.meta} == {0.2}
    backwards = labeler.label(pairs(400)[::-1], KEY)[::-1]
    assert [label.meta.get("routed") == "audit" for label in backwards] == audited


def test_weights_and_temperature_go_into_the_labels() -> None:
    ai, people = Table({0: 0.9, 1: 0.55}, 0.0), Table({1: 1.0}, 1.0)
    labels = MixedLabeler(ai, people, audit=0.0, temperature=2.0, ai_weight=0.25, people_weight=3.0).label(
        pairs(2), KEY
    )
    # logit(0.9) / 2 = ln 3, so that p = 3 / 4
    assert labels[0].probability == pytest.approx(0.75)
    assert labels[0].meta == {"source": "ai", "temperature": 2.0, PAIR_WEIGHT: 0.25}
    assert labels[1].weight == 3.0 and labels[1].meta["ai_probability"] == 0.55
    # at a temperature of 4 the margin of 0.9 is 0.13: not sure any more
    assert sources(MixedLabeler(ai, people, audit=0.0, temperature=4.0).label(pairs(1), KEY)) == "p"


@pytest.mark.parametrize("route", ["margin", "share"])
def test_a_killed_run_asks_nobody_twice_and_ends_with_the_same_rounds(tmp_path: Path, route: str) -> None:
    count = 150
    first = {n: (n * 37 % 100) / 100 for n in range(count)}
    second = {n: float(n % 3 > 0) for n in range(count)}

    def run(path: Path, most: tuple[int | None, int | None]) -> tuple[list[Preference], Table, Table, float]:
        ai, people = Table(first, 0.01, most[0]), Table(second, 1.0, most[1])
        labeler = MixedLabeler(ai, people, route=route, audit=0.1)  # type: ignore[arg-type]
        with PreferenceStore(path) as store:
            try:
                collector = RoundCollector(store, OfflineSampler(), labeler, Key((3,)))
                return collector.collect(0, prompts(count), None, 16).preferences, ai, people, store.total_cost
            except KeyboardInterrupt:
                return [], ai, people, store.total_cost

    expected, ai, people, cost = run(tmp_path / "plain", (None, None))
    assert len(expected) == count and len(ai.asked) == count and 0 < len(people.asked) < count
    assert cost == pytest.approx(0.01 * count + len(people.asked))
    asked: list[int] = []
    seconds: list[int] = []
    found: list[Preference] = []
    # killed in the first labeler, in the second one, and then left alone
    for limits in ((100, None), (None, 3), (None, None)):
        found, ai, people, _ = run(tmp_path / "killed", limits)
        asked += ai.asked
        seconds += people.asked
    assert found == expected
    with PreferenceStore(tmp_path / "killed", read_only=True) as store:
        assert store.total_cost == pytest.approx(cost), "paid for once, whatever was asked again"
        assert store.failed(0) == {} and set(store.attempts(0).values()) == {1}
    # what was begun when it was killed is asked again: 64 pairs of the first labeler at most, or with share the round
    assert len(asked) - count <= (100 if route == "share" else 36)
    assert len(seconds) - len(set(seconds)) == 3


def test_pairs_that_wait_are_no_failures_and_come_again_when_they_are_late(tmp_path: Path) -> None:
    class Later(Table):
        """Has an answer in the next round only."""

        whole_rounds = True
        max_lag = 1
        seen: list[float | None]

        def stream(self, questions, answered, key):  # type: ignore[no-untyped-def]
            self.asked += [question.comparison.prompt.index for question in questions]
            self.seen += [question.suggestion for question in questions]
            late = [place for place, question in enumerate(questions) if question.is_late]
            yield from super().stream([], answered, key)
            from lightning_rlhf.labelers.base import Answer

            yield [(place, Answer(Label(1.0, cost=2.0, meta={"source": "human"}))) for place in late]

    ai = Table(dict.fromkeys(range(8), 0.9) | {1: 0.5, 2: 0.5, 5: 0.6}, 0.01)
    people = Later({}, 1.0)
    people.seen = []
    with PreferenceStore(tmp_path / "ledger.sqlite") as store:
        collector = RoundCollector(store, OfflineSampler(), MixedLabeler(ai, people, audit=0.0), Key((0,)))
        first = collector.collect(0, prompts(4), None, 4)
        assert [p.comparison.prompt.index for p in first.preferences] == [0, 3]
        assert first.failed == {} and store.round_info(0) == {"prompts": 4, "failed": {}, "upto": 4, "open": 2}
        second = collector.collect(1, prompts(4, 4), None, 4)
        assert [p.comparison.prompt.index for p in second.preferences] == [4, 6, 7, 1, 2]
        assert ai.asked == list(range(8)), "late pairs are not judged again by the first labeler"
        assert people.asked == [1, 2, 5, 1, 2]
        assert people.seen == [0.5, 0.5, 0.6, 0.5, 0.5], "what they may be shown after their verdict"
        assert store.cost(1) == pytest.approx(0.04) and store.cost(2) == pytest.approx(0.08 + 4.0)
        found = feedback_summary(store)
    assert found["sources"]["ai"] == {"labels": 5, "attempts": 8, "cost": pytest.approx(0.08)}
    assert found["sources"]["human"] == {"labels": 2, "attempts": 2, "cost": 4.0}


def test_a_temperature_is_fitted_to_closed_rounds(tmp_path: Path) -> None:
    """The first labeler says 0.88 and is right three times of four: its temperature is logit 0.88 / logit 0.75."""
    ai = Table(dict.fromkeys(range(80), 0.88), 0.0)
    people = Table({n: float(n % 4 > 0) for n in range(80)}, 1.0)

    def collect(path: Path, labeler: MixedLabeler) -> list[list[Preference]]:
        with PreferenceStore(path) as store:
            collector = RoundCollector(store, OfflineSampler(), labeler, Key((0,)))
            return [collector.collect(n, prompts(40, 40 * n), None, 8).preferences for n in range(2)]

    def mixed(audit: float) -> MixedLabeler:
        return MixedLabeler(ai, people, unsure=0.1, audit=audit, temperature="fit", least_overlap=20)

    collected = collect(tmp_path / "a", mixed(1.0))
    assert all("temperature" not in p.label.meta for p in collected[0])
    fitted = math.log(0.88 / 0.12) / math.log(3)
    labeler = mixed(1.0)
    with PreferenceStore(tmp_path / "a", read_only=True) as store:
        info = store.round_info(0)
        assert info is not None
        labeler.recall(Memory(store.overlap(info["upto"])))
        assert alignment_of(store)["temperature"] == pytest.approx(fitted)
    assert labeler._in_force == pytest.approx(fitted)
    (label,) = MixedLabeler(ai, people, audit=0.0, temperature=fitted).label(pairs(1), KEY)
    assert label.probability == pytest.approx(0.75)
    # a run that is read again has the same labels
    assert collect(tmp_path / "a", mixed(1.0)) == collected


def alignment_of(store: PreferenceStore):  # type: ignore[no-untyped-def]
    return feedback_summary(store)["alignment"]


def test_temperature_has_its_closed_form() -> None:
    p = torch.tensor([0.6, 0.9, 0.2, 0.5], dtype=torch.float64)
    for temperature in (0.5, 1.0, 3.0):
        assert fit_temperature(p, tempered(p, temperature)) == pytest.approx(temperature)
    # weights: 3 of 4 right counts as 1 of 2 with the weights 1, 1, 1, 3
    hard = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    sure = torch.full((4,), 0.9, dtype=torch.float64)
    assert fit_temperature(sure, hard) == pytest.approx(math.log(9) / math.log(3))
    assert fit_temperature(sure, hard, torch.tensor([1.0, 1, 1, 3])) == 100.0
    assert fit_temperature(sure, torch.ones(4)) == 0.1
    assert fit_temperature(torch.full((3,), 0.5), torch.ones(3)) == 1.0
    assert tempered(torch.tensor([0.0, 1.0, 0.5]), 1.0).tolist() == [0.0, 1.0, 0.5]
    with pytest.raises(ValueError, match="needs a target"):
        fit_temperature(sure, torch.ones(3))


def test_alignment_weighs_audited_pairs_by_their_propensity() -> None:
    audited = [Judged(0.95, 1.0, 0.1, True)] * 9 + [Judged(0.95, 0.0, 0.1, True)]
    unsure = [Judged(0.55, 1.0), Judged(0.55, 0.0), Judged(0.4, 0.5), Judged(0.5, 1.0)]
    found = alignment([*audited, *unsure])
    assert found["audited"]["share"] == 0.9 and found["audited"]["count"] == 10
    low, high = found["audited"]["interval"] or (0, 0)
    assert (low, high) == pytest.approx((0.596, 0.982), abs=1e-3), "Wilson's interval of 9 of 10"
    assert found["routed"]["share"] == 0.5
    # (10 * 9 + 2) / (10 * 10 + 4)
    assert found["all_pairs"] == pytest.approx(92 / 104)
    counts = {name: entry["count"] for name, entry in found["by_margin"].items()}
    assert counts == {"0-0.1": 3, "0.1-0.2": 1, "0.4-0.5": 10}
    assert found["temperature"] is None
    assert any("raise unsure" in line for line in alignment_lines(found, people=0.99))
    assert not any("raise unsure" in line for line in alignment_lines(found, people=0.9))
    assert alignment([])["all_pairs"] is None


def test_bad_settings_are_named() -> None:
    ai = Table({}, 1.0)
    for options, message in (
        ({"route": "coin"}, "route must be one of margin, share, disagree"),
        ({"unsure": 0.6}, r"unsure must lie in \[0, 0.5\]"),
        ({"audit": math.nan}, "audit must lie in"),
        ({"temperature": 0.0}, "temperature must be > 0, or 'fit'"),
        ({"least_overlap": 0}, "least_overlap"),
        ({"people_weight": -1.0}, "people_weight must be >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            MixedLabeler(ai, ai, **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"MixedLabeler\.people"):
        MixedLabeler(ai, "people")  # type: ignore[arg-type]


class Rows(AbstractPromptSource):
    """Pairs x against y with given probabilities of x; every second row has y first."""

    def __init__(self, probabilities: list[float]) -> None:
        self.probabilities = probabilities

    def load(self) -> list[PromptRow]:
        self.report["short"] += 1
        rows = []
        for n, p in enumerate(self.probabilities):
            pair = RecordedPair("x", "y", p) if n % 2 else RecordedPair("y", "x", 1 - p)
            rows.append(PromptRow(f"row {n}", text=f"q{n}", pair=pair))
        return rows


def test_sources_of_recorded_pairs_are_mixed_with_weights_and_temperatures() -> None:
    people, judge = Rows([0.75] * 12), Rows([0.9] * 15)
    mixed = MixedPairs([people, judge], weights=[1.0, 0.5], temperatures="fit")
    rows = [row.pair for row in mixed.load()]
    assert len(rows) == 27 and mixed.report["short"] == 2
    assert rows[:12] == [row.pair for row in Rows([0.75] * 12).load()]
    # logit 0.9 = 2 logit 0.75
    assert [pair.probability for pair in rows[12:14] if pair] == pytest.approx([0.25, 0.75])
    assert {pair.weight for pair in rows[12:] if pair} == {0.5}
    with pytest.raises(ValueError, match="there are 3: have more labeled by both"):
        MixedPairs([people, Rows([0.9] * 3)], temperatures="fit").load()
    for options, message in (
        ({"weights": [1.0]}, "weights needs one number per source, 2; got 1"),
        ({"temperatures": [1.0, 0.0]}, "temperatures must be finite"),
        ({"temperatures": "guess"}, "or 'fit'"),
    ):
        with pytest.raises(ValueError, match=message):
            MixedPairs([people, judge], **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one source"):
        MixedPairs([])
