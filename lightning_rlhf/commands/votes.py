"""Votes of a ledger as files: ``votes.jsonl`` in both directions, rows in the form of HelpSteer3, annotation tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypeAlias, cast

from lightning_rlhf.annotation.tools import Tool, pair_name, pair_row, read_answers, vote_of_answer
from lightning_rlhf.annotation.votes import JSON, Vote, vote_of
from lightning_rlhf.labelers.votes import VoteOptions, label_of_votes
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.types import Comparison, Label


Place: TypeAlias = tuple[int, int]
"""Round and position of a comparison."""
VoteFormat = Literal["votes", "argilla", "potato"]
DEFAULT_VOTES = VoteOptions()


def vote_rows(store: PreferenceStore) -> Iterator[JSON]:
    """Rows of ``votes.jsonl``: run, round, position, prompt_index, and every entry of the vote."""
    indices = {(round_, place): pair.prompt.index for round_, place, pair, _ in store.walk()}
    for round_, position, vote in store.votes():
        place: JSON = {"run": store.run_id, "round": round_, "position": position}
        yield {**place, "prompt_index": indices[round_, position], **vote.to_json()}


def tool_rows(store: PreferenceStore, tool: Tool, unlabeled: bool = False) -> Iterator[JSON]:
    """Pairs as an annotation tool shows them, under names by which `import_votes` finds them; without votes.

    Args:
        store: the ledger.
        tool: the tool.
        unlabeled: only pairs without a label.
    """
    for round_, position, comparison, label in store.walk():
        if comparison.is_single or (unlabeled and label is not None):
            continue
        turns = _context(comparison)
        # one question is shown as it is, a conversation with its speakers
        texts = [turn["content"] if len(turns) == 1 else f"{turn['role']}: {turn['content']}" for turn in turns]
        name = pair_name(store.run_id, round_, position)
        yield pair_row(tool, name, "\n\n".join(texts), comparison.a.text, comparison.b.text)


def import_votes(
    ledger: str,
    votes: str,
    options: VoteOptions = DEFAULT_VOTES,
    format: VoteFormat = "votes",
    question: str = "preference",
) -> dict[str, int]:
    """Take votes from a file into the ledger of the same run: of ``lightning-rlhf export --content=votes``, or a tool.

    A pair without a label gets one from its votes. On a pair that has one, votes are kept as late ones, which count in
    statistics only. Votes that the ledger has, by their uid, are left out, so that a file may be imported again.

    Args:
        ledger: path of the ledger; no run may have it open.
        votes: the file, one object of JSON per line; records of Argilla; or potato's folder ``annotation_output``.
        options: how votes become labels.
        format: ``votes``, or the tool that showed the pairs of ``lightning-rlhf export --content=argilla`` or
            ``potato``.
        question: name of the question in Argilla, or of the annotation scheme in potato.

    Returns:
        Numbers of rows ``read``, of ``new`` votes, of ``late`` ones among them, and of new ``labels``.

    Raises:
        ValueError: if a row cannot be read, or belongs to another run or pair; nothing is then imported.
    """
    if not Path(ledger).exists():
        raise ValueError(f"{ledger}: no such ledger; give the ledger.sqlite of a run")
    with PreferenceStore(ledger) as store:
        rows = _read(votes, store) if format == "votes" else _read_tool(format, votes, question, store)
        known = {vote.uid for _, _, vote in store.votes()}
        fresh: dict[Place, list[Vote]] = {}
        for place, vote in rows:
            # a file may hold a vote twice
            if vote.uid not in known:
                known.add(vote.uid)
                fresh.setdefault(place, []).append(vote)
        found = {"read": len(rows), "new": sum(map(len, fresh.values())), "late": 0, "labels": 0}
        stored = {(round_, place): (identity, label) for round_, place, identity, label in _stored(store, fresh)}
        for place, given in fresh.items():
            identity, label = stored[place]
            if label is not None:
                found["late"] += len(given)
                store.add_late_votes(identity, given)
                continue
            made = label_of_votes([vote for vote in given if not vote.late], options)
            # late votes alone give no label
            if any(not vote.late for vote in given):
                store.add_labels([identity], [made], [given])
                found["labels"] += made.status == "ok"
            else:
                found["late"] += len(given)
                store.add_late_votes(identity, given)
    return found


def _read(path: str, store: PreferenceStore) -> list[tuple[Place, Vote]]:
    indices = {(round_, place): pair.prompt.index for round_, place, pair, _ in store.walk()}
    found = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path} row {number}"
        try:
            row = json.loads(line)
            vote = vote_of(row)
            place = int(row["round"]), int(row["position"])
            index, run = int(row["prompt_index"]), str(row["run"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where}: {type(error).__name__}: {error}; write rows as `export` does") from error
        if run != store.run_id:
            raise ValueError(f"{where}: is a vote on a pair of run {run}, and this ledger is of run {store.run_id}")
        if indices.get(place) != index:
            raise ValueError(
                f"{where}: round {place[0]}, position {place[1]} holds prompt {indices.get(place)} here, not {index}"
            )
        found.append((place, vote))
    return found


def _read_tool(tool: Tool, path: str, question: str, store: PreferenceStore) -> list[tuple[Place, Vote]]:
    places = {pair_name(store.run_id, round_, place): (round_, place) for round_, place, _, _ in store.walk()}
    found = []
    for answer in read_answers(tool, path, question):
        if answer.pair not in places:
            raise ValueError(
                f"{answer.where}: pair {answer.pair} is none of run {store.run_id}; import the votes into the ledger "
                f"that exported the pairs"
            )
        found.append((places[answer.pair], vote_of_answer(tool, answer)))
    return found


def _stored(store: PreferenceStore, places: dict[Place, list[Vote]]) -> Iterator[tuple[int, int, int, Label | None]]:
    """Round, position, id and label of the comparisons of some rounds."""
    for round_ in sorted({round_ for round_, _ in places}):
        for position, (identity, _, label) in zip(store.positions(round_), store.comparisons(round_), strict=True):
            yield round_, position, identity, label


def helpsteer_rows(store: PreferenceStore) -> Iterator[JSON]:
    """Labeled pairs in the form of HelpSteer3: negative preferences are for response 1, on a scale of -3 to 3.

    The overall preference is the rounded mean of the votes, or, without votes, 6 (1/2 - p) rounded. Scores of single
    people and their rationales are in ``individual_preference``.
    """
    votes: dict[Place, list[Vote]] = {}
    for round_, position, vote in store.votes():
        if not vote.late:
            votes.setdefault((round_, position), []).append(vote)
    for round_, position, comparison, label in store.walk():
        # the form is about pairs
        if label is None or label.is_free_tie or comparison.is_single:
            continue
        given = votes.get((round_, position), [])
        # signed is 3 where a, which is response 1, is much better
        scores = [-vote.signed for vote in given if vote.signed is not None]
        mean = sum(scores) / len(scores) if scores else 6 * (0.5 - cast(float, label.probability))
        people = [
            {"score": -vote.signed, "reasoning": vote.rationale, "feedback1": "", "feedback2": ""}
            for vote in given
            if vote.signed is not None
        ]
        yield {
            "context": _context(comparison),
            "response1": comparison.a.text,
            "response2": comparison.b.text,
            # half away from zero, so that the side of a small preference is kept
            "overall_preference": int(abs(mean) + 0.5) * (1 if mean > 0 else -1),
            "individual_preference": people,
            "round": round_,
            "position": position,
        }


def _context(comparison: Comparison) -> list[dict[str, str]]:
    turns = comparison.prompt.messages or ({"role": "user", "content": comparison.prompt.text},)
    return [{"role": str(turn["role"]), "content": str(turn.get("content") or "")} for turn in turns]
