"""Reference log-probabilities on disk: what is found again, what is not, and what a kill leaves."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_rlhf.collectors.reference_logps import with_reference_logps
from lightning_rlhf.generation import DecodeEngine, Decoding
from lightning_rlhf.models import LoRA, build_reference, load_policy, load_tokenizer
from lightning_rlhf.models.reference import AbstractReference
from lightning_rlhf.models.reference_cache import LogpsFile, ReferenceCache, entry_key, weights_digest
from lightning_rlhf.samplers.offline import recorded_comparison
from lightning_rlhf.types import Comparison, Prompt, Response


def recorded(*ids: int) -> Response:
    return Response(ids=ids, text="", finish_reason="eos", source="dataset")


PROMPTS = [
    Prompt(index=0, ids=(5, 6, 7), text="", pair=(recorded(8, 9, 0), recorded(10, 0))),
    Prompt(index=1, ids=(11,), text="", pair=(recorded(12, 0), recorded(13, 14, 15))),
]
PAIRS = [recorded_comparison(prompt, chosen_first=True) for prompt in PROMPTS]


def engine(policy: Path, lora: LoRA | None = None, dtype: str = "float32", seed: int = 0) -> DecodeEngine:
    torch.manual_seed(seed)
    model = load_policy(str(policy), lora=lora, dtype=dtype)
    tokenizer = load_tokenizer(str(policy))
    return DecodeEngine(
        model,  # type: ignore[arg-type]
        build_reference(model, "fixed"),
        tokenizer,
        beta=0.1,
        decoding=Decoding(),
        eos_ids=[0],
    )


@contextmanager
def counted(reference: AbstractReference) -> Iterator[list[int]]:
    """Count the forward passes of a reference; the one-time probe of a new model is made before."""
    with reference.active() as model:
        calls: list[int] = []
        handle = model.register_forward_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


def scored(pairs: Sequence[Comparison], by: DecodeEngine, cache: ReferenceCache) -> tuple[list[Comparison], int]:
    assert by.reference is not None
    with_reference_logps(PAIRS[:1], by)
    with counted(by.reference) as calls:
        return with_reference_logps(pairs, by, cache), len(calls)


def logps(pairs: Sequence[Comparison]) -> list[tuple[float, ...] | None]:
    return [response.reference_logps for pair in pairs for response in (pair.a, pair.b)]


def test_a_second_run_computes_nothing_and_finds_the_same_numbers(tmp_path: Path, tiny_policy: Path) -> None:
    cache = ReferenceCache(tmp_path)
    first, passes = scored(PAIRS, engine(tiny_policy), cache)
    assert passes > 0
    # another process would build its own reference, and show the pairs in another order
    again, passes = scored([pair.swap() for pair in PAIRS[::-1]], engine(tiny_policy), ReferenceCache(tmp_path))
    assert passes == 0
    assert logps(again) == logps(first)[::-1]
    assert logps(first) == logps(with_reference_logps(PAIRS, engine(tiny_policy)))


def test_only_what_is_new_is_computed(tmp_path: Path, tiny_policy: Path) -> None:
    cache = ReferenceCache(tmp_path)
    scored(PAIRS[:1], engine(tiny_policy), cache)
    mine = engine(tiny_policy)
    seen: list[int] = []

    def score(prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[Response]:
        seen.extend(i for i, response in enumerate(responses) if response.reference_logps is None)
        return mine.with_reference_logps(prompts, responses)

    assert mine.reference is not None
    prompts = [pair.prompt for pair in PAIRS for _ in range(2)]
    cache.complete(mine.reference, prompts, [r for pair in PAIRS for r in (pair.a, pair.b)], score)
    assert seen == [2, 3]


def test_lora_and_full_fine_tuning_of_one_checkpoint_share_entries(tmp_path: Path, tiny_policy: Path) -> None:
    cache = ReferenceCache(tmp_path / "cache")
    full, _ = scored(PAIRS, engine(tiny_policy), cache)
    moved = shutil.copytree(tiny_policy, tmp_path / "elsewhere")
    adapted, passes = scored(PAIRS, engine(moved, lora=LoRA(r=2), seed=7), cache)
    assert passes == 0
    assert logps(adapted) == logps(full)


def test_other_weights_types_and_ids_are_not_mistaken(tmp_path: Path, tiny_policy: Path) -> None:
    cache = ReferenceCache(tmp_path)
    scored(PAIRS, engine(tiny_policy), cache)

    changed = engine(tiny_policy)
    assert changed.reference is not None
    with changed.reference.active() as model, torch.no_grad():
        next(model.parameters())[3, 0] += 1e-6
    assert scored(PAIRS, changed, cache)[1] > 0
    configured = engine(tiny_policy)
    assert configured.reference is not None
    with configured.reference.active() as model:
        model.config.rms_norm_eps = 1e-3
    assert scored(PAIRS, configured, cache)[1] > 0

    half = scored(PAIRS, engine(tiny_policy, dtype="bfloat16"), cache)
    assert half[1] > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert scored(PAIRS, engine(tiny_policy), cache)[1] > 0

    same = engine(tiny_policy)
    other_prompt = replace(PAIRS[0], prompt=replace(PROMPTS[0], ids=(5, 6)))
    other_response = replace(PAIRS[0], a=recorded(8, 9, 1), b=recorded(10, 1))
    assert scored([other_prompt], same, cache)[1] > 0
    assert scored([other_response], same, cache)[1] > 0
    # ids that read the same when strung together
    assert entry_key("", (1, 2), (3,)) != entry_key("", (1,), (2, 3))


def test_a_reference_that_has_moved_and_sampled_responses_leave_no_trace(tmp_path: Path, tiny_policy: Path) -> None:
    cache = ReferenceCache(tmp_path / "cache")
    moved = engine(tiny_policy)
    assert moved.reference is not None
    moved.reference.update(moved.policy, "previous")
    assert scored(PAIRS, moved, cache)[1] > 0
    drawn = [replace(p, a=replace(p.a, source="policy"), b=replace(p.b, source="plus")) for p in PAIRS]
    assert None not in logps(scored(drawn, engine(tiny_policy), cache)[0])
    assert not (tmp_path / "cache").exists()


def test_float64_is_kept_in_full(tmp_path: Path, tiny_policy: Path) -> None:
    cache = ReferenceCache(tmp_path)
    found = []
    for _ in range(2):
        double = engine(tiny_policy)
        assert double.reference is not None
        with double.reference.active() as model:
            model.double()
        found.append(scored(PAIRS, double, cache))
    assert logps(found[0][0]) == logps(found[1][0])
    assert found[1][1] == 0


def test_the_digest_covers_persistent_buffers_only(tiny_policy: Path) -> None:
    digests = []
    for name, value, persistent in (
        ("kept", 1.0, True),
        ("kept", 2.0, True),
        ("made", 1.0, False),
        ("made", 2.0, False),
    ):
        reference = engine(tiny_policy).reference
        assert reference is not None
        with reference.active() as model:
            model.register_buffer(name, torch.tensor(value), persistent=persistent)
        digests.append(weights_digest(reference))
    assert digests[0] != digests[1]
    assert digests[2] == digests[3]


@pytest.mark.parametrize("damage", ["no database", "read-only folder"])
def test_a_cache_that_cannot_be_used_costs_a_warning_and_no_run(tmp_path: Path, tiny_policy: Path, damage: str) -> None:
    folder = tmp_path / "cache"
    by = engine(tiny_policy)
    assert by.reference is not None
    if damage == "no database":
        folder.mkdir()
        (folder / f"{weights_digest(by.reference)}.sqlite").write_text("not a database " * 99)
    else:
        folder.write_text("a file where the folder should be")
    cache = ReferenceCache(folder)
    with pytest.warns(UserWarning, match="no reference log-probabilities are kept.*to another folder or to 'off'"):
        found = with_reference_logps(PAIRS, by, cache)
    assert logps(found) == logps(with_reference_logps(PAIRS, by))
    with_reference_logps(PAIRS, by, cache)  # says it once; a second warning would be an error


def test_the_environment_names_the_folder_or_switches_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_RLHF_CACHE", str(tmp_path))
    monkeypatch.delenv("LIGHTNING_RLHF_REFERENCE_CACHE", raising=False)
    default = ReferenceCache.from_environment()
    assert default is not None
    assert default.folder == tmp_path / "reference_logps"
    monkeypatch.setenv("LIGHTNING_RLHF_REFERENCE_CACHE", str(tmp_path / "mine"))
    named = ReferenceCache.from_environment()
    assert named is not None
    assert named.folder == tmp_path / "mine"
    monkeypatch.setenv("LIGHTNING_RLHF_REFERENCE_CACHE", "off")
    assert ReferenceCache.from_environment() is None


# ---- the file ------------------------------------------------------------------------------------------------------

forking = multiprocessing.get_context("fork") if hasattr(os, "fork") else None
needs_fork = pytest.mark.skipif(forking is None, reason="kills a forked process")


def value(number: int) -> bytes:
    return number.to_bytes(4, "little") * 100


def write(path: Path, numbers: range, portion: int) -> None:
    for start in range(numbers.start, numbers.stop, portion):
        LogpsFile(path).put({n.to_bytes(4, "little"): value(n) for n in range(start, start + portion)})
        # acknowledged: what is named here must survive
        with (path.parent / f"done-{numbers.start}").open("a") as stream:
            stream.write(f"{start}\n")


def present(path: Path, numbers: range) -> set[int]:
    found = LogpsFile(path).get([n.to_bytes(4, "little") for n in numbers])
    assert all(entry == value(int.from_bytes(key, "little")) for key, entry in found.items())
    return {int.from_bytes(key, "little") for key in found}


@needs_fork
def test_a_killed_writer_leaves_what_it_had_committed(tmp_path: Path) -> None:
    assert forking is not None
    file, done = tmp_path / "x.sqlite", tmp_path / "done-0"
    writer = forking.Process(target=write, args=(file, range(0, 10**9), 50))
    writer.start()
    deadline = time.monotonic() + 60
    while not done.exists() or len(done.read_text().splitlines()) < 20:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    acknowledged = [int(line) for line in done.read_text().split("\n")[:-1]]
    found = present(file, range(0, max(acknowledged) + 200))
    assert all(n in found for start in acknowledged for n in range(start, start + 50))
    assert len(found) % 50 == 0  # portions are there in full or not at all
    LogpsFile(file).put({b"new": b"1"})
    assert LogpsFile(file).get([b"new", b"none"]) == {b"new": b"1"}


@needs_fork
def test_two_processes_write_at_once(tmp_path: Path) -> None:
    assert forking is not None
    file = tmp_path / "x.sqlite"
    writers = [forking.Process(target=write, args=(file, numbers, 5)) for numbers in (range(0, 300), range(100, 400))]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert present(file, range(500)) == set(range(400))
