"""One round of online DPO: sample two responses per prompt, label them, and take the optimizer step.

    python -m benchmarks.online_round --model small --peer trl

From the end of one step to the end of the next, by ``lightning.Trainer.fit`` with the ledger on disk. The labeler
counts a letter, which costs nothing, for both sides. Ours computes the log-probabilities of policy and reference of
every response when it samples; the peer computes them in its step.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import MAX_PROMPT, Clock, Job, Rows, bare_trainer, check_same, parser, report, run, timed, work


def ours(job: Job) -> dict[str, Any]:
    """`DPOModule` with rounds of one batch."""
    import lightning as L
    import torch
    from torch.optim import AdamW

    from lightning_rlhf import DPOModule, PreferenceDataModule
    from lightning_rlhf.callbacks import RewardMonitor
    from lightning_rlhf.datamodules.options import PreferenceRoundOptions, PromptOptions
    from lightning_rlhf.generation.base import Decoding
    from lightning_rlhf.labelers import RewardLabeler
    from lightning_rlhf.models.load import LoRA
    from lightning_rlhf.rewards import AbstractReward, RewardOutput
    from lightning_rlhf.samplers import PILAFSampler, VanillaSampler

    class CountE(AbstractReward):
        def score(self, prompts: Any, responses: Any) -> RewardOutput:
            del prompts
            return RewardOutput(torch.tensor([r.text.count("e") / (len(r.text) + 1) for r in responses]))

    clock, first = Clock(job.device), {}

    class Ticks(L.Callback):
        def on_train_start(self, *_: Any) -> None:
            clock.start()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            clock.tick()
            first.setdefault("loss", float(outputs["loss"]))

    lora = LoRA(r=16, alpha=32) if job.options.get("lora") else None
    module = DPOModule(job.model, optimizer=partial(AdamW, lr=1e-5, weight_decay=0.0), lora=lora)
    total = job.batch * (job.steps + job.skip)
    data = PreferenceDataModule(
        Rows(job.data, total, module.tokenizer),
        PILAFSampler() if job.options.get("pilaf") else VanillaSampler(),
        RewardLabeler(CountE(), "argmax"),
        rounds=PreferenceRoundOptions(prompts_per_round=job.batch),
        pairs_per_batch=job.batch,
        decoding=Decoding(max_new_tokens=job.new_tokens),
        prompt_options=PromptOptions(max_prompt_tokens=MAX_PROMPT, on_long_prompt="drop"),
    )
    folder = tempfile.mkdtemp()
    trainer = bare_trainer(job, folder, [RewardMonitor(), Ticks()], max_steps=job.steps + job.skip)
    trainer.fit(module, datamodule=data)
    assert (Path(folder) / "ledger.sqlite").exists()
    return timed(clock, job, tokens=2 * job.batch * job.new_tokens, **first)


def main() -> None:
    """Run the arms and print the table."""
    arguments = parser(__doc__.splitlines()[0], steps=2).parse_args()
    if arguments.worker:
        work(arguments.worker, {"ours": ours})
        return
    arms: dict[str, dict[str, Any]] = {"ours": {}}
    if arguments.ablate:
        arms |= {"ours, PILAF": {"pilaf": True}, "ours, LoRA": {"lora": True}}
    if arguments.peer == "trl":
        peer = {"module": "benchmarks.trl_peer", "worker": "online"}
        arms["TRL, default"] = peer
        arms["TRL, best"] = {**peer, "gradient_checkpointing": False}
    results = run("benchmarks.online_round", arms, arguments)
    for name, found in results.items():
        if name.startswith("TRL"):
            check_same(results["ours"][0], found[0], ["loss"])
            print(f"first step of {name}: the loss agrees to 1e-4", file=sys.stderr)
    report("online_round", arguments, results)


if __name__ == "__main__":
    main()
