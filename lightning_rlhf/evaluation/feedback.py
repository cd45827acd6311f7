"""Where the labels of a ledger come from, what they cost, and how far their sources agree."""

from __future__ import annotations

from typing import TypedDict

from lightning_rlhf.annotation.summary import PeopleSummary, people_line, people_summary
from lightning_rlhf.evaluation.audit import Alignment, alignment, alignment_lines, judged_pairs
from lightning_rlhf.ledger.store import PreferenceStore


class Source(TypedDict):
    """One source of labels.

    Attributes:
        labels: labels that pairs got from it.
        attempts: verdicts that were paid for: labels, failures, and first verdicts of pairs that were routed on.
        cost: their cost.
    """

    labels: int
    attempts: int
    cost: float


class Feedback(TypedDict, total=False):
    """The sources of the labels of a run; entries that do not apply are left out.

    Attributes:
        sources: by name, such as ``ai`` and ``human``.
        alignment: of the first labeler with the second one, where a `MixedLabeler` was at work.
        people: what people did.
    """

    sources: dict[str, Source]
    alignment: Alignment
    people: PeopleSummary


def feedback_summary(store: PreferenceStore) -> Feedback:
    """Summarize the sources of a ledger; empty where labelers name none, and nobody voted."""
    found: Feedback = {}
    sources = store.sources()
    if sources:
        found["sources"] = {
            name: {"labels": labels, "attempts": attempts, "cost": cost}
            for name, (labels, attempts, cost) in sources.items()
        }
    overlap = judged_pairs(store.overlap())
    if overlap:
        found["alignment"] = alignment(overlap)
    votes = store.votes()
    if votes:
        found["people"] = people_summary([((round_, position), vote) for round_, position, vote in votes])
    return found


def feedback_lines(found: Feedback) -> list[str]:
    """A summary as lines for the terminal; none for a single source of labels without votes."""
    lines, sources = [], found.get("sources", {})
    if len(sources) > 1:
        parts = [f"{name} {entry['labels']} labels, cost {entry['cost']:.6g}" for name, entry in sources.items()]
        lines.append("labels by source: " + "; ".join(parts))
    people = found.get("people")
    if people is not None:
        lines.append(people_line(people))
    if "alignment" in found:
        interval = None if people is None else people["agreement_interval"]
        lines += alignment_lines(found["alignment"], None if interval is None else interval[0])
    return lines
