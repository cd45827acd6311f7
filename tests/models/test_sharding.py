"""FSDP2 in two processes: rank zero alone reads weights, and what is in the shards is the whole model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer


def run(policy: Path, *checks: str) -> str:
    """Run some of the checks in two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, str(Path(__file__).with_name("sharded_checks.py")), str(policy), *checks],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="session")
def tied_policy(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny policy with one tensor for embedding and head."""
    folder = tmp_path_factory.mktemp("tied")
    model = AutoModelForCausalLM.from_pretrained(tiny_policy)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_policy).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_shards_hold_the_whole_model(tiny_policy: Path) -> None:
    said = run(tiny_policy, "policy", "adapters", "scorer", "reference", "no_weights")
    assert sorted(said.splitlines()) == [
        "rank 0: FileNotFoundError: no weights here",
        "rank 1: RankError: process 0 of 2 stopped with FileNotFoundError: no weights here",
    ]


@pytest.mark.slow
def test_tied_weights_stay_tied(tied_policy: Path) -> None:
    run(tied_policy, "policy", "reference")
