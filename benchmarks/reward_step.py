"""One optimizer step of a reward model under the Bradley-Terry loss, prompts shared, beside TRL's RewardTrainer.

    python -m benchmarks.reward_step --model small --peer trl

Ours is `lightning_rlhf.logprobs.scores.response_scores` in passes of 1024 tokens, with clipping and AdamW.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import (
    Clock,
    Job,
    check_same,
    model_folder,
    operations,
    pair_tokens,
    parser,
    read_ids,
    report,
    run,
    timed,
    work,
)


TOKENS_PER_PASS = 1024


def ours(job: Job) -> dict[str, Any]:
    """Plain loop: the reward model of the library adds logging and nothing else to it."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from lightning_rlhf.batching.steps import plan
    from lightning_rlhf.logprobs.scores import response_scores

    model = (
        AutoModelForSequenceClassification.from_pretrained(job.options["folder"], dtype=torch.float32)
        .train()
        .to(job.device)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    layout = job.options.get("layout", "auto")
    limit = job.options.get("tokens_per_pass", TOKENS_PER_PASS)
    clock, losses = Clock(job.device), []
    clock.start()
    for rows in read_ids(job):
        groups = [(row["prompt_ids"], (row["chosen_ids"], row["rejected_ids"])) for row in rows]
        lengths = [len(prompt) + len(a) + len(b) for prompt, (a, b) in groups]
        (step,) = plan(list(range(len(rows))), lengths, len(rows), limit)
        places, total = iter(step.indices), 0.0
        for size in step.micro_batches:
            part = [groups[next(places)] for _ in range(size)]
            chosen, rejected = response_scores(model.base_model, model.score, part, layout=layout).view(-1, 2).unbind(1)
            loss = -torch.nn.functional.logsigmoid(chosen - rejected).sum() / len(rows)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        clock.tick()
    tokens = pair_tokens(job)
    return timed(clock, job, tokens=tokens, operations=operations(model, tokens, training=True), loss=losses[0])


def scorer_folder(name: str) -> str:
    """The model with a random scalar head, saved once, so that all arms start from the same."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from lightning_rlhf.models.cache import cached

    model = model_folder(name)

    def make(folder: Path) -> None:
        torch.manual_seed(0)
        scorer = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(model)
        scorer.config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        scorer.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return str(cached("benchmark-scorer", model.name, make))


def main() -> None:
    """Run the arms and print the table."""
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    if arguments.worker:
        work(arguments.worker, {"ours": ours})
        return
    folder = {"folder": scorer_folder(arguments.model)}
    arms: dict[str, dict[str, Any]] = {"ours": folder}
    if arguments.ablate:
        arms["padded rows"] = {**folder, "layout": "padded"}
        arms["one pass per step"] = {**folder, "tokens_per_pass": None}
    if arguments.peer == "trl":
        peer = {**folder, "module": "benchmarks.trl_peer", "worker": "reward"}
        arms["TRL, default"] = peer
        arms["TRL, best"] = {**peer, "gradient_checkpointing": False}
    results = run("benchmarks.reward_step", arms, arguments)
    for name, found in results.items():
        if name.startswith("TRL"):
            check_same(results["ours"][0], found[0], ["loss"])
            print(f"first step of {name}: the loss agrees to 1e-4", file=sys.stderr)
    report("reward_step", arguments, results)


if __name__ == "__main__":
    main()
