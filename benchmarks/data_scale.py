"""Memory, CPU time and wall time before the first optimizer step of offline DPO, by the number of rows.

    python -m benchmarks.data_scale --peer trl
    python -m benchmarks.data_scale --peer trl --only "TRL with live reference"
    python -m benchmarks.data_scale --rows 1000,10000,100000,1000000 --length hh
    python -m benchmarks.data_scale --rows 1000,10000 --length short --set rounds.reference_logps=all

The rows are pieces of the standard library in a file that the benchmark writes, the model is a random one of 1 M
parameters, and every run takes three steps. A cold run reads and tokenizes the file; a warm one comes after it and
finds the caches on disk. CPU time is that of all processes, and memory is that of the one that trains: children that
tokenize rows share most of theirs with it, and end before the first step. Both are per row above the smallest run of
the same arm, so that the libraries, the model and the steps themselves drop out.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import Job, bare_trainer, corpus, machine, model_folder, parser, process, save_llama, work


LENGTHS = {"hh": ((150, 900), (60, 500)), "short": ((40, 80), (40, 80))}
"""Characters of prompts and of responses; those of HH-RLHF have 600 and 300 in the mean."""
OURS, PEER, LIVE = "ours", "TRL with precomputed reference", "TRL with live reference"


def write_rows(path: Path, count: int, length: str) -> None:
    """Write preference rows, pieces of the standard library, as JSON lines."""
    text = "\n".join(corpus())
    numbers = random.Random(1)

    def piece(low: int, high: int) -> str:
        size = numbers.randint(low, high)
        start = numbers.randrange(len(text) - size)
        return text[start : start + size]

    prompt, response = LENGTHS[length]
    with path.open("w", encoding="utf-8") as stream:
        for number in range(count):
            # numbered, so that no two completions are the same
            pair = {side: f"{number} {piece(*response)}" for side in ("chosen", "rejected")}
            stream.write(json.dumps({"prompt": piece(*prompt) + "\n", **pair}) + "\n")


def tiny_model(folder: Path) -> str:
    """A random Llama of one layer, with the tokenizer of the small model of the other benchmarks."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder("small"))
    tokenizer.save_pretrained(folder)
    save_llama(folder, len(tokenizer), width=64, inner=128, layers=1, heads=2)
    return str(folder)


def cpu_seconds() -> float:
    """CPU time of this process and of the children that have ended."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


class Start:
    """Costs from the making of a trainer to its first optimizer step, and the peak of memory at the end."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), cpu_seconds()
        self.first: dict[str, float] = {}

    def begin(self) -> None:
        """Note the first step."""
        if not self.first:
            self.first = {"wall": time.perf_counter() - self.wall, "cpu": cpu_seconds() - self.cpu}

    def report(self) -> dict[str, Any]:
        """The result of the worker."""
        return {**self.first, "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def ours(job: Job) -> dict[str, Any]:
    """`DPOModule` on recorded pairs."""
    import lightning as L
    from torch.optim import AdamW

    from lightning_rlhf import DPOModule, PreferenceDataModule
    from lightning_rlhf.datamodules.options import PreferenceRoundOptions, PromptOptions
    from lightning_rlhf.generation.base import Decoding
    from lightning_rlhf.labelers import RecordedLabeler
    from lightning_rlhf.prompts import DatasetPrompts
    from lightning_rlhf.samplers import OfflineSampler

    start = Start()

    class Begins(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            start.begin()

    settings: dict[str, dict[str, Any]] = {"rounds": {}, "prompt_options": {}}
    for name, value in job.options["set"]:
        group, _, field = name.partition(".")
        settings[group][field] = value
    module = DPOModule(job.model, optimizer=partial(AdamW, lr=1e-5, weight_decay=0.0))
    data = PreferenceDataModule(
        DatasetPrompts(job.data),
        OfflineSampler(),
        RecordedLabeler(),
        pairs_per_batch=job.batch,
        decoding=Decoding(max_new_tokens=512),
        prompt_options=PromptOptions(max_prompt_tokens=1024, on_long_prompt="drop", **settings["prompt_options"]),
        rounds=PreferenceRoundOptions(epochs_per_round=None, **settings["rounds"]),
    )
    with tempfile.TemporaryDirectory() as folder:
        bare_trainer(job, folder, [Begins()], max_epochs=1, max_steps=job.steps).fit(module, datamodule=data)
        ledger = Path(folder) / "ledger.sqlite"
        return {**start.report(), "ledger_mb": ledger.stat().st_size / 2**20}


def trl(job: Job) -> dict[str, Any]:
    """`DPOTrainer` on the same file; with ``precompute_ref_log_probs`` it scores all rows before the first step."""
    from datasets import load_dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    start = Start()

    class Begins(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            start.begin()

    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False}
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            folder,
            per_device_train_batch_size=job.batch,
            max_steps=job.steps,
            max_length=1536,
            gradient_checkpointing=False,
            precompute_ref_log_probs=job.options["precompute"],
            **quiet,
        )
        trainer = DPOTrainer(
            model=job.model,
            args=config,
            train_dataset=load_dataset("json", data_files=job.data, split="train"),
            processing_class=AutoTokenizer.from_pretrained(job.model),
            callbacks=[Begins()],
        )
        trainer.train()
    return start.report()


def table(found: dict[str, dict[int, dict[str, float]]], sizes: Sequence[int]) -> list[str]:
    """Lines of the Markdown table: costs by arm and rows, above the smallest run of the arm."""
    header = ["arm", "rows", "peak MB", "KB a row above", "CPU ms a row above", "s to first step", "ledger MB"]
    lines = [header, ["---"] * len(header)]
    for arm, runs in found.items():
        least = runs[sizes[0]]
        for size in sizes:
            run, more = runs[size], max(size - sizes[0], 1)
            memory, cpu = (run["rss_mb"] - least["rss_mb"]) * 1024 / more, (run["cpu"] - least["cpu"]) * 1e3 / more
            above = ["", ""] if size == sizes[0] else [f"{memory:.2f}", f"{cpu:.3f}"]
            ledger = f"{run['ledger_mb']:.1f}" if "ledger_mb" in run else ""
            lines.append([arm, f"{size:,}", f"{run['rss_mb']:.0f}", *above, f"{run['wall']:.1f}", ledger])
    return ["| " + " | ".join(line) + " |" for line in lines]


def measure(arguments: Any, folder: Path) -> dict[str, dict[int, dict[str, float]]]:
    """Run every arm on every number of rows, cold and warm."""
    os.environ["LIGHTNING_RLHF_CACHE"] = os.environ.get("LIGHTNING_RLHF_CACHE") or str(folder / "cache")
    os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
    model = tiny_model(folder / "model")
    changes = [setting.split("=", 1) for setting in arguments.set]
    arms: dict[str, dict[str, Any]] = {OURS: {"set": changes}}
    if arguments.peer == "trl":
        arms[PEER] = {"worker": "trl", "precompute": True}
        arms[LIVE] = {"worker": "trl", "precompute": False}
    if arguments.only:
        arms = {name: arm for name, arm in arms.items() if name == OURS or name in arguments.only.split(",")}
    found: dict[str, dict[int, dict[str, float]]] = {}
    for size in arguments.rows:
        rows = folder / f"{size}.jsonl"
        write_rows(rows, size, arguments.length)
        for name, options in arms.items():
            job = Job(model, str(rows), "", arguments.batch, 3, 0, 0, arguments.threads, name, options)
            for turn in ("cold", "warm"):
                arm = f"{name}, {turn}"
                found.setdefault(arm, {})[size] = process("benchmarks.data_scale", job)
                print(f"{arm}, {size} rows: {found[arm][size]}", file=sys.stderr, flush=True)
        rows.unlink()
    return found


def main() -> None:
    """Run the arms and print the table."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument(
        "--rows",
        type=lambda text: sorted(map(int, text.split(","))),
        default=[1_000, 10_000],
        help="numbers of rows, separated by commas",
    )
    options.add_argument("--length", choices=sorted(LENGTHS), default="hh", help="length of the rows")
    options.add_argument("--set", action="append", default=[], help="a setting of rounds or prompt_options, name=value")
    arguments = options.parse_args()
    if arguments.worker:
        work(arguments.worker, {"ours": ours, "trl": trl})
        return
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments, Path(folder))
    for line in table(found, arguments.rows):
        print(line)
    settings = {"rows": arguments.rows, "length": arguments.length, "batch": arguments.batch, "set": arguments.set}
    line = json.dumps(
        {"benchmark": "data_scale", **settings, "machine": machine(), "date": time.strftime("%Y-%m-%d"), **found}
    )
    print(line)
    if arguments.out is not None:
        with arguments.out.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")


if __name__ == "__main__":
    main()
