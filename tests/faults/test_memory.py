"""Memory that runs out while responses are sampled: fewer rows at a time, the same responses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
SCRIPT = """
import resource, sys, warnings
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from lightning_rlhf.generation.base import Decoding, Request
from lightning_rlhf.generation.engine import DecodeEngine
from lightning_rlhf.randomness import Key
from lightning_rlhf.types import Prompt

torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
prompts = [Prompt(n, tuple(range(10, 60)), "") for n in range(int(sys.argv[2]))]
requests = [Request(p, Key((p.index,))) for p in prompts]

def draw(rows):
    engine = DecodeEngine(model, None, tokenizer, beta=1.0, decoding=Decoding(40, rows=rows), eos_ids=[])
    with torch.no_grad():
        return engine, engine.generate(requests)

expected = draw(64)[1]
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + int(float(sys.argv[3]) * 2**20),) * 2)
with warnings.catch_warnings(record=True) as noted:
    warnings.simplefilter("always")
    try:
        engine, got = draw(len(requests))
    except MemoryError as error:
        print("refused", error)
        sys.exit()
print(engine.rows, draw(len(requests))[0].rows, sum(a.ids != b.ids for a, b in zip(expected, got, strict=True)))
print(next(str(w.message) for w in noted if "memory ran out" in str(w.message)))
"""


def run(policy: Path, *arguments: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(policy), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit on address space is Linux's")
def test_rows_are_halved_until_they_fit_and_responses_stay(tiny_policy: Path) -> None:
    # the caches of 4096 rows take more than 100 MB
    figures, message = run(tiny_policy, "4096", "60")
    rows, later, different = map(int, figures.split())
    assert 1 <= rows < 4096
    assert later <= rows  # the next engine of the same policy begins with the size that fitted
    assert different == 0
    assert "data.decoding.rows=" in message
