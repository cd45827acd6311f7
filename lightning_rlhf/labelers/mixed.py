"""Two labelers for one data set: a cheap one for the pairs it is sure about, another one for the rest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar, Literal, get_args

import torch

from lightning_rlhf.estimators.temperature import tempered
from lightning_rlhf.evaluation.audit import judged_pairs, temperature_of
from lightning_rlhf.labelers.base import AbstractLabeler, Answer, Memory, Question
from lightning_rlhf.labelers.reward import comparison_key
from lightning_rlhf.randomness import Key
from lightning_rlhf.runtime import preemption
from lightning_rlhf.runtime.plugins import check_plugin, returned
from lightning_rlhf.types import PAIR_WEIGHT, ROUTED, Comparison, Label


Route = Literal["margin", "share", "disagree"]
CHUNK = 64
"""Pairs that a labeler is given at once."""
FIRST, SECOND, AUDIT = 0, 1, 2
"""Names of the random streams of both labelers, and of the choice of audited pairs."""


class MixedLabeler(AbstractLabeler):
    """A first labeler, such as an LLM, labels the pairs it is sure about; people, or another labeler, the rest.

    RLTHF (arXiv 2502.13417) reports the quality of full human labels on HH and TL;DR with 6-7 % of them. Here the first
    labeler judges every pair. A pair goes to the second one if the first is not sure of it, by ``route``; if the first
    gave no verdict; or, with probability ``audit``, at random. The second label wins, and the two on one pair say how
    good the first labeler is where it is sure: see `lightning_rlhf.evaluation.audit`.

    The verdict of the first labeler on a pair that waits for the second is in the ledger, as an attempt with status
    ``routed`` and its own price. A run that is killed or ends with status 75 so asks neither labeler twice and routes
    no pair anew; with ``route=share`` the verdicts of a round are written when all of them are there.

    Prices are those of the two labelers, which must have one unit: the ledger adds them up (`LabelBudget` with
    ``cost``). ``enough`` of `HumanLabeler` counts all pairs of the round. Audited pairs are shown to people first, then
    those of which the first labeler is least sure.

    ``meta`` of a label holds ``source`` (``ai``, or as the second labeler says, e.g. ``human``), ``temperature`` where
    it is not 1, and for the second one's ``routed`` (``unsure``, ``disagree``, ``failed`` or ``audit``), ``propensity``
    and ``ai_probability``.

    Args:
        ai: judges all pairs.
        people: judges the pairs that are routed: `HumanLabeler`, or any labeler.
        route: ``margin`` routes pairs with |p - 1/2| < ``unsure``; ``share`` the least sure ``share`` of a round;
            ``disagree`` those where the two orders of an LLM judge contradict each other.
        unsure: half width of the interval of probabilities that are not sure, in [0, 0.5].
        share: share of the pairs of a round for ``route=share``, in [0, 1].
        audit: share of the sure pairs that are routed, too, in [0, 1].
        temperature: of the first labeler's probabilities, > 0, before they are routed and used: above 1 makes them less
            sure. ``fit`` fits it, once a round, to the pairs of earlier rounds that both labeled; 1 until there are
            ``least_overlap`` of them.
        least_overlap: pairs for a first fit, >= 1.
        ai_weight: factor on the weight of a pair with the first labeler's label in the loss, >= 0.
        people_weight: the same for the second labeler.

    Raises:
        ValueError: if a setting is out of range.
    """

    whole_rounds: ClassVar[bool] = True

    def __init__(
        self,
        ai: AbstractLabeler,
        people: AbstractLabeler,
        route: Route = "margin",
        unsure: float = 0.2,
        share: float = 0.2,
        audit: float = 0.05,
        temperature: float | Literal["fit"] = 1.0,
        least_overlap: int = 30,
        ai_weight: float = 1.0,
        people_weight: float = 1.0,
    ) -> None:
        if route not in get_args(Route):
            raise ValueError(f"route must be one of {', '.join(get_args(Route))}; got {route!r}")
        for name, value, most in (("unsure", unsure, 0.5), ("share", share, 1.0), ("audit", audit, 1.0)):
            # also refuses NaN
            if not 0.0 <= value <= most:
                raise ValueError(f"{name} must lie in [0, {most:g}]; got {value}")
        if temperature != "fit" and not 0.0 < float(temperature) < math.inf:
            raise ValueError(f"temperature must be > 0, or 'fit'; got {temperature!r}")
        if least_overlap < 1:
            raise ValueError(f"least_overlap must be >= 1; got {least_overlap}")
        for name, value in (("ai_weight", ai_weight), ("people_weight", people_weight)):
            if not 0.0 <= value < math.inf:
                raise ValueError(f"{name} must be >= 0; got {value}")
        check_plugin("MixedLabeler.ai", ai, AbstractLabeler)
        check_plugin("MixedLabeler.people", people, AbstractLabeler)
        self.ai, self.people, self.route = ai, people, route
        self.unsure, self.share, self.audit = unsure, share, audit
        self.temperature, self.least_overlap = temperature, least_overlap
        self.ai_weight, self.people_weight = ai_weight, people_weight
        self.max_lag = people.max_lag
        self._in_force = 1.0 if temperature == "fit" else float(temperature)

    def recall(self, memory: Memory) -> None:
        """Fit the temperature to the pairs of closed rounds that both labelers judged, if it is to be fitted."""
        self.people.recall(memory)
        if self.temperature == "fit":
            pairs = judged_pairs(memory.overlap)
            self._in_force = temperature_of(pairs) if len(pairs) >= self.least_overlap else 1.0

    def label(self, comparisons: Sequence[Comparison], key: Key) -> list[Label]:
        """Label comparisons outside of a ledger.

        Raises:
            Waiting: if people have not answered yet, with ``wait=exit``.
        """
        answers = self._first_answers(comparisons, key)
        routed = [place for place, answer in enumerate(answers) if answer.label.status == ROUTED]
        labels = [answer.label for answer in answers]
        asked = [comparisons[place] for place in routed]
        given = returned(
            self.people, "label", self.people.label(asked, key.fold(SECOND)), len(asked), Label, "comparisons"
        )
        for place, label in zip(routed, given, strict=True):
            # the price of both
            second = self._second(Answer(label), labels[place]).label
            labels[place] = replace(second, cost=second.cost + labels[place].cost)
        return labels

    def stream(self, questions: Sequence[Question], answered: int, key: Key) -> Iterator[list[tuple[int, Answer]]]:
        """Label the sure pairs, note the first verdict on the others, then ask the second labeler about those."""
        # a pair that was routed before a restart, or in an earlier round, stays so
        verdicts = {place: _routed(question) for place, question in enumerate(questions)}
        first: dict[int, Label] = {place: label for place, label in verdicts.items() if label is not None}
        fresh = [place for place in verdicts if place not in first]
        size = max(len(fresh), 1) if self.route == "share" else CHUNK
        for start in range(0, len(fresh), size):
            part = fresh[start : start + size]
            answers = self._first_answers([questions[place].comparison for place in part], key)
            # in one batch, which the ledger keeps whole: a restart finds a round routed, or not begun
            yield list(zip(part, answers, strict=True))
            for place, answer in zip(part, answers, strict=True):
                if answer.label.status == ROUTED:
                    first[place] = answer.label
                else:
                    answered += not questions[place].is_late
        places = sorted(first)
        asked = [
            replace(questions[place], priority=_priority(first[place]), suggestion=_suggestion(first[place]))
            for place in places
        ]
        for given in self._people(asked, answered, key.fold(SECOND)):
            yield [(places[number], self._second(answer, first[places[number]])) for number, answer in given]

    def _people(self, questions: Sequence[Question], answered: int, key: Key) -> Iterator[list[tuple[int, Answer]]]:
        if self.people.whole_rounds:
            if questions:
                yield from self.people.stream(questions, answered, key)
            return
        for start in range(0, len(questions), CHUNK):
            preemption.check()
            part = [question.comparison for question in questions[start : start + CHUNK]]
            made = self.people.label(part, key)
            labels = returned(self.people, "label", made, len(part), Label, "comparisons")
            yield [(start + number, Answer(label)) for number, label in enumerate(labels)]

    def _first_answers(self, comparisons: Sequence[Comparison], key: Key) -> list[Answer]:
        """The first labeler's answers: labels where it is sure, and routed ones."""
        labels: list[Label] = []
        for start in range(0, len(comparisons), CHUNK):
            preemption.check()
            part = list(comparisons[start : start + CHUNK])
            made = self.ai.label(part, key.fold(FIRST))
            labels += returned(self.ai, "label", made, len(part), Label, "comparisons")
        calibrated = [None if x.probability is None else self._calibrated(x.probability) for x in labels]
        reasons = self._reasons(labels, calibrated)
        answers = []
        for comparison, label, probability, reason in zip(comparisons, labels, calibrated, reasons, strict=True):
            propensity = 1.0
            if not reason and self.audit > 0:
                propensity = self.audit
                # by the content of the pair, so that neither batching nor a restart can change it
                chosen = comparison_key(key.fold(AUDIT), comparison).uniforms(1).item() < self.audit
                reason = "audit" if chosen else ""
            answers.append(Answer(self._first(label, probability, reason, propensity)))
        return answers

    def _calibrated(self, probability: float) -> float:
        return tempered(torch.tensor(probability, dtype=torch.float64), self._in_force).item()

    def _reasons(self, labels: Sequence[Label], calibrated: Sequence[float | None]) -> list[str]:
        """Why a pair goes to the second labeler; empty where the first one is sure."""
        reasons = ["failed" if label.probability is None else "" for label in labels]
        known = [place for place, probability in enumerate(calibrated) if probability is not None]
        margins = {place: abs((calibrated[place] or 0.0) - 0.5) for place in known}
        if self.route == "share":
            # the least sure share of all pairs, those without a verdict included
            most = round(self.share * len(labels)) - (len(labels) - len(known))
            for place in sorted(known, key=lambda place: (margins[place], place))[: max(most, 0)]:
                reasons[place] = "unsure"
        for place in known:
            if self.route == "margin" and margins[place] < self.unsure:
                reasons[place] = "unsure"
            if self.route == "disagree" and _contradicts(labels[place]):
                reasons[place] = "disagree"
        return reasons

    def _first(self, label: Label, probability: float | None, reason: str, propensity: float) -> Label:
        meta: dict[str, float | int | str] = {**label.meta, "source": "ai"}
        if self._in_force != 1.0:
            meta["temperature"] = self._in_force
        if not reason:
            return _weighed(replace(label, probability=probability, meta=meta), self.ai_weight)
        meta |= {"routed": reason, "propensity": propensity}
        # the probability itself, to which temperatures are fitted
        if label.probability is None:
            meta["ai_status"] = label.status
        else:
            meta["ai_probability"] = label.probability
        return Label(None, ROUTED, label.cost, meta)

    def _second(self, answer: Answer, first: Label) -> Answer:
        label = answer.label
        meta: dict[str, float | int | str] = {**label.meta, "source": label.meta.get("source", "people")}
        for name in ("routed", "propensity", "ai_probability"):
            if name in first.meta:
                meta[name] = first.meta[name]
        return replace(answer, label=_weighed(replace(label, meta=meta), self.people_weight))


def _weighed(label: Label, factor: float) -> Label:
    """A label with a factor on the weight of its pair."""
    if factor == 1.0 or label.probability is None:
        return label
    return replace(label, meta={**label.meta, PAIR_WEIGHT: label.weight * factor})


def _routed(question: Question) -> Label | None:
    """The newest first verdict on a pair that waits for a second one."""
    found = [label for label in question.earlier if label.status == ROUTED]
    return found[-1] if found else None


def _contradicts(label: Label) -> bool:
    """Whether the two orders of a judge name different responses.

    Raises:
        ValueError: if the labeler has not judged in both orders.
    """
    forward, reverse = label.meta.get("first_forward"), label.meta.get("first_reverse")
    if forward is None or reverse is None:
        raise ValueError(
            "route=disagree compares the two orders in which an LLM judge sees a pair, and the labels of "
            "data.labeler.ai have no first_forward and first_reverse: take LLMLabeler or ServerLabeler, or route=margin"
        )
    # "the first" in both orders names a in one and b in the other; P = 1/2 names none
    return bool((forward - 0.5) * (reverse - 0.5) >= 0)


def _suggestion(first: Label) -> float | None:
    """P(a preferred) of the first labeler on a pair that the second one is asked about."""
    found = first.meta.get("ai_probability")
    return None if found is None else float(found)


def _priority(first: Label) -> float:
    """Larger for pairs that people should see sooner: audited ones, then those that the first labeler knew least of."""
    if first.meta["routed"] == "audit":
        return 2.0
    return 1.0 - abs(2.0 * float(first.meta.get("ai_probability", 0.5)) - 1.0)
