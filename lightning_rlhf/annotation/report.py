"""The report of a study: how far people agree, how each one works, and their votes as a file."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import cast

from lightning_rlhf.annotation.agreement import (
    alpha_interval,
    fleiss_kappa,
    krippendorff_alpha,
    one_coin_accuracies,
    pairwise_agreement,
)
from lightning_rlhf.annotation.intervals import two_sided_binomial_p, wilson_interval
from lightning_rlhf.annotation.store import AnnotationStore, KeptVote
from lightning_rlhf.annotation.votes import JSON


FAST, SURE, ALMOST_ALWAYS = 15.0, 1e-3, 0.9
"""Words per second, p-value of the first position, and share of one verdict, beyond which a note is made."""
LEAST_VOTES = 20
"""Votes below which no note is made."""


def report(store: AnnotationStore) -> JSON:
    """Agreement of a study and the statistics of its people, as JSON; None stands for what is undefined."""
    kept = store.votes()
    pairs = [each for each in kept if each.kind == "pair" and each.vote.verdict != "skip"]
    by_pair: defaultdict[tuple[str, str], list[KeptVote]] = defaultdict(list)
    for each in pairs:
        by_pair[each.queue, each.key].append(each)
    units, sides = [], []
    for votes in by_pair.values():
        values = [cast(int, each.vote.signed) for each in votes]
        units.append(values)
        sides.append([(value > 0) - (value < 0) for value in values])
    whole: JSON = {
        "queues": {name: vars(store.queues.progress(name)) for name in store.queues.names() if name != "gold"},
        "votes": len(pairs),
        "pairs": len(by_pair),
        "pairs_with_several_votes": sum(len(values) > 1 for values in units),
        **_agreement(sides, units),
        "accuracies": _accuracies(kept),
        "both_bad": sorted({each.key for each in pairs if each.vote.verdict == "both_bad"}),
        "skipped": sorted({each.key for each in kept if each.kind == "pair" and each.vote.verdict == "skip"}),
        "people": _people(store, kept, by_pair),
    }
    return cast(JSON, _finite(whole))


def _agreement(sides: Sequence[Sequence[int]], units: Sequence[Sequence[int]]) -> JSON:
    with_ties, all_votes = pairwise_agreement(sides)
    equal, decided = pairwise_agreement([list(filter(None, values)) for values in sides])
    by_size: defaultdict[int, list[Sequence[int]]] = defaultdict(list)
    for values in sides:
        by_size[len(values)].append(values)
    kappa = {str(size): fleiss_kappa(by_size[size]) for size in sorted(by_size) if size > 1}
    return {
        "agreement": {"share": _share(equal, decided), "interval": wilson_interval(equal, decided), "count": decided},
        "agreement_with_ties": {
            "share": _share(with_ties, all_votes),
            "interval": wilson_interval(with_ties, all_votes),
            "count": all_votes,
        },
        "alpha_nominal": {"value": krippendorff_alpha(sides), "interval": alpha_interval(sides)},
        "alpha_ordinal": {"value": krippendorff_alpha(units, "ordinal"), "interval": alpha_interval(units, "ordinal")},
        "fleiss_kappa": kappa,
    }


def _accuracies(kept: Sequence[KeptVote]) -> JSON:
    """Accuracy of each person by EM over all pairs, gold questions as known ones."""
    votes, known = [], {}
    for each in kept:
        unit = (each.queue, each.key)
        if each.vote.value is not None and each.kind != "repeat":
            votes.append((unit, each.vote.annotator, each.vote.value))
        if each.gold is not None:
            known[unit] = float(each.gold == "a")
    return {str(name): value for name, value in one_coin_accuracies(votes, known)[1].items()}


def _people(
    store: AnnotationStore, kept: Sequence[KeptVote], by_pair: dict[tuple[str, str], list[KeptVote]]
) -> dict[str, JSON]:
    words = store.lengths()
    own: defaultdict[str, list[KeptVote]] = defaultdict(list)
    for each in kept:
        own[each.vote.annotator].append(each)
    return {name: person_statistics(votes, by_pair, words) for name, votes in sorted(own.items())}


def person_statistics(
    kept: Sequence[KeptVote],
    by_pair: dict[tuple[str, str], list[KeptVote]],
    words: dict[tuple[str, str], tuple[int, int]],
) -> JSON:
    """How one person works. Notes inform, and drop no vote.

    Args:
        kept: standing votes of the person, oldest first.
        by_pair: standing votes of all people on pairs, without skips, by queue and key.
        words: words of both responses, by queue and key.
    """
    pairs = [each for each in kept if each.kind == "pair"]
    judged = [each for each in pairs if each.vote.verdict != "skip"]
    decided = [each for each in judged if each.vote.verdict in ("a", "b")]
    first = sum(each.vote.verdict == each.vote.first for each in decided)
    lengths = [(each, words[each.queue, each.key]) for each in decided]
    uneven = [(each, a, b) for each, (a, b) in lengths if a != b]
    longer = sum((each.vote.verdict == "a") == (a > b) for each, a, b in uneven)
    seconds = sorted(each.vote.seconds for each in judged)
    speeds = [sum(words[e.queue, e.key]) / e.vote.seconds for e in judged if e.vote.seconds > 0]
    gold = [each for each in kept if each.kind == "gold" and each.vote.verdict != "skip"]
    right = sum(each.vote.verdict == each.gold for each in gold)
    agreed = [_with_others(each, by_pair) for each in decided]
    known = [value for value in agreed if value is not None]
    third = max(len(known) // 3, 1)
    same, repeats = _repeats(kept)
    verdicts = Counter(each.vote.verdict for each in pairs)
    result: JSON = {
        "votes": len(judged),
        "per_hour": 3600 * len(judged) / sum(seconds) if sum(seconds) else math.nan,
        "seconds_median": median(seconds) if seconds else math.nan,
        "seconds_5_percent": seconds[len(seconds) // 20] if seconds else math.nan,
        "words_per_second": median(speeds) if speeds else math.nan,
        "first_share": _share(first, len(decided)),
        "first_p": two_sided_binomial_p(first, len(decided)),
        "longer_share": _share(longer, len(uneven)),
        "tie_share": _share(verdicts["tie"], len(pairs)),
        "both_bad_share": _share(verdicts["both_bad"], len(pairs)),
        "skip_share": _share(verdicts["skip"], len(pairs)),
        "gold": {"right": right, "count": len(gold), "interval": wilson_interval(right, len(gold))},
        "agreement": {"share": _share(sum(known), len(known)), "count": len(known)},
        "agreement_first_third": _share(sum(known[:third]), len(known[:third])),
        "agreement_last_third": _share(sum(known[-third:]), len(known[-third:])),
        "self_consistency": {"same": same, "count": repeats},
    }
    result["notes"] = _notes(result, judged)
    return result


def _with_others(each: KeptVote, by_pair: dict[tuple[str, str], list[KeptVote]]) -> float | None:
    """Whether a vote has the side of the majority of the others; None if they have none."""
    balance = 0
    for vote in by_pair.get((each.queue, each.key), []):
        if vote.vote.annotator != each.vote.annotator:
            balance += {"a": 1, "b": -1}.get(vote.vote.verdict, 0)
    if balance == 0:
        return None
    return float((each.vote.verdict == "a") == (balance > 0))


def _repeats(kept: Sequence[KeptVote]) -> tuple[int, int]:
    """Repeats with the same verdict as the earlier pair, and all repeats."""
    earlier = {each.key: each.vote.verdict for each in kept if each.kind == "pair"}
    repeats = [each for each in kept if each.kind == "repeat" and each.vote.verdict != "skip"]
    pairs = [(earlier.get(each.key.rpartition("/")[2]), each.vote.verdict) for each in repeats]
    return sum(first == second for first, second in pairs), len(pairs)


def _notes(result: JSON, judged: Sequence[KeptVote]) -> list[str]:
    if len(judged) < LEAST_VOTES:
        return []
    notes = []
    if cast(float, result["first_p"]) < SURE:
        notes.append(f"first side {cast(float, result['first_share']):.0%}")
    if cast(float, result["words_per_second"]) > FAST:
        notes.append(f"{cast(float, result['words_per_second']):.0f} words per second")
    for verdict in ("a", "b", "tie", "both_bad"):
        share = sum(each.vote.verdict == verdict for each in judged) / len(judged)
        if share > ALMOST_ALWAYS:
            notes.append(f"{share:.0%} {verdict}")
    return notes


def votes_jsonl(store: AnnotationStore, anonymous: bool = False) -> str:
    """All votes, also corrected and late ones, one object of JSON per line.

    Args:
        store: the store.
        anonymous: leave rationales out, and number people in place of names.
    """
    kept = store.votes(standing=False)
    names = sorted({each.vote.annotator for each in kept})
    numbers = {name: f"person-{n}" for n, name in enumerate(names, 1)}
    lines = []
    for each in kept:
        vote = each.vote
        if anonymous:
            vote = replace(vote, annotator=numbers[vote.annotator], rationale="")
        lines.append(json.dumps({"queue": each.queue, "key": each.key, "kind": each.kind, **vote.to_json()}))
    return "".join(line + "\n" for line in lines)


def admin_rows(store: AnnotationStore, whole: JSON) -> list[JSON]:
    """The people for the admin page, as texts."""
    statistics = cast(dict[str, JSON], whole["people"])
    rows = []
    for person in store.people.all():
        own = statistics.get(person.name, {})
        gold, agreement = cast(JSON, own.get("gold", {})), cast(JSON, own.get("agreement", {}))
        rows.append(
            {
                "person": person,
                "votes": own.get("votes", 0),
                "seconds": _text(own.get("seconds_median"), "{:.0f}"),
                "first": _text(own.get("first_share"), "{:.0%}"),
                "agrees": _text(agreement.get("share"), "{:.0%}"),
                "gold": f"{gold['right']} of {gold['count']}" if gold.get("count") else "",
                "notes": own.get("notes", []),
            }
        )
    return rows


def agreement_rows(whole: JSON) -> list[tuple[str, str]]:
    """Agreement for the admin page and the terminal, as texts."""
    rows = [("Votes", f"{whole['votes']} on {whole['pairs']} pairs")]
    rows.append(("Pairs with several votes", str(whole["pairs_with_several_votes"])))
    for words, name in (("Two people take the same side", "agreement"), ("... ties counted", "agreement_with_ties")):
        entry = cast(JSON, whole[name])
        rows.append((words, _with_interval(entry["share"], entry["interval"], "{:.0%}")))
    for words, name in (("Krippendorff's alpha, sides", "alpha_nominal"), ("... strengths", "alpha_ordinal")):
        entry = cast(JSON, whole[name])
        rows.append((words, _with_interval(entry["value"], entry["interval"], "{:.2f}")))
    return rows


def _with_interval(value: object, interval: object, form: str) -> str:
    low, high = cast(list[float | None], interval)
    if value is None or low is None or high is None:
        return "not known yet"
    return f"{form.format(value)} ({form.format(low)} to {form.format(high)})"


def _text(value: object, form: str) -> str:
    return "" if value is None else form.format(value)


def _share(part: float, count: int) -> float:
    return part / count if count else math.nan


def _finite(value: object) -> object:
    """The value with None in place of NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
