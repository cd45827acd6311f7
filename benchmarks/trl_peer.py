"""Workers that run TRL on the same rows: DPO, reward model, online DPO, RLOO, GRPO."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import Clock, Job, pair_tokens, timed, work


LEARNING_RATE = 1e-5


def settings(job: Job, **more: Any) -> dict[str, Any]:
    """Arguments of every trainer of TRL: our rows in our order, no reports, and the settings of the arm."""
    chosen = {k: v for k, v in job.options.items() if k not in ("worker", "module", "folder")}
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": job.batch,
        "max_steps": job.steps + job.skip,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant",
        "learning_rate": LEARNING_RATE,
        "disable_tqdm": True,
        **more,
        **chosen,
    }


def clocked(clock: Clock) -> Any:
    """A callback that ticks after every optimizer step."""
    from transformers import TrainerCallback

    class Ticks(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    return Ticks()


def rows(job: Job) -> list[dict[str, list[int]]]:
    """The pairs as token ids."""
    found: list[dict[str, list[int]]] = json.loads(Path(job.rows).read_text())
    return found


def dpo(job: Job) -> dict[str, Any]:
    """`DPOTrainer`, fed with token ids, so that both sides train on the same tokens."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class Tokenized(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    clock = Clock()
    config = DPOConfig(**settings(job, max_length=None, model_init_kwargs={"dtype": "float32"}))
    trainer = Tokenized(
        model=job.model,
        args=config,
        train_dataset=Dataset.from_list(rows(job)),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        callbacks=[clocked(clock)],
    )
    trainer.train()
    first = trainer.state.log_history[0]
    found = {"loss": first["loss"], "chosen": first["logps/chosen"], "rejected": first["logps/rejected"]}
    return timed(clock, job, tokens=pair_tokens(job), **found)


def reward(job: Job) -> dict[str, Any]:
    """`RewardTrainer`."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    clock = Clock()
    sides = ("chosen", "rejected")
    whole = [{f"{side}_ids": row["prompt_ids"] + row[f"{side}_ids"] for side in sides} for row in rows(job)]
    trainer = RewardTrainer(
        model=job.options["folder"],
        args=RewardConfig(**settings(job, max_length=4096, model_init_kwargs={"dtype": "float32"})),
        train_dataset=Dataset.from_list(whole),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        callbacks=[clocked(clock)],
    )
    trainer.train()
    return timed(clock, job, tokens=pair_tokens(job), loss=trainer.state.log_history[0]["loss"])


def online(job: Job) -> dict[str, Any]:
    """`OnlineDPOTrainer` with a reward function that costs nothing."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    from benchmarks.harness import Rows

    def count_e(prompts: Any, completions: Any, **_: Any) -> list[float]:
        del prompts
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        return [text.count("e") / (len(text) + 1) for text in texts]

    tokenizer = AutoTokenizer.from_pretrained(job.model)
    total = job.batch * (job.steps + job.skip)
    prompts = [{"prompt": row.text or list(row.messages or ())} for row in Rows(job.data, total, tokenizer).load()]
    clock = Clock()
    trainer = OnlineDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32),
        reward_funcs=count_e,
        args=OnlineDPOConfig(
            **settings(job, max_new_tokens=job.new_tokens, max_length=2048, beta=[0.1], temperature=1.0)
        ),
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
        callbacks=[clocked(clock)],
    )
    trainer.train()
    tokens = 2 * job.batch * job.new_tokens
    return timed(clock, job, tokens=tokens, loss=trainer.state.log_history[0]["loss"])


def policy_gradient(job: Job) -> dict[str, Any]:
    """`RLOOTrainer` or `GRPOTrainer` with a reward function that costs nothing; the batch counts responses."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    from benchmarks.harness import Rows

    def count_e(prompts: Any, completions: Any, **_: Any) -> list[float]:
        del prompts
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        return [text.count("e") / (len(text) + 1) for text in texts]

    grpo = job.options["worker"] == "grpo"
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    total = job.batch // job.options["num_generations"] * (job.steps + job.skip)
    prompts = [{"prompt": row.text or list(row.messages or ())} for row in Rows(job.data, total, tokenizer).load()]
    config = settings(
        job, max_completion_length=job.new_tokens, shuffle_dataset=False, model_init_kwargs={"dtype": "float32"}
    )
    del config["train_sampling_strategy"]
    clock = Clock()
    trainer = (GRPOTrainer if grpo else RLOOTrainer)(
        model=job.model,
        reward_funcs=count_e,
        args=(GRPOConfig if grpo else RLOOConfig)(**config),
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
        callbacks=[clocked(clock)],
    )
    trainer.train()
    lengths = [entry["completions/mean_length"] for entry in trainer.state.log_history if "loss" in entry]
    timed_lengths = lengths[job.skip :]
    return timed(clock, job, tokens=job.batch * sum(timed_lengths) / len(timed_lengths))


if __name__ == "__main__":
    work(
        sys.argv[2],
        {"dpo": dpo, "reward": reward, "online": online, "rloo": policy_gradient, "grpo": policy_gradient},
    )
