"""One DPO optimizer step, from the end of one to the end of the next, by ``lightning.Trainer.fit``.

    python -m benchmarks.dpo_step --model small --peer trl
    python -m benchmarks.dpo_step --model small --peer trl --bf16
    python -m benchmarks.dpo_step --model small --ablate
    python -m benchmarks.dpo_step --model smollm2 --data hh:harmless-base.test.jsonl.gz --steps 1 --skip 0 --peer trl

Reference log-probabilities are computed when the round is sampled, once per pair; that is outside of the step, as TRL's
precomputed ones are, and reported on its own. The limit is a bare forward and backward pass over just the tokens that
are needed, one row per pair and the head on the response tokens: no loss, no optimizer, no framework.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from functools import partial
from typing import Any

from benchmarks.harness import (
    MAX_PROMPT,
    MAX_RESPONSE,
    Clock,
    Job,
    Rows,
    bare_trainer,
    check_same,
    operations,
    pair_tokens,
    parser,
    read_ids,
    report,
    run,
    timed,
    work,
)


ABLATIONS: dict[str, dict[str, Any]] = {
    "padded rows": {"layout": "padded"},
    "shared prompt by a dense mask": {"layout": "shared"},
    "one micro-batch per step": {"max_tokens_per_micro_batch": None},
    "head on all positions": {"full_head": True},
    "live reference": {"live_reference": True},
    "all of these but live reference, padded": {
        "layout": "padded",
        "max_tokens_per_micro_batch": None,
        "full_head": True,
    },
    "new memory for each tile of logits": {"new_tiles": True},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "bfloat16": {"precision": "bf16-mixed"},
}


def ours(job: Job) -> dict[str, Any]:
    """`DPOModule` on recorded pairs."""
    import lightning as L
    from torch.optim import AdamW

    from lightning_rlhf import DPOModule, ModelOptions, PreferenceDataModule
    from lightning_rlhf.callbacks import RewardMonitor
    from lightning_rlhf.datamodules.options import BatchOptions, PreferenceRoundOptions, PromptOptions
    from lightning_rlhf.generation.base import Decoding
    from lightning_rlhf.labelers import RecordedLabeler
    from lightning_rlhf.logprobs import compute, head
    from lightning_rlhf.samplers import OfflineSampler

    options = dict(job.options)
    clock, first = Clock(job.device), {}
    if options.get("new_tiles"):
        head._take_buffer = lambda *_: None  # type: ignore[assignment]
        head.SCRATCH_BYTES = head.LOGIT_BYTES

    class Ticks(L.Callback):
        def on_train_start(self, *_: Any) -> None:
            if options.get("full_head"):
                compute._support(module.policy).gathered = "the benchmark asks for it"
                compute._support(module.policy).warned.add("gathered")
            clock.start()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            clock.tick()
            if not first:
                names = {"chosen": "logps/chosen", "rejected": "logps/rejected"}
                first.update({key: float(trainer.callback_metrics[f"train/{name}"]) for key, name in names.items()})
                first["loss"] = float(outputs["loss"])

    class LiveReference(DPOModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with self.reference.active() as model:
                compute.summed_logps(model, batch.groups(), tokens_per_batch=1024)
            return super().training_step(batch, batch_idx)

    kind = LiveReference if options.get("live_reference") else DPOModule
    module = kind(
        job.model,
        optimizer=partial(AdamW, lr=1e-5, weight_decay=0.0),
        options=ModelOptions(
            layout=options.get("layout", "auto"), gradient_checkpointing=options.get("gradient_checkpointing", False)
        ),
    )
    total = job.batch * (job.steps + job.skip)
    data = PreferenceDataModule(
        Rows(job.data, total, module.tokenizer),
        OfflineSampler(),
        RecordedLabeler(),
        pairs_per_batch=job.batch,
        batching=BatchOptions(max_tokens_per_micro_batch=options.get("max_tokens_per_micro_batch", "auto")),
        decoding=Decoding(max_new_tokens=MAX_RESPONSE),
        prompt_options=PromptOptions(max_prompt_tokens=MAX_PROMPT, on_long_prompt="drop"),
        rounds=PreferenceRoundOptions(epochs_per_round=None),
    )
    trainer = bare_trainer(
        job, tempfile.mkdtemp(), [RewardMonitor(), Ticks()], max_epochs=1, precision=options.get("precision", "32-true")
    )
    before = time.process_time()
    trainer.fit(module, datamodule=data)
    once = time.process_time() - before - sum(clock.cpu)
    extra = {"setup CPU s": round(once, 1)}
    tokens = pair_tokens(job)
    work_of_step = operations(module.policy, tokens, training=True)
    return timed(clock, job, tokens=tokens, operations=work_of_step, **first, **extra)


def limit(job: Job) -> dict[str, Any]:
    """Bare forward and backward pass over the tokens that are needed."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).train()
    trunk, head = model.get_decoder(), model.get_output_embeddings()
    bf16 = job.options.get("precision") == "bf16-mixed"
    model.to(job.device)
    clock = Clock(job.device)
    clock.start()
    for step in read_ids(job):
        model.zero_grad(set_to_none=True)
        for row in step:
            ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"] + row["rejected_ids"]], device=job.device)
            responses = ids[0, len(row["prompt_ids"]) :]
            with torch.autocast(job.device, dtype=torch.bfloat16, enabled=bf16):
                hidden = trunk(ids, use_cache=False).last_hidden_state[0, -len(responses) :]
                logits = head(hidden)
            torch.nn.functional.cross_entropy(logits.float(), responses, reduction="sum").backward()
        clock.tick()
    tokens = pair_tokens(job)
    return timed(clock, job, tokens=tokens, operations=operations(model, tokens, training=True))


def main() -> None:
    """Run the arms and print the table."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--bf16", action="store_true", help="bfloat16 autocast on both sides")
    arguments = options.parse_args()
    if arguments.worker:
        work(arguments.worker, {"ours": ours, "limit": limit})
        return
    arms: dict[str, dict[str, Any]] = {"ours": {}, "limit": {"worker": "limit"}}
    if arguments.ablate:
        arms |= ABLATIONS
    if arguments.peer == "trl":
        peer = {"module": "benchmarks.trl_peer", "worker": "dpo"}
        arms["TRL, default"] = peer
        arms["TRL, best"] = {**peer, "gradient_checkpointing": False, "precompute_ref_log_probs": True}
    if arguments.bf16:
        arms = {
            name: {**arm, **({"bf16": True} if name.startswith("TRL") else {"precision": "bf16-mixed"})}
            for name, arm in arms.items()
        }
    results = run("benchmarks.dpo_step", arms, arguments)
    for name, found in results.items():
        if name.startswith("TRL"):
            tolerance = 1e-2 if arguments.bf16 else 1e-4
            check_same(results["ours"][0], found[0], ["loss", "chosen", "rejected"], tolerance)
            print(f"first step of {name}: the loss and both log-probabilities agree to {tolerance:g}", file=sys.stderr)
    report("dpo_step", arguments, results, ["setup CPU s"])
    if "limit" in results:
        clock = "cpu" if arguments.device == "cpu" else "wall"
        shares = [bare[clock] / mine[clock] for mine, bare in zip(results["ours"], results["limit"], strict=True)]
        print(f"share of the limit: {statistics.median(shares):.0%} ({min(shares):.0%} - {max(shares):.0%})")


if __name__ == "__main__":
    main()
