"""Scoring tokens of a large vocabulary, with the memory of tiles used again or new for each; and limits of the device.

    python -m benchmarks.head
    python -m benchmarks.head --device cuda --width 2048 --limits

No model: random hidden states and a random head, in micro-batches as a run scores recorded responses. Each arm is a
process of its own; all must find the same log-probabilities, bit by bit. ``--limits`` times a matrix product and a copy
of memory, against which the other benchmarks set their operations and bytes per second.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch

from benchmarks.harness import machine, synchronize
from lightning_rlhf.logprobs import head


Result: TypeAlias = dict[str, float]

KINDS = ("score", "score with entropy", "train")
ARMS = ("memory used again", "new memory for each tile")


def main() -> None:
    """Run the arms in turns, and print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options.add_argument("--threads", type=int, default=1, help="threads of torch")
    options.add_argument("--vocabulary", type=int, default=49_152)
    options.add_argument("--width", type=int, default=64, help="width of the hidden states")
    options.add_argument("--tokens", type=int, default=1024, help="tokens of a micro-batch")
    options.add_argument("--batches", type=int, default=4, help="micro-batches that are timed")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--limits", action="store_true", help="print operations and bytes per second of the device")
    options.add_argument("--out", type=Path, help="append the JSON line to this file as well")
    options.add_argument("--worker", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.limits:
        print(json.dumps(limits(chosen.device)))
        return
    if chosen.worker:
        print(json.dumps({kind: work(chosen, kind) for kind in KINDS}))
        return
    found: dict[str, list[dict[str, Result]]] = {arm: [] for arm in ARMS}
    for turn in range(chosen.repeats):
        for arm in ARMS[:: 1 if turn % 2 == 0 else -1]:
            found[arm].append(process(arm))
    print("| | arm | CPU s | of these in the system | wall s | page faults | peak MB |", "|---" * 7 + "|", sep="\n")
    summary: dict[str, dict[str, Result]] = {}
    for kind in KINDS:
        sums = {run[kind]["sum"] for runs in found.values() for run in runs}
        if len(sums) > 1:
            raise SystemExit(f"the arms do not compute the same: sums of log-probabilities are {sorted(sums)}")
        for arm, runs in found.items():
            median = {key: statistics.median(run[kind][key] for run in runs) for key in runs[0][kind]}
            summary.setdefault(kind, {})[arm] = median
            times = f"{median['cpu']:.2f} | {median['system']:.2f} | {median['wall']:.2f}"
            print(f"| {kind} | {arm} | {times} | {median['faults']:,.0f} | {median['peak_mb']:.0f} |")
    line = json.dumps({"benchmark": "head", **vars(chosen), "out": None, "machine": machine(), **summary})
    print(line)
    if chosen.out is not None:
        with chosen.out.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")


def process(arm: str) -> dict[str, Result]:
    """Run an arm in a process of its own, with the options of this one."""
    command = [sys.executable, "-m", "benchmarks.head", *sys.argv[1:], "--worker", arm]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{arm} failed with status {done.returncode}:\n{done.stderr[-4000:]}")
    result: dict[str, Result] = json.loads(done.stdout.splitlines()[-1])
    return result


def work(chosen: argparse.Namespace, kind: str) -> Result:
    """Time one kind of pass over the micro-batches, after one that is not timed."""
    if chosen.worker != ARMS[0]:
        # as until 0.1: every tile is allocated, and so are the exponentials of all its tokens
        head._take_buffer = lambda *_: None  # type: ignore[assignment]
        head.SCRATCH_BYTES = head.LOGIT_BYTES
    torch.manual_seed(0)
    hidden = torch.randn(chosen.tokens, chosen.width, device=chosen.device)
    weight = torch.randn(chosen.vocabulary, chosen.width, device=chosen.device)
    targets = torch.randint(0, chosen.vocabulary, (chosen.tokens,), device=chosen.device)
    # a frozen head, as under LoRA: only the hidden states get gradients
    hidden.requires_grad_(kind == "train")

    def one() -> float:
        scores = head.score_tokens(hidden, weight, targets, statistics=kind == "score with entropy")
        if kind == "train":
            scores.logps.sum().backward()
        return float(scores.logps.detach().double().sum())

    total = one()
    before, wall = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    for _ in range(chosen.batches):
        total += one()
    synchronize(chosen.device)
    after, wall = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - wall
    system = after.ru_stime - before.ru_stime
    peak = after.ru_maxrss / 1024
    if chosen.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    cpu = after.ru_utime - before.ru_utime + system
    faults = after.ru_minflt - before.ru_minflt
    return {"cpu": cpu, "system": system, "wall": wall, "faults": faults, "peak_mb": peak, "sum": total}


def limits(device: str) -> Result:
    """The best of five: 10^12 operations per second of a product, in float32 and bfloat16, and 10^9 bytes of a copy."""
    size = 8192 if device == "cuda" else 1024
    found: Result = {}
    for name, dtype in (("float32_tflops", torch.float32), ("bfloat16_tflops", torch.bfloat16)):
        matrix = torch.randn(size, size, device=device).to(dtype)
        product = torch.empty_like(matrix)
        seconds = best(device, lambda a=matrix, b=product: torch.mm(a, a, out=b))  # type: ignore[misc]
        # n^3 multiplications and as many additions
        found[name] = 2 * size**3 / seconds / 1e12
    source = torch.ones(2**28 if device == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    # every float is read and written
    found["gigabytes_per_second"] = 2 * source.nbytes / best(device, lambda: target.copy_(source)) / 1e9
    return {name: round(value, 4) for name, value in found.items()}


def best(device: str, call: Callable[[], object]) -> float:
    """Seconds of the fastest of five calls, after one that is not timed."""
    times = []
    for _ in range(6):
        synchronize(device)
        begun = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - begun)
    return min(times[1:])


if __name__ == "__main__":
    main()
