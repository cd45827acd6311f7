"""How fast a ledger takes rows, and the time of a round beside the labels that the ledger holds; see docs/ledger.md."""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

from benchmarks.harness import machine
from lightning_rlhf.collectors.preferences import RoundCollector
from lightning_rlhf.datamodules.replay import ReplayedPairs
from lightning_rlhf.labelers import RecordedLabeler
from lightning_rlhf.ledger.labeled import LabeledTable
from lightning_rlhf.ledger.rollouts import RolloutTable
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.randomness import Key
from lightning_rlhf.samplers import OfflineSampler
from lightning_rlhf.types import Comparison, Label, Prompt, RecordedPair, Response


Figures: TypeAlias = dict[str, float]
"""Median CPU times of one size, ms."""

BATCH = 8  # pairs of a batch that is read
FILL_ROUND = 1024  # pairs of a round that only fills the ledger: a million labels are about a thousand rounds


def main() -> None:
    """Fill one ledger to each size, and time the operations of a round there, in CPU time: the disk has its own."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--labels", type=int, nargs="+", default=[1_000, 100_000, 1_000_000], help="ascending sizes")
    options.add_argument("--pairs", type=int, default=64, help="pairs of a timed round")
    options.add_argument("--repeats", type=int, default=5, help="timed rounds of each size; the median counts")
    options.add_argument("--tokens", type=int, default=8, help="tokens of a response")
    options.add_argument("--out", type=Path, help="file to append the result to, a line of JSON")
    chosen = options.parse_args()
    prompts = make_prompts(10_000, chosen.tokens)
    columns: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.sqlite"
        for size in sorted(chosen.labels):
            seconds, added = fill(path, size, prompts)
            columns[f"{size:,}"] = {"labels per CPU second": added / seconds, **timed(path, prompts, chosen)}
    about = {"benchmark": "ledger", **vars(chosen), "machine": machine(), "date": time.strftime("%Y-%m-%d")}
    peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    line = json.dumps({**about, "out": str(chosen.out), "figures": columns, "peak_mb": peak})
    print(table(columns), line, sep="\n\n")
    if chosen.out is not None:
        with chosen.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def make_prompts(count: int, tokens: int) -> list[Prompt]:
    """Prompts with recorded pairs of ``tokens`` tokens a response."""
    ids = tuple(range(tokens))
    logps = tuple(-float(i) for i in ids)
    recorded = RecordedPair("an answer", "another answer")
    pair = (
        Response(ids, recorded.chosen, "eos", logps, logps),
        Response(ids[::-1], recorded.rejected, "eos", logps, logps),
    )
    return [Prompt(i, ids, f"question {i}?", pair=pair, recorded=recorded) for i in range(count)]


def fill(path: Path, size: int, prompts: Sequence[Prompt]) -> tuple[float, int]:
    """Add closed rounds until the ledger holds ``size`` labels; returns CPU seconds and labels added."""
    label, begun = Label(0.75, cost=0.1), time.process_time()
    with PreferenceStore(path) as store:
        held, first = store.num_labels, len(store.rounds())
        for index, start in enumerate(range(held, size, FILL_ROUND), first):
            count = min(FILL_ROUND, size - start)
            chosen = [prompts[(start + i) % len(prompts)] for i in range(count)]
            pairs = [Comparison(prompt, *(prompt.pair or ())) for prompt in chosen]
            store.add_labels(store.add_comparisons(index, pairs, range(count)), [label] * count)
            store.close_round(index, {"prompts": count, "failed": {}, "upto": store.last_attempt()})
    return time.process_time() - begun, size - held


def timed(path: Path, prompts: Sequence[Prompt], chosen: argparse.Namespace) -> Figures:
    """Times of opening, of rounds, of the totals that callbacks ask for after each, and of reading a round again."""
    times: dict[str, list[float]] = {}
    for number in range(chosen.repeats):
        part = [prompts[(number * chosen.pairs + i) % len(prompts)] for i in range(chosen.pairs)]
        begun = time.process_time()
        with PreferenceStore(path) as store:
            times.setdefault("open to write", []).append(1000 * (time.process_time() - begun))
            for name, call in calls(store, part):
                begun = time.process_time()
                call()
                times.setdefault(name, []).append(1000 * (time.process_time() - begun))
    found = {f"{name}, CPU ms": statistics.median(values) for name, values in times.items()}
    with PreferenceStore(path, read_only=True) as store:
        begun = time.process_time()
        known = [LabeledTable(store).round(index) for index in store.rounds()]
        found["numbers of all pairs for `replay: all`, after a restart, CPU ms"] = 1000 * (time.process_time() - begun)
        pairs = ReplayedPairs(known, read=LabeledTable(store).read, length=lambda pair: 0)
        dice, reads = random.Random(0), []
        for _ in range(chosen.repeats):
            places = dice.sample(range(len(pairs)), BATCH)
            begun = time.process_time()
            pairs.fetch(places)
            reads.append(1000 * (time.process_time() - begun))
        found[f"a batch of {BATCH} pairs of all rounds, CPU ms"] = statistics.median(reads)
        found["bytes per label"] = path.stat().st_size / store.num_labels
    return found


def calls(store: PreferenceStore, prompts: Sequence[Prompt]) -> Iterator[tuple[str, Callable[[], object]]]:
    """The calls of a round: its samples and labels, the totals that callbacks ask for, and reading it again."""
    # as a run that is continued asks
    yield "number of scores", RolloutTable(store).count_scores
    index = store.rounds()[-1] + 1
    collector = RoundCollector(store, OfflineSampler(), RecordedLabeler(), Key((0,)))
    collect = partial(collector.collect, index, prompts, None, len(prompts))
    yield f"a round of {len(prompts)} pairs", collect
    yield "labels so far", partial(store.count_labels, index + 1)
    yield "cost so far", partial(store.cost, index + 1)
    yield "ties so far", partial(store.count_ties, index + 1)
    yield "passes per pair", store.mean_passes
    yield "labels, cost and passes by scans, as until version 5", partial(scans, store)
    yield "the round again, after a restart", collect


def scans(store: PreferenceStore) -> None:
    """The totals of a round, by the queries of ledgers without counters."""
    with store.reading() as db:
        for query in (
            "SELECT COUNT(*) FROM attempts WHERE status = 'ok' AND id <= (SELECT MAX(id) FROM attempts)",
            "SELECT TOTAL(cost) FROM attempts WHERE id <= (SELECT MAX(id) FROM attempts)",
            "SELECT AVG(passes) FROM comparisons",
        ):
            db.execute(query).fetchall()


def table(columns: dict[str, Figures]) -> str:
    """The figures as a table, a column for each number of labels."""
    rows = ["| labels in the ledger | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for name in next(iter(columns.values())):
        cells = [
            f"{figures[name]:.0f}" if figures[name] >= 100 else f"{figures[name]:.2g}" for figures in columns.values()
        ]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
