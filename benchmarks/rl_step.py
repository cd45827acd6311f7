"""One step of RLOO or GRPO: sample four responses per prompt, score them, and take the optimizer step.

    python -m benchmarks.rl_step --method rloo --model small --peer trl
    python -m benchmarks.rl_step --method grpo --model small --peer trl

From the end of one step to the end of the next, by ``lightning.Trainer.fit`` with the ledger on disk. ``--batch``
counts responses. The reward counts a letter, which costs nothing, for both sides; both hold a reference, with beta 0.1.
Each side samples responses of its own, so that first losses say nothing; tests hold ours against exact gradients.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import MAX_PROMPT, Clock, Job, Rows, bare_trainer, parser, report, run, timed, work


RESPONSES = 4
BETA = 0.1


def ours(job: Job) -> dict[str, Any]:
    """`PolicyGradientModule` with rounds of one batch."""
    import lightning as L
    import torch
    from torch.optim import AdamW

    from lightning_rlhf import Decoding, PolicyGradientModule, RolloutDataModule
    from lightning_rlhf.advantages import GRPO, RLOO, LearnedBaseline
    from lightning_rlhf.callbacks import RolloutMonitor
    from lightning_rlhf.datamodules.options import PromptOptions, RoundOptions
    from lightning_rlhf.models.load import LoRA
    from lightning_rlhf.modules import KLControl, PolicyLoss
    from lightning_rlhf.rewards import AbstractReward, RewardOutput

    class CountE(AbstractReward):
        def score(self, prompts: Any, responses: Any) -> RewardOutput:
            del prompts
            return RewardOutput(torch.tensor([r.text.count("e") / (len(r.text) + 1) for r in responses]))

    clock, lengths = Clock(job.device), []

    class Ticks(L.Callback):
        def on_train_start(self, *_: Any) -> None:
            clock.start()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
            clock.tick()
            lengths.append(batch.numbers.shape[1])

    settings: dict[str, dict[str, Any]] = {
        "rloo": {"advantage": RLOO(), "kl": KLControl("penalty")},
        # GRPO as TRL has it: clipped, the KL in the loss, averaged over tokens
        "grpo": {
            "advantage": GRPO(),
            "kl": KLControl("penalty", placement="loss_k3"),
            "loss": PolicyLoss(clip=0.2, aggregation="token_mean"),
        },
        "baseline": {"advantage": LearnedBaseline(), "kl": KLControl("penalty")},
    }
    module = PolicyGradientModule(
        job.model,
        beta=BETA,
        optimizer=partial(AdamW, lr=1e-5, weight_decay=0.0),
        lora=LoRA(r=16, alpha=32) if job.options.get("lora") else None,
        **settings[job.options["method"]],
    )
    prompts = job.batch // RESPONSES
    data = RolloutDataModule(
        Rows(job.data, prompts * (job.steps + job.skip), module.tokenizer),
        CountE(),
        responses_per_prompt=RESPONSES,
        rounds=RoundOptions(prompts_per_round=prompts),
        prompts_per_batch=prompts,
        decoding=Decoding(max_new_tokens=job.new_tokens),
        prompt_options=PromptOptions(max_prompt_tokens=MAX_PROMPT, on_long_prompt="drop"),
    )
    folder = tempfile.mkdtemp()
    trainer = bare_trainer(job, folder, [RolloutMonitor(), Ticks()], max_steps=job.steps + job.skip)
    trainer.fit(module, datamodule=data)
    assert (Path(folder) / "ledger.sqlite").exists()
    return timed(clock, job, tokens=sum(lengths[job.skip :]) / job.steps)


def main() -> None:
    """Run the arms and print the table."""
    options = parser(__doc__.splitlines()[0], steps=2)
    options.add_argument("--method", choices=["rloo", "grpo"], default="rloo", help="whose step")
    arguments = options.parse_args()
    if arguments.worker:
        work(arguments.worker, {"ours": ours})
        return
    if arguments.batch % RESPONSES:
        raise SystemExit(f"--batch counts responses, {RESPONSES} per prompt; {arguments.batch} is no multiple of them")
    arms: dict[str, dict[str, Any]] = {"ours": {"method": arguments.method}}
    if arguments.ablate:
        arms |= {
            "ours, LoRA": {"method": arguments.method, "lora": True},
            "ours, learned baseline": {"method": "baseline"},
        }
    if arguments.peer == "trl":
        peer = {"module": "benchmarks.trl_peer", "worker": arguments.method, "num_generations": RESPONSES, "beta": BETA}
        arms["TRL, default"] = peer
        arms["TRL, best"] = {**peer, "gradient_checkpointing": False}
    report("rl_step", arguments, run("benchmarks.rl_step", arms, arguments))


if __name__ == "__main__":
    main()
