"""Whether a ledger holds the rounds of the run that is about to read them: the same settings, on the same rows.

Rows count by their content, not by the path of their file.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_rlhf.ledger.rollouts import RolloutTable
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.renamed import renamed_settings
from lightning_rlhf.runtime.fingerprint import (
    FREE_OF_MODELS,
    comparable,
    differences,
    with_contents,
    without,
    without_new_defaults,
)
from lightning_rlhf.types import Prompt, Response


ROWS, HELDOUT_ROWS, CODE = "training_rows", "heldout_rows", "code"
"""What a ledger remembers of the rows, and of a user's own classes."""
NAMED = 100_000
"""Rows up to which a digest of each is kept, so that a message can name the first that differs."""
_SHORT = 4
_OBJECTS = {"labeler", "reward"}


def digest_of_rows(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What tells one list of rows from another: how many, a digest of all, and of each a short one; plain JSON.

    Token ids count, so that another tokenizer, chat template or limit of length gives other rows.
    """
    whole = hashlib.blake2b(digest_size=16)
    each = bytearray()
    for prompt in prompts:
        digest = hashlib.blake2b(digest_size=16)
        for part in _parts(prompt):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        whole.update(digest.digest())
        each += digest.digest()[:_SHORT]
    found: dict[str, Any] = {"count": len(prompts), "digest": whole.hexdigest()}
    return {**found, "each": each.hex()} if len(prompts) <= NAMED else found


def _parts(prompt: Prompt) -> Iterator[bytes]:
    yield from _content(prompt.ids, prompt.text)
    yield b"" if prompt.messages is None else json.dumps(prompt.messages, sort_keys=True).encode()
    for response in prompt.pair or ():
        yield from _response(response)
    if prompt.recorded is not None:
        yield repr((float(prompt.recorded.probability), float(prompt.recorded.weight))).encode()
    if prompt.completion is not None:
        yield from _response(prompt.completion)


def _response(response: Response) -> Iterator[bytes]:
    yield from _content(response.ids, response.text)


def _content(ids: Sequence[int], text: str) -> Iterator[bytes]:
    yield array("q", ids).tobytes()
    yield text.encode("utf-8", "surrogatepass")


def row_differences(
    then: Mapping[str, Any], now: Mapping[str, Any], prompts: Sequence[Prompt], source: str, where: str
) -> list[str]:
    """A line that says how the rows differ from earlier ones; none if they are the same.

    Args:
        then: what `digest_of_rows` gave for the earlier rows.
        now: what it gives for these.
        prompts: the rows.
        source: what they are and where they come from.
        where: says where the earlier digest lies.
    """
    if (then["count"], then["digest"]) == (now["count"], now["digest"]):
        return []
    line = f"  {source}: other rows; {then['count']} {where}, {now['count']} now"
    if "each" in then and "each" in now:
        size = 2 * _SHORT
        old, new = ([each[i : i + size] for i in range(0, len(each), size)] for each in (then["each"], now["each"]))
        changed = [i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b]
        if changed:
            line += f", {len(changed)} changed in place, first {_named(prompts[changed[0]], changed[0])}"
        elif len(new) > len(old):
            line += f", new from {_named(prompts[len(old)], len(old))} on"
    return [line]


def _named(prompt: Prompt, place: int) -> str:
    return f"prompt {place + 1} ({prompt.text[-60:]!r})"


def check_same_run(
    store: PreferenceStore,
    settings: Mapping[str, Any],
    prompts: Sequence[Prompt],
    source: str,
    restores_weights: bool = False,
) -> None:
    """Note in a ledger whose it is; before a run reads rounds from it, check that they are its own.

    A ledger that holds nothing yet takes any run. One of a version that noted no rows is compared by the prompts that
    its comparisons and rollouts hold.

    Args:
        store: the ledger, open for writing.
        settings: what `lightning_rlhf.runtime.fingerprint.decisive` gives, and the seed.
        prompts: the training rows.
        source: what the rows are and where they come from, for messages.
        restores_weights: whether weights come from a checkpoint, so that those of models in memory do not matter.

    Raises:
        ValueError: naming every setting that differs, with both values, and the first row.
    """
    now: dict[str, Any] = json.loads(json.dumps(dict(settings)))
    rows = digest_of_rows(prompts)
    stored, stored_rows = store.fingerprint(), store.value(ROWS)
    if store.is_drawn():
        old = comparable(stored or {})
        # a run from Python knows no seed_everything; one of an earlier version noted the seed alone
        known_to_both = old.keys() & now.keys()
        new = {name: value for name, value in now.items() if name in known_to_both}
        old = {name: value for name, value in old.items() if name in known_to_both}
        new, added = without_new_defaults(old, new)
        if store.num_labels == RolloutTable(store).count_scores() == 0:
            # drawn, but judged by nobody: another judge may do it, as where the first one never answered
            old, new = without_arguments(old, "labeler", "reward"), without_arguments(new, "labeler", "reward")
        if stored_rows is not None:
            lines = row_differences(stored_rows, rows, prompts, source, "in the ledger")
            old, new = without_arguments(old, "prompts"), without_arguments(new, "prompts")
        else:
            lines = prompt_differences(store, prompts, source)
        lines = [*differences(old, new, "in the ledger"), *lines]
        if restores_weights:
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


def check_same_settings(store: PreferenceStore, settings: Mapping[str, Any], free: set[str]) -> None:
    """The same for commands that compare their rows themselves.

    Args:
        store: the ledger, open for writing.
        settings: what a continued run must share with it, plain JSON.
        free: settings that may change.

    Raises:
        ValueError: naming every setting that differs, with both values.
    """
    now = json.loads(json.dumps(with_contents(dict(settings))))
    stored = store.fingerprint()
    if stored is not None:
        stored = renamed_settings(stored, str(now.get("command")))
        old, new = without(stored, free | FREE_OF_MODELS), without(now, free | FREE_OF_MODELS)
        # what an earlier version did not note of a run from Python
        missing = {name for name in _OBJECTS if (name in old) != (name in new)}
        old, new = ({n: v for n, v in tree.items() if n not in missing} for tree in (old, new))
        new, _ = without_new_defaults(old, new)
        lines = differences(old, new, "in the ledger")
        if lines:
            raise ValueError(
                f"the settings differ from those that the run in {store.path} was started with:\n"
                + "\n".join(lines)
                + f"\nGo back to the old settings, use another run folder, or delete {store.path.parent} to start over."
            )
    store.set_fingerprint(now)


def without_arguments(settings: Mapping[str, Any], *names: str) -> dict[str, Any]:
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
        if found is None or replace(found, completion=None) != held:
            text = None if found is None else found.text[-60:]
            return [
                f"  {source}: other rows; prompt {held.index} is {held.text[-60:]!r} in the ledger, {text!r} now: the "
                f"data, the tokenizer, or how texts become tokens has changed"
            ]
    return []


def note_code(store: PreferenceStore, code: Mapping[str, str]) -> None:
    """Warn if a user's own class has other code than when the rounds so far were drawn and labelled.

    Args:
        store: the ledger, open for writing.
        code: what `lightning_rlhf.runtime.fingerprint.code_of_plugins` gives.
    """
    before: dict[str, str] = store.value(CODE) or {}
    changed = sorted(name for name in code if before.get(name, code[name]) != code[name])
    if changed and store.is_drawn():
        rank_zero_warn(
            f"the code of {', '.join(changed)} has changed since the run in {store.path} began; the rounds that it "
            f"holds stay as they were drawn and labelled"
        )
    if {**before, **code} != before:
        store.set_values({CODE: {**before, **code}})


def note_heldout(store: PreferenceStore, heldout: Sequence[Prompt], source: str) -> None:
    """Warn if held-out rows are others than before: curves before and after do not compare."""
    if not heldout:
        return
    rows, before = digest_of_rows(heldout), store.value(HELDOUT_ROWS)
    if before is not None:
        for line in row_differences(before, rows, heldout, source, "before"):
            rank_zero_warn(f"held-out figures of this run do not compare with earlier ones:\n{line}")
    if before != rows:
        store.set_values({HELDOUT_ROWS: rows})
