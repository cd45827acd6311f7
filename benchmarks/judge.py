"""Reading a local judge: candidates that share a preamble, and pairs in both orders.

    python -m benchmarks.judge --model smollm2 --repeats 5

Token ids are random: the work does not depend on them. `--batch` is the number of candidates, and of pairs. "One
forward pass per candidate" computes logits where they are read and nowhere else, so that only the sharing differs.
"""

from __future__ import annotations

import random
from typing import Any

from benchmarks.harness import Clock, Job, check_same, operations, parser, report, run, timed, work


PREAMBLE, CONTEXT, CANDIDATE, ENDING = 1000, 800, 60, 6


def texts(job: Job, vocabulary: int) -> list[list[int]]:
    """Token ids of the prompts: one per candidate, or one or two per pair."""
    generator = random.Random(0)

    def ids(length: int) -> list[int]:
        return [generator.randrange(10, vocabulary) for _ in range(length)]

    ending = ids(ENDING)
    if job.options["what"] == "scores":
        preamble = ids(PREAMBLE)
        return [preamble + ids(CANDIDATE) + ending for _ in range(job.batch)]
    preamble, found = ids(100), []
    for _ in range(job.batch):
        context, first, second = ids(CONTEXT), ids(CANDIDATE), ids(CANDIDATE)
        found.append(preamble + context + first + second + ending)
        if job.options["what"] == "both orders":
            found.append(preamble + context + second + first + ending)
    return found


def ours(job: Job) -> dict[str, Any]:
    """Read the next token behind every prompt, and behind every prompt and a "1" where scores are read."""
    import torch
    from transformers import AutoModelForCausalLM

    from lightning_rlhf.logprobs.prefix_tree import next_token_logps

    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).eval().to(job.device)
    prompts = texts(job, model.config.vocab_size)
    one, targets = [5], list(range(10))
    scores = job.options["what"] == "scores"
    clock = Clock(job.device)
    next_token_logps(model, [[3, 4, 5]], targets)  # the model is probed once
    clock.start()
    for _ in range(job.skip + job.steps):
        if job.options.get("alone"):
            found = []
            with torch.no_grad():
                for prompt in prompts:
                    row = torch.tensor([prompt + one if scores else prompt], device=job.device)
                    logits = model(input_ids=row, logits_to_keep=2 if scores else 1, use_cache=False).logits[0]
                    found.append(logits.log_softmax(-1)[:, targets])
            logps = torch.cat(found)
        else:
            logps = next_token_logps(
                model, [p + end for p in prompts for end in ([[], one] if scores else [[]])], targets
            )
        clock.tick()
    # a prefix that is shared is read once, so that this may exceed the peak
    counted = {"operations": operations(model, sum(map(len, prompts)), training=False)}
    return timed(clock, job, tokens=sum(map(len, prompts)), mean=logps.double().mean().item(), **counted)


def main() -> None:
    """Run the arms and print the tables."""
    options = parser(__doc__.splitlines()[0], batch=64, steps=1, skip=0)
    arguments = options.parse_args()
    if arguments.worker:
        work(arguments.worker, {"ours": ours})
        return
    arms: dict[str, dict[str, Any]] = {
        "ours": {"what": "scores"},
        "one forward pass per candidate": {"what": "scores", "alone": True},
        "pairs, one order": {"what": "one order"},
        "pairs, both orders": {"what": "both orders"},
        "pairs, both orders, one forward pass each": {"what": "both orders", "alone": True},
    }
    results = run("benchmarks.judge", arms, arguments)
    check_same(results["ours"][0], results["one forward pass per candidate"][0], ["mean"])
    check_same(results["pairs, both orders"][0], results["pairs, both orders, one forward pass each"][0], ["mean"])
    report("judge", arguments, results)


if __name__ == "__main__":
    main()
