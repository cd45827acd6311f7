"""Sampling pairs: vanilla and PILAF, with a full copy as reference and under LoRA, beside ``generate`` of transformers.

    python -m benchmarks.generation --model small

Nothing ends a response before its limit, so all arms sample as many tokens. ``base`` pairs are vanilla ones, tilted
ones decode under policy and reference at once; PILAF flips a coin between the two, so that a round of it is timed as
half of each. Reference log-probabilities of vanilla responses, which training needs, are a pass of their own and timed
in the arms that say so.
"""

from __future__ import annotations

import math
import statistics
import sys
from typing import Any

from benchmarks.harness import Clock, Job, padded_left, parser, read_ids, report, run, timed, work


def ours(job: Job) -> dict[str, Any]:
    """`DecodeEngine`, two responses per prompt."""
    import torch

    from lightning_rlhf.generation import DecodeEngine, Decoding, Request
    from lightning_rlhf.models.load import LoRA, load_policy, load_tokenizer
    from lightning_rlhf.models.reference import build_reference
    from lightning_rlhf.randomness import Key
    from lightning_rlhf.types import Prompt

    options = job.options
    policy: Any = load_policy(job.model, lora=LoRA(r=16, alpha=32) if options.get("lora") else None).to(job.device)
    engine = DecodeEngine(
        policy,
        build_reference(policy, "fixed"),
        load_tokenizer(job.model),
        beta=0.1,
        decoding=Decoding(max_new_tokens=job.new_tokens, rows=options.get("rows", 32)),
        eos_ids=[],
    )
    tilted = {"base": 0.0, "pilaf": 0.5, "tilt": 1.0}[options["pairs"]]
    clock = Clock(job.device)
    clock.start()
    for step in read_ids(job):
        requests = []
        for i, row in enumerate(step):
            prompt = Prompt(i, tuple(row["prompt_ids"]), "")
            mix = 0.1 if i < tilted * len(step) else 0.0
            requests += [Request(prompt, Key((i, 0)), mix), Request(prompt, Key((i, 1)), -mix)]
        with torch.no_grad():
            engine.generate(requests, reference_logps=options.get("reference_logps", False))
        clock.tick()
    # every token of a batch of rows reads all weights of the policy once
    reads = (
        sum(p.nbytes for p in policy.parameters()) * job.new_tokens * math.ceil(2 * job.batch / engine.decoding.rows)
    )
    return timed(clock, job, tokens=2 * job.batch * job.new_tokens, bytes=reads)


def transformers(job: Job) -> dict[str, Any]:
    """``model.generate`` with its KV cache and filled-up prompts, two responses per prompt."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).eval().to(job.device)
    model.generation_config.eos_token_id = None
    clock = Clock(job.device)
    clock.start()
    for step in read_ids(job):
        ids, mask = padded_left([row["prompt_ids"] for row in step], job.device)
        model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            num_return_sequences=2,
            max_new_tokens=job.new_tokens,
            pad_token_id=0,
        )
        clock.tick()
    return timed(clock, job, tokens=2 * job.batch * job.new_tokens)


def main() -> None:
    """Run the arms and print the table."""
    arguments = parser(__doc__.splitlines()[0], batch=16).parse_args()
    if arguments.worker:
        work(arguments.worker, {"ours": ours, "transformers": transformers})
        return
    arms: dict[str, dict[str, Any]] = {
        "vanilla, full copy": {"pairs": "base"},
        "PILAF, full copy": {"pairs": "pilaf"},
        "vanilla, LoRA": {"pairs": "base", "lora": True},
        "PILAF, LoRA": {"pairs": "pilaf", "lora": True},
        "vanilla, full copy, with reference log-probabilities": {"pairs": "base", "reference_logps": True},
        "PILAF, full copy, with reference log-probabilities": {"pairs": "pilaf", "reference_logps": True},
        "transformers, vanilla": {"worker": "transformers"},
    }
    results = run("benchmarks.generation", arms, arguments)
    report("generation", arguments, results, ours="vanilla, full copy")
    for kind in ("full copy", "LoRA", "full copy, with reference log-probabilities"):
        pairs = zip(results[f"PILAF, {kind}"], results[f"vanilla, {kind}"], strict=True)
        ratios = [pilaf["cpu"] / vanilla["cpu"] for pilaf, vanilla in pairs]
        print(f"PILAF / vanilla, {kind}: {statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})")
    print("the paper's accounting: 1.5", file=sys.stderr)


if __name__ == "__main__":
    main()
