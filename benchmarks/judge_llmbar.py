"""A judge under llama.cpp on LLMBar's pairs with an objectively better answer: both orders beside one.

    python -m benchmarks.judge_llmbar --gguf MODEL.gguf --data natural.json

LLMBar (Zeng et al. 2023, arXiv 2310.07641) has pairs of outputs of which one follows the instruction; ``--data`` is one
of its ``dataset.json``. The server is xllamacpp's, in this process, and `ServerLabeler` asks it, with replies in a
journal: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path

from lightning_rlhf.evaluation.rates import two_sided_binomial_p, wilson_interval
from lightning_rlhf.judging import JudgeServer
from lightning_rlhf.judging.options import RequestOptions
from lightning_rlhf.labelers import ServerLabeler
from lightning_rlhf.randomness import Key
from lightning_rlhf.types import Comparison, Label, Prompt, Response


def comparisons(rows: Sequence[dict[str, str]]) -> list[Comparison]:
    """Pairs in the order of the data."""
    return [
        Comparison(
            Prompt(i, (), row["input"]),
            *(Response((number,), row[f"output_{number}"], "eos") for number in (1, 2)),
        )
        for i, row in enumerate(rows)
    ]


def share(hits: Sequence[bool | float]) -> str:
    """A share with its Wilson interval of 95 %."""
    low, high = wilson_interval(float(sum(hits)), len(hits))
    return f"{sum(hits) / len(hits):.3f} [{low:.3f}, {high:.3f}]"


def paired(left: Sequence[float], right: Sequence[float]) -> str:
    """On how many pairs one is right and the other is not, with the p-value of a fair coin (McNemar's exact test)."""
    won, lost = (
        sum(a > b for a, b in zip(left, right, strict=True)),
        sum(a < b for a, b in zip(left, right, strict=True)),
    )
    return f"+{won} -{lost}, p = {two_sided_binomial_p(won, won + lost):.3f}"


def right(probability: float, first_is_better: bool) -> float:
    """1 if a verdict names the better output, 1/2 for a tie."""
    return 0.5 if probability == 0.5 else float((probability > 0.5) == first_is_better)


def table(rows: Sequence[dict[str, str]], labels: Sequence[Label]) -> dict[str, str]:
    """Metrics over the pairs that have a label."""
    found = [(str(r["label"]) == "1", x) for r, x in zip(rows, labels, strict=True) if x.status == "ok"]
    there = [right(x.meta["first_forward"], gold) for gold, x in found]
    both = [right(x.probability or 0.0, gold) for gold, x in found]
    back = [right(1 - x.meta["first_reverse"], gold) for gold, x in found]
    return {
        "pairs": f"{len(found)} of {len(rows)}",
        "accuracy, both orders": share(both),
        "accuracy, order of the data": share(there),
        "both beside order of the data": paired(both, there),
        "accuracy, the other order": share(back),
        "both beside the other order": paired(both, back),
        "same position in both orders": share(
            [(x.meta["first_forward"] > 0.5) == (x.meta["first_reverse"] > 0.5) for _, x in found]
        ),
        "first position": share([x.meta[f"first_{order}"] > 0.5 for _, x in found for order in ("forward", "reverse")]),
        "the longer one is better": share(
            [(len(r["output_1"]) > len(r["output_2"])) == (g == "1") for r, g in longer(rows)]
        ),
        "label mass, least": f"{min(x.meta['mass'] for _, x in found):.3f}",
    }


def longer(rows: Sequence[dict[str, str]]) -> list[tuple[dict[str, str], str]]:
    """Rows of which the outputs differ in length, with the label."""
    return [(row, str(row["label"])) for row in rows if len(row["output_1"]) != len(row["output_2"])]


def main() -> None:
    """Start the server, label the pairs, print the metrics."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--gguf", required=True, help="weights of the judge")
    options.add_argument("--data", required=True, help="dataset.json of LLMBar")
    options.add_argument("--task", default="helpful", help="judging task")
    options.add_argument("--limit", type=int, default=None, help="first pairs only")
    options.add_argument("--threads", type=int, default=1, help="threads of the server")
    options.add_argument("--port", type=int, default=18471, help="free port on loopback")
    options.add_argument("--journal", default="runs/judge_llmbar.sqlite", help="file of the replies")
    arguments = options.parse_args()
    import xllamacpp

    rows = json.loads(Path(arguments.data).read_text())[: arguments.limit]
    params = xllamacpp.CommonParams()
    params.model.path = arguments.gguf
    params.n_ctx, params.n_parallel = 8192, 2
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = arguments.threads
    params.hostnames, params.port = ["127.0.0.1"], arguments.port
    running = xllamacpp.Server(params)
    server = JudgeServer(
        f"{running.listening_address}/v1",
        Path(arguments.gguf).name,
        assistant_prefill=True,
        requests=RequestOptions(concurrency=2),
        timeout=600.0,
        journal=arguments.journal,
    )
    labeler = ServerLabeler(server, task=arguments.task)
    wall, cpu = time.perf_counter(), time.process_time()
    labels: list[Label] = []
    pairs = comparisons(rows)
    for start in range(0, len(pairs), 10):
        labels += labeler.label(pairs[start : start + 10], Key((0,)))
        print(f"{len(labels)} pairs, {time.process_time() - cpu:.0f} CPU-s", flush=True)
    metrics = {
        **table(rows, labels),
        "CPU seconds": f"{time.process_time() - cpu:.0f}",
        "wall seconds": f"{time.perf_counter() - wall:.0f}",
        **{name: f"{value:.4g}" for name, value in server.report().items()},
        "machine": f"{platform.machine()}, {arguments.threads} thread(s)",
    }
    for name, value in metrics.items():
        print(f"{name:32} {value}")


if __name__ == "__main__":
    main()
