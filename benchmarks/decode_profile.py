"""Where the time of a decoding step goes: ``python -m benchmarks.decode_profile --model smollm2 --rows 1 32``.

Prints CPU milliseconds per step of all rows, prefill included, measured without a profiler, and the shares of matrix
products and of attention in a second call under ``torch.profiler``, by the CPU time of the operations themselves.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import machine, model_folder
from lightning_rlhf.generation import DecodeEngine, Decoding, Request
from lightning_rlhf.models.load import load_policy, load_tokenizer
from lightning_rlhf.randomness import Key
from lightning_rlhf.types import Prompt


PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::matmul", "aten::linear")
ATTENTION = "attention"


def decode(engine: DecodeEngine, rows: int, prompt_tokens: int, turn: int) -> None:
    """Sample one response per row."""
    vocabulary = engine.policy.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (rows, prompt_tokens), generator=generator).tolist()
    with torch.no_grad():
        engine.generate([Request(Prompt(i, tuple(row), ""), Key((turn, i))) for i, row in enumerate(ids)])


def shares(operations: Mapping[str, float]) -> tuple[float, float]:
    """Shares of matrix products and of attention in the CPU time of operations.

    Args:
        operations: CPU time of each operation by its name, without that of the operations it calls; any unit.
    """
    total = sum(operations.values())
    products = sum(spent for name, spent in operations.items() if name in PRODUCTS)
    attention = sum(spent for name, spent in operations.items() if ATTENTION in name)
    return products / total, attention / total


def measure(engine: DecodeEngine, rows: int, prompt_tokens: int, repeats: int) -> dict[str, float]:
    """CPU time of a decoding step with so many rows, and what it is spent on."""
    steps = engine.decoding.max_new_tokens
    decode(engine, rows, prompt_tokens, 0)
    times = []
    for turn in range(repeats):
        start = time.process_time()
        decode(engine, rows, prompt_tokens, turn + 1)
        times.append(1000 * (time.process_time() - start) / steps)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        decode(engine, rows, prompt_tokens, 1)
    events = profiler.key_averages()
    products, attention = shares({event.key: event.self_cpu_time_total for event in events})
    return {
        "cpu_ms": statistics.median(times),
        "products": products,
        "attention": attention,
        "operations": sum(event.count for event in events) / steps,
    }


def run(argv: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Measure, and print one line of a table per number of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="small", help="small, smollm2, or a folder")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32], help="rows that are decoded together")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens of each response")
    parser.add_argument("--repeats", type=int, default=5, help="calls whose median is reported")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    folder = model_folder(options.model)
    policy: Any = load_policy(str(folder))
    tokenizer = load_tokenizer(str(folder))
    print(f"{options.model}, one thread, {machine()}\n")
    print("| rows | CPU ms per step | matrix products | attention | operations per step |\n|---|---|---|---|---|")
    found = []
    for rows in options.rows:
        decoding = Decoding(max_new_tokens=options.new_tokens, rows=rows)
        # no EOS, so that every response has the same length
        engine = DecodeEngine(policy, None, tokenizer, beta=0.1, decoding=decoding, eos_ids=[])
        figures = measure(engine, rows, options.prompt_tokens, options.repeats)
        print(
            f"| {rows} | {figures['cpu_ms']:.1f} | {figures['products']:.0%} | {figures['attention']:.0%} "
            f"| {figures['operations']:,.0f} |"
        )
        found.append(figures)
    return found


if __name__ == "__main__":
    run()
