"""Whether a ledger holds the rounds of the run that is about to read them: the same settings, on the same rows.

Rows count by their content, not by the path of their file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_rlhf.ledger.rollouts import RolloutTable
from lightning_rlhf.ledger.row_digest import SHORT, RowDigest, digest_of_columns, digest_of_rows
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.renamed import renamed_settings
from lightning_rlhf.runtime.fingerprint import (
    FREE_OF_MODELS,
    Settings,
    comparable,
    differences,
    with_contents,
    without,
    without_new_defaults,
)
from lightning_rlhf.types import Prompt


ROWS, HELDOUT_ROWS, CODE, COLUMNS = "training_rows", "heldout_rows", "code", "columns"
"""Keys under which a ledger stores digests of the rows, and of the code of a user's own classes."""
_OBJECTS = {"labeler", "reward"}


def row_differences(then: RowDigest, now: RowDigest, prompts: Sequence[Prompt], source: str, where: str) -> list[str]:
    """A line that says how the rows differ from earlier ones; none if they are the same.

    Args:
        then: digest of the earlier rows.
        now: digest of these rows.
        prompts: these rows.
        source: description of the rows and their origin.
        where: location of the earlier digest, in words.
    """
    if (then["count"], then["digest"]) == (now["count"], now["digest"]):
        return []
    line = f"  {source}: other rows; {then['count']} {where}, {now['count']} now"
    if "each" in then and "each" in now:
        old, new = _short_digests(then["each"]), _short_digests(now["each"])
        # only the rows that both have; appended rows are named below
        changed = [i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b]
        if changed:
            line += f", {len(changed)} changed in place, first {_named(prompts[changed[0]], changed[0])}"
        elif len(new) > len(old):
            line += f", new from {_named(prompts[len(old)], len(old))} on"
    return [line]


def _short_digests(each: str) -> list[str]:
    size = 2 * SHORT  # hexadecimal digits
    return [each[start : start + size] for start in range(0, len(each), size)]


def _named(prompt: Prompt, place: int) -> str:
    return f"prompt {place + 1} ({prompt.text[-60:]!r})"


def check_same_run(
    store: PreferenceStore,
    settings: Mapping[str, object],
    prompts: Sequence[Prompt],
    source: str,
    restores_weights: bool = False,
) -> None:
    """Store the fingerprint of a run in its ledger, after a check that the rounds in the ledger are of the same run.

    An empty ledger takes any run. A ledger of a version that stored no digest of the rows is compared by the prompts of
    its comparisons and rollouts.

    Args:
        store: the ledger, open for writing.
        settings: result of `lightning_rlhf.runtime.fingerprint.decisive`, and the seed.
        prompts: the training rows.
        source: description of the rows and their origin, for messages.
        restores_weights: whether weights come from a checkpoint, so that those of models in memory do not matter.

    Raises:
        ValueError: naming every setting that differs, with both values, and the first row.
    """
    # as it reads back from the ledger: JSON turns tuples into lists, and keys into strings
    now: Settings = json.loads(json.dumps(dict(settings)))
    rows = digest_of_rows(prompts)
    stored = store.fingerprint()
    stored_rows: RowDigest | None = store.value(ROWS)
    if store.has_samples():
        old = comparable(stored or {})
        # a run from Python has no seed_everything; one of an earlier version stored the seed alone
        known_to_both = old.keys() & now.keys()
        new = {name: value for name, value in now.items() if name in known_to_both}
        old = {name: value for name, value in old.items() if name in known_to_both}
        new, added = without_new_defaults(old, new)
        if store.num_labels == RolloutTable(store).count_scores() == 0:
            # no response has a label or score yet: another labeler may give them, e.g. if the first one never answered
            old, new = without_arguments(old, "labeler", "reward"), without_arguments(new, "labeler", "reward")
        if stored_rows is not None:
            lines = row_differences(stored_rows, rows, prompts, source, "in the ledger")
            # the rows themselves were compared: their file may have moved
            old, new = without_arguments(old, "prompts"), without_arguments(new, "prompts")
        else:
            lines = prompt_differences(store, prompts, source)
        lines = [*differences(old, new, "in the ledger"), *lines]
        if restores_weights:
            # the checkpoint replaces weights of models in memory before they are used
            lines = [line for line in lines if ".weights: " not in line]
        if lines:
            raise ValueError(
                f"the settings differ from those that the run in {store.path} was started with:\n"
                + "\n".join(lines)
                + "\nIts rounds are those of another run. Go back to the old settings and rows; or use another run "
                "folder (--run_dir, or in Python Trainer(default_root_dir=...), or the argument ledger of the "
                f"DataModule); or delete {store.path} to start over."
            )
        if added:
            rank_zero_info(f"settings that the run in {store.path} did not know are at their defaults: {added}")
    store.set_values({"fingerprint": now, ROWS: rows})


def check_same_settings(store: PreferenceStore, settings: Mapping[str, object], free: set[str]) -> None:
    """As `check_same_run`, for commands that compare their rows themselves.

    Args:
        store: the ledger, open for writing.
        settings: settings that a continued run must share with it, plain JSON.
        free: settings that may change.

    Raises:
        ValueError: naming every setting that differs, with both values.
    """
    # as it reads back from the ledger, see `check_same_run`
    now: Settings = json.loads(json.dumps(with_contents(dict(settings))))
    stored = store.fingerprint()
    if stored is not None:
        stored = renamed_settings(stored, str(now.get("command")))
        old, new = without(stored, free | FREE_OF_MODELS), without(now, free | FREE_OF_MODELS)
        # an earlier version did not store these for a run from Python
        for name in _OBJECTS:
            if (name in old) != (name in new):
                old.pop(name, None)
                new.pop(name, None)
        new, _ = without_new_defaults(old, new)
        lines = differences(old, new, "in the ledger")
        if lines:
            raise ValueError(
                f"the settings differ from those that the run in {store.path} was started with:\n"
                + "\n".join(lines)
                + f"\nGo back to the old settings, use another run folder, or delete {store.path.parent} to start over."
            )
    store.set_fingerprint(now)


def without_arguments(settings: Mapping[str, object], *names: str) -> Settings:
    """Settings without some arguments of the DataModule, such as the source of rows that count by their content."""
    data = settings.get("data")
    if not isinstance(data, dict):
        return dict(settings)
    arguments = {name: value for name, value in data.get("init_args", {}).items() if name not in names}
    return {**settings, "data": {**data, "init_args": arguments}}


def prompt_differences(store: PreferenceStore, prompts: Sequence[Prompt], source: str) -> list[str]:
    """A line that names the first prompt of a ledger that is not among the rows; none if all are."""
    now = {prompt.index: prompt for prompt in prompts}
    for held in store.prompts():
        found = now.get(held.index)
        # a ledger keeps no completions
        if found is None or replace(found, completion=None) != held:
            text = None if found is None else found.text[-60:]
            return [
                f"  {source}: other rows; prompt {held.index} is {held.text[-60:]!r} in the ledger, {text!r} now: the "
                f"data, the tokenizer, or how texts become tokens has changed"
            ]
    return []


def note_code(store: PreferenceStore, code: Mapping[str, str]) -> None:
    """Warn if the code of a user's own class has changed since the rounds in the ledger were sampled and labeled.

    Args:
        store: the ledger, open for writing.
        code: result of `lightning_rlhf.runtime.fingerprint.code_of_plugins`.
    """
    before: dict[str, str] = store.value(CODE) or {}
    changed = sorted(name for name in code if before.get(name, code[name]) != code[name])
    if changed and store.has_samples():
        rank_zero_warn(
            f"the code of {', '.join(changed)} has changed since the run in {store.path} began; the rounds that it "
            f"holds stay as they were sampled and labeled"
        )
    if {**before, **code} != before:
        # stored also after a warning, so that one change of the code warns once
        store.set_values({CODE: {**before, **code}})


def note_columns(store: PreferenceStore, prompts: Sequence[Prompt], source: str) -> None:
    """Warn if other columns of the rows have changed: rewards that read them may score later rounds differently."""
    # apart from the digest of the rows, so that a ledger of a version without columns continues
    now = digest_of_columns(prompts)
    if now is None:
        return
    before = store.value(COLUMNS)
    if before not in (None, now):
        rank_zero_warn(
            f"{source}: columns that rewards may read have changed since the run began; the rounds that the ledger "
            f"holds stay as they were scored"
        )
    if before != now:
        store.set_values({COLUMNS: now})


def note_heldout(store: PreferenceStore, heldout: Sequence[Prompt], source: str) -> None:
    """Warn if the held-out rows have changed: curves before and after are not comparable."""
    if not heldout:
        return
    rows = digest_of_rows(heldout)
    before: RowDigest | None = store.value(HELDOUT_ROWS)
    if before is not None:
        for line in row_differences(before, rows, heldout, source, "before"):
            rank_zero_warn(f"held-out metrics of this run are not comparable with earlier ones:\n{line}")
    if before != rows:
        store.set_values({HELDOUT_ROWS: rows})
