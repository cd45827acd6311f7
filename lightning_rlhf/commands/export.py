"""A ledger as rows that other trainers read, such as TRL's ``DPOTrainer`` and ``SFTTrainer``.

Every labeled comparison becomes one row ``prompt``, ``chosen``, ``rejected``, and every rollout one row ``prompt``,
``completion``, in JSONL or Parquet, that ``datasets.load_dataset`` opens. How sure the label was, and where the row
came from, are further columns.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_rlhf.annotation.tools import Tool
from lightning_rlhf.commands.votes import helpsteer_rows, tool_rows, vote_rows
from lightning_rlhf.labelers.recorded import recorded_probability
from lightning_rlhf.ledger.recorded import check_holds_pairs
from lightning_rlhf.ledger.rollouts import RolloutTable
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.types import Comparison, Message, Preference, Prompt, Rollout


Format = Literal["auto", "jsonl", "parquet"]
Rows = Literal["auto", "plain", "conversational"]
Content = Literal["rows", "votes", "helpsteer", "argilla", "potato"]
Row = dict[str, Any]

_TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_TYPES = {
    "probability": pa.float64(),
    "weight": pa.float64(),
    "passes": pa.float64(),
    "delta": pa.float64(),
    "reward": pa.float64(),
    "reward_std": pa.float64(),
    "reward_chosen": pa.float64(),
    "reward_rejected": pa.float64(),
    "recorded_probability": pa.float64(),
    "votes": pa.int64(),
    "agreement": pa.float64(),
    "strength": pa.float64(),
    "round": pa.int64(),
    "position": pa.int64(),
    "prompt_index": pa.int64(),
}
_ROW_GROUP = 1024  # rows in memory at once


def export_ledger(
    ledger: str,
    out: str,
    format: Format = "auto",
    rows: Rows = "auto",
    best: bool = False,
    content: Content = "rows",
    unlabeled: bool = False,
) -> int:
    """Write the labeled comparisons of a ledger as preference rows, or its rollouts, and return how many there are.

    The chosen response is the more probable one; the first of two equally probable ones. Columns are ``prompt``,
    ``chosen``, ``rejected``, ``probability`` (that chosen is preferred, in [0.5, 1]), ``weight``, ``round``,
    ``branch``, ``prompt_index``; ``finish_reason_chosen`` and ``finish_reason_rejected``, "length" where a token limit
    cut the response off; ``reward_chosen`` and ``reward_rejected`` if the labeler noted ``reward_a`` and
    ``reward_b``; ``recorded_probability``, that chosen is preferred by the data, if the pairs are recorded ones; and
    ``tools`` and ``chat_template_kwargs`` of conversational rows that have them, as JSON; and ``source``, ``votes``,
    ``agreement`` and ``strength`` (mean, 3 where chosen is much better) if people or several labelers gave labels.
    Labeled single responses have ``completion``, ``label`` (true or false), ``probability`` and ``finish_reason`` in
    place of the columns of pairs.

    Of a ledger with rollouts, the columns are ``prompt``, ``completion``, ``reward`` and ``reward_std`` (null where
    they are not known), ``finish_reason``, ``round`` and ``prompt_index``. The file appears when it is complete, in
    place of one of the same name. The run may go on meanwhile.

    Args:
        ledger: path of the ledger of a run.
        out: file to write, ``.jsonl`` or ``.parquet``.
        format: format of the file; ``auto`` goes by its suffix.
        rows: ``plain`` writes texts, prompts as rendered with the chat template; ``conversational`` writes lists of
            messages, to which the other trainer applies its own template; ``auto`` writes messages if every prompt has
            them.
        best: of rollouts, only the most rewarded one of each prompt and round.
        content: ``rows`` as above; ``votes`` of people, for `import_votes`; labeled pairs in the form of
            ``helpsteer``; or all pairs for people to judge in ``argilla`` (a list, .json) or ``potato``. All but rows
            are JSON.
        unlabeled: of the pairs for Argilla and potato, only those without a label.

    Raises:
        ValueError: if nothing is labeled yet, the format cannot be told, or a prompt without messages is to be written
            as conversational.
    """
    target, kind = check_target(ledger, out, format)
    # a snapshot: the run may add rows between the two passes
    with PreferenceStore(ledger, read_only=True) as store, store.snapshot():
        check_holds_pairs(store)
        if content != "rows":
            if kind != "jsonl":
                raise ValueError(f"content={content} is written as JSON lines; name {out} .jsonl")
            if content in ("argilla", "potato"):
                return _write_pairs(store, content, unlabeled, target)
            return _write(vote_rows(store) if content == "votes" else helpsteer_rows(store), target, kind)
        any_has_source = False
        count, all_have_messages, any_has_rewards, any_is_recorded, any_has_options = 0, True, False, False, False
        for preference in store.preferences():
            # columns that no row needs are left out, so a first pass looks at all rows
            count += 1
            all_have_messages &= preference.comparison.prompt.messages is not None
            any_has_rewards |= "reward_a" in preference.label.meta
            any_has_source |= "source" in preference.label.meta
            any_is_recorded |= _recorded(preference.comparison) is not None
            any_has_options |= bool(preference.comparison.prompt.template_options)
        if not count and (rollouts := _groups(store)):
            return _write_rollouts(rollouts, target, kind, rows, best)
        if not count:
            raise ValueError(f"ledger {ledger} holds no labeled comparison yet; export it when it has labels")
        conversational = rows == "conversational" or (rows == "auto" and all_have_messages)
        written: Iterable[Row] = (
            preference_row(p, conversational, any_has_rewards, any_is_recorded)
            | (_source_columns(p) if any_has_source else {})
            | (_template_columns(p.comparison.prompt) if any_has_options and conversational else {})
            for p in store.preferences()
        )
        return _write(written, target, kind)


def export_comparisons(ledger: str, out: str, format: Format = "auto") -> int:
    """Write all comparisons of a ledger, labeled or not, and return how many there are.

    Columns are ``prompt`` (as rendered), the responses ``a`` and ``b``, the distributions ``source_a`` and ``source_b``
    they were sampled from, ``finish_reason_a`` and ``finish_reason_b``, ``branch``, ``weight``, ``passes``, ``delta``
    (implicit reward of a minus that of b; null where the sampler did not compute it), ``round``, ``position`` and
    ``prompt_index``. Rollouts are written as `export_ledger` writes them.

    Args:
        ledger: path of the ledger of a run.
        out: file to write, ``.jsonl`` or ``.parquet``.
        format: format of the file; ``auto`` goes by its suffix.

    Raises:
        ValueError: if the ledger is empty or the format cannot be told.
    """
    target, kind = check_target(ledger, out, format)
    with PreferenceStore(ledger, read_only=True) as store, store.snapshot():
        check_holds_pairs(store)
        found = next(store.walk(), None)
        if found is None and (rollouts := _groups(store)):
            return _write_rollouts(rollouts, target, kind, "auto", False)
        if found is None:
            raise ValueError(f"ledger {ledger} holds no comparison yet; sample some first")
        return _write((comparison_row(*row[:3]) for row in store.walk()), target, kind)


def preference_row(preference: Preference, conversational: bool, rewards: bool = False, recorded: bool = False) -> Row:
    """The row of a preference, with the more probable response as ``chosen``.

    Args:
        preference: the preference.
        conversational: write messages, not texts.
        rewards: add the rewards that the labeler noted, null where it did not.
        recorded: add P(chosen preferred) by the data, null where they do not say.
    """
    comparison, label, probability = preference.comparison, preference.label, preference.probability
    if comparison.is_single:
        return unpaired_row(preference, conversational, rewards)
    chosen, rejected, sides = comparison.a, comparison.b, ("reward_a", "reward_b")
    human = _recorded(comparison)
    # the more probable response is the chosen one; everything about the two sides changes places
    if probability < 0.5:
        human = None if human is None else 1.0 - human
        chosen, rejected, sides, probability = rejected, chosen, sides[::-1], 1.0 - probability
    row: Row = {"prompt": comparison.prompt.text, "chosen": chosen.text, "rejected": rejected.text}
    if conversational:
        row = {
            "prompt": _messages(comparison.prompt),
            "chosen": [{"role": "assistant", "content": chosen.text}],
            "rejected": [{"role": "assistant", "content": rejected.text}],
        }
    row |= {
        "probability": probability,
        "weight": preference.weight,
        "round": preference.round,
        "branch": comparison.branch,
        "prompt_index": comparison.prompt.index,
        "finish_reason_chosen": chosen.finish_reason,
        "finish_reason_rejected": rejected.finish_reason,
    }
    if rewards:
        row |= {"reward_chosen": label.meta.get(sides[0]), "reward_rejected": label.meta.get(sides[1])}
    if recorded:
        row["recorded_probability"] = human
    return row


def unpaired_row(preference: Preference, conversational: bool, rewards: bool = False) -> Row:
    """The row of a labeled single response, as `DatasetUnpaired` and TRL read it; arguments as in `preference_row`."""
    comparison, text = preference.comparison, preference.comparison.a.text
    row: Row = {
        "prompt": _messages(comparison.prompt) if conversational else comparison.prompt.text,
        "completion": [{"role": "assistant", "content": text}] if conversational else text,
        "label": preference.probability >= 0.5,
        "probability": preference.probability,
        "weight": preference.weight,
        "round": preference.round,
        "branch": comparison.branch,
        "prompt_index": comparison.prompt.index,
        "finish_reason": comparison.a.finish_reason,
    }
    return row | ({"reward": preference.label.meta.get("reward_a")} if rewards else {})


def _source_columns(preference: Preference) -> Row:
    """Who gave the label, and how far people agreed; null where it is not known."""
    meta = preference.label.meta
    strength = meta.get("strength")
    if strength is not None and preference.probability < 0.5:
        strength = -strength
    return {
        "source": meta.get("source"),
        "votes": meta.get("votes"),
        "agreement": meta.get("agreement"),
        "strength": strength,
    }


def _recorded(comparison: Comparison) -> float | None:
    """P(a preferred) by the data; None where they do not say, or say so of other responses."""
    # newly sampled responses are not those that the data compare
    known = comparison.prompt.recorded is not None and "recorded_first" in comparison.meta
    return recorded_probability(comparison) if known else None


def comparison_row(round: int, position: int, comparison: Comparison) -> Row:
    """The row of a comparison, labeled or not."""
    return {
        "prompt": comparison.prompt.text,
        "a": comparison.a.text,
        "b": comparison.b.text,
        "source_a": comparison.a.source,
        "source_b": comparison.b.source,
        "finish_reason_a": comparison.a.finish_reason,
        "finish_reason_b": comparison.b.finish_reason,
        "branch": comparison.branch,
        "weight": comparison.weight,
        "passes": comparison.passes,
        "delta": comparison.meta.get("delta"),
        "round": round,
        "position": position,
        "prompt_index": comparison.prompt.index,
    }


def rollout_row(rollout: Rollout, round: int, conversational: bool) -> Row:
    """The row of a rollout, scored or not."""
    text = rollout.response.text
    return {
        "prompt": _messages(rollout.prompt) if conversational else rollout.prompt.text,
        "completion": [{"role": "assistant", "content": text}] if conversational else text,
        "reward": rollout.reward,
        "reward_std": rollout.std,
        "finish_reason": rollout.response.finish_reason,
        "round": round,
        "prompt_index": rollout.prompt.index,
    }


def _groups(store: PreferenceStore) -> list[tuple[int, list[Rollout]]]:
    """Rounds with the rollouts of each prompt, in order."""
    table = RolloutTable(store)
    groups = []
    for round in table.rounds():
        for _, same in groupby(table.rollouts(round), key=lambda row: row[1]):
            groups.append((round, [rollout for _, _, rollout, *_ in same]))
    return groups


def _write_rollouts(groups: list[tuple[int, list[Rollout]]], target: Path, kind: Format, rows: Rows, best: bool) -> int:
    if best:
        groups = [(round, top) for round, rollouts in groups if (top := _best(rollouts))]
        # not an empty file, which would look like a run without answers
        if not groups:
            raise ValueError("no rollout has a reward yet, so none is the best; leave best out")
    rows_of = [(round, rollout) for round, rollouts in groups for rollout in rollouts]
    all_have_messages = all(rollout.prompt.messages is not None for _, rollout in rows_of)
    conversational = rows == "conversational" or (rows == "auto" and all_have_messages)
    any_has_options = any(rollout.prompt.template_options for _, rollout in rows_of)
    # the columns are those of every row: Parquet has one schema
    written = (
        rollout_row(rollout, round, conversational)
        | (_template_columns(rollout.prompt) if any_has_options and conversational else {})
        for round, rollout in rows_of
    )
    return _write(written, target, kind)


def _best(rollouts: list[Rollout]) -> list[Rollout]:
    """The most rewarded rollout, as a list; empty if none is scored."""
    scored = [rollout for rollout in rollouts if rollout.reward is not None]
    # `or 0.0` is for mypy: every rollout in `scored` has a reward
    return [max(scored, key=lambda rollout: rollout.reward or 0.0)] if scored else []


def _template_columns(prompt: Prompt) -> Row:
    """Further arguments of the chat template, as the columns that `DatasetPrompts` reads; JSON in strings."""
    options = dict(prompt.template_options)
    tools = options.pop("tools", None)
    return {
        "tools": None if tools is None else json.dumps(tools, ensure_ascii=False),
        "chat_template_kwargs": json.dumps(options, ensure_ascii=False) if options else None,
    }


def _messages(prompt: Prompt) -> list[Message]:
    if prompt.messages is None:
        raise ValueError(
            f"prompt {prompt.index} is a text, not a conversation, so it has no conversational row; pass rows=plain"
        )
    return list(prompt.messages)


def check_target(ledger: str, out: str, format: Format = "auto") -> tuple[Path, Format]:
    """Check where rows are to be written, and tell the format.

    Raises:
        ValueError: if the format cannot be told, or the file is the ledger.
        IsADirectoryError: if it is a folder.
    """
    target = Path(out)
    if format == "auto":
        suffixes: dict[str, Format] = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
        if target.suffix not in suffixes:
            raise ValueError(f"cannot tell the format of {out} by its suffix; name it .jsonl or .parquet")
        format = suffixes[target.suffix]
    # fails now, not at the end of a long run
    if target.is_dir():
        raise IsADirectoryError(f"{out} is a folder; pass the name of a file")
    # renaming over the ledger would destroy the run
    if target.exists() and Path(ledger).exists() and target.samefile(ledger):
        raise ValueError(f"{out} is the ledger itself; pass another file to write to")
    return target, format


def _write_pairs(store: PreferenceStore, tool: Tool, unlabeled: bool, target: Path) -> int:
    """Write pairs for an annotation tool."""
    if (tool == "argilla") != (target.suffix == ".json"):
        raise ValueError(f"Argilla reads a list, and potato JSON lines: name {target} .json or .jsonl accordingly")
    count = _write(tool_rows(store, tool, unlabeled), target, "json" if tool == "argilla" else "jsonl")
    if not count:
        which = "pair without a label" if unlabeled else "pair"
        raise ValueError(f"ledger of run {store.run_id} holds no {which}, so {target} is empty; sample some first")
    return count


def _write(rows: Iterable[Row], target: Path, kind: Format | Literal["json"]) -> int:
    """Write rows to a file that appears only when it is complete; returns their number."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # readers never see a half-written file
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        count = {"jsonl": _write_jsonl, "json": _write_list}.get(kind, _write_parquet)(rows, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # else a power loss after the rename may leave an empty file
        partial.replace(target)
    finally:
        # after an error; a complete file has its final name by then
        partial.unlink(missing_ok=True)
    return count


def _write_jsonl(rows: Iterable[Row], path: Path) -> int:
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _write_list(rows: Iterable[Row], path: Path) -> int:
    """Write one list of JSON, a row per line."""
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(("[\n" if count == 0 else ",\n") + json.dumps(row, ensure_ascii=False))
            count += 1
        file.write("\n]\n" if count else "[]\n")
    return count


def _check_turns(rows: list[Row]) -> None:
    """Check that Parquet has a column for every field of the turns."""
    for row in rows:
        for name, value in row.items():
            # fields of all turns of a conversation
            keys = set().union(*value) if isinstance(value, list) else set()
            # tool calls, for example, would be lost without a word
            if more := keys - {"role", "content"}:
                raise ValueError(
                    f"messages in {name!r} of prompt {row['prompt_index']} hold {sorted(more)}, for which a Parquet "
                    f"file of rows has no place; write .jsonl"
                )


def _write_parquet(rows: Iterable[Row], path: Path) -> int:
    rows = iter(rows)
    # the first rows tell the columns
    group = list(islice(rows, _ROW_GROUP))
    # types by name, not by value: the first value of a column may be null
    schema = pa.schema(
        [(name, _TURNS if isinstance(v, list) else _TYPES.get(name, pa.string())) for name, v in group[0].items()]
    )
    count = 0
    with pq.ParquetWriter(path, schema) as writer:
        while group:
            _check_turns(group)
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            count += len(group)
            group = list(islice(rows, _ROW_GROUP))
    return count
