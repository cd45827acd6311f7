"""Predictions of ``lightning-rlhf plan``, beside measurements of a CPU: memory and time of a DPO step."""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from pathlib import Path

from benchmarks.harness import machine


def main() -> None:
    """Take two steps and print both sides."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--hidden", type=int, default=768)
    options.add_argument("--layers", type=int, default=8)
    options.add_argument("--pairs", type=int, default=4)
    options.add_argument("--prompt", type=int, default=128)
    options.add_argument("--response", type=int, default=64)
    options.add_argument("--steps", type=int, default=2, help="steps timed, after one that is not")
    chosen = options.parse_args()

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lightning_rlhf.commands.plan import TILE_BYTES, Device, Load, Shape, estimate
    from lightning_rlhf.logprobs.compute import summed_logps

    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden, heads = chosen.hidden, chosen.hidden // 64
    shape = Shape(chosen.layers, hidden, 3 * hidden, heads, heads // 2, 64, 8192, tied=True)

    def rss() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    # speed of matrix products of this size here
    a, b = torch.randn(1024, hidden), torch.randn(hidden, 3 * hidden)
    a @ b
    start = time.process_time()
    for _ in range(20):
        a @ b
    flops = 20 * 2 * a.shape[0] * b.numel() / (time.process_time() - start)

    bare = rss()
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=64,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).train()
    counted = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    groups = []
    for _ in range(chosen.pairs):
        ids = torch.randint(8192, (chosen.prompt + 2 * chosen.response,)).tolist()
        prompt, rest = ids[: chosen.prompt], ids[chosen.prompt :]
        groups.append((tuple(prompt), (tuple(rest[: chosen.response]), tuple(rest[chosen.response :]))))
    seconds = []
    for _ in range(1 + chosen.steps):
        start = time.process_time()
        margin = summed_logps(model, groups).view(-1, 2)
        loss = -torch.nn.functional.logsigmoid(0.1 * (margin[:, 0] - margin[:, 1])).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - bare

    tokens = chosen.pairs * (chosen.prompt + 2 * chosen.response)
    load = Load(chosen.pairs, chosen.prompt, chosen.response, rows=8, tokens_per_pass=tokens)
    found = estimate(shape, load, Device(64, flops / 1e12, 10.0), 1, weight_bytes=4)
    # this step has no reference, and its tile is small: the head sees few positions
    predicted = sum(found.training.values()) - found.training["reference"] - TILE_BYTES
    result = {
        "parameters": [shape.parameters, counted],
        "gflops": round(flops / 1e9, 1),
        "memory_mb": {"predicted": round(predicted / 2**20), "measured": round(peak / 2**20)},
        "seconds": {"predicted": round(found.seconds["training"], 2), "measured": round(min(seconds[1:]), 2)},
    }
    about = {"benchmark": "plan_check", **vars(chosen), "machine": machine(), "date": time.strftime("%Y-%m-%d")}
    print(json.dumps({**about, **result}))


if __name__ == "__main__":
    main()
