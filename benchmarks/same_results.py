"""Whether two checkouts train alike: a short run of every shipped config in both, weights and pairs compared bitwise.

    python -m benchmarks.same_results --old ../before --new .

For refactors: the same command runs in both checkouts on a tiny model made here. Names of arguments that changed are
those of the older checkout, which the newer one must still parse.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast


COMMON = [
    "--trainer.accelerator=cpu",
    "--trainer.precision=32-true",
    "--trainer.enable_progress_bar=false",
    "--seed_everything=0",
]
ROUNDS = [
    "--data.prompts_per_round=4",
    "--data.decoding.max_new_tokens=6",
    "--data.decoding.rows=8",
    "--trainer.max_epochs=2",
]
KL = ["--model.kl_placement=loss_k3", "--model.objective=penalty"]
RATE = ["--model.learning_rate=1e-3", "--model.warmup_steps=2"]


SAMPLES = {"comparisons": "a_ids, b_ids, a_policy_logps", "rollouts": "response_ids, response_policy_logps"}
"""Tables of the ledger, and the columns that are compared."""


def runs(policy: str, reward: str, rows: str, completions: str) -> dict[str, list[str]]:
    """Commands by name."""
    pairs = [*ROUNDS, *RATE, "--data.pairs_per_batch=4", f"--model.policy={policy}", "--data.heldout.limit=4"]
    template = ["--model.chat_template=human_assistant"]
    recorded = [*RATE, f"--data.prompts.path={rows}", "--data.pairs_per_batch=2", "--data.decoding.max_new_tokens=16"]
    rollouts = [
        *ROUNDS,
        *RATE,
        "--data.prompts_per_batch=4",
        f"--model.policy={policy}",
        "--data.heldout.limit=4",
        f"--data.reward.path={reward}",
        "--data.responses_per_prompt=2",
        "--data.reward.chat_template=human_assistant",
        *template,
    ]
    return {
        "quickstart": ["quickstart", *pairs, *template, "--data.system_prompt=null"],
        "dpo_online": ["dpo_online", *pairs, *template, "--model.reference=previous"],
        "dpo_iterative": ["dpo_iterative", *pairs, *template, "--data.replay=all", "--data.tokens_per_batch=64"],
        "best_of_n": ["dpo_online", *pairs, *template, "--config=sampler/best_of_n"],
        "t_pilaf": ["dpo_online", *pairs, *template, "--config=sampler/t_pilaf", "--model.lora.r=2"],
        "dpo_offline": ["dpo_offline", *recorded, f"--model.policy={policy}", "--trainer.max_epochs=2"],
        "reward_model": ["reward_model", *recorded, f"--model.backbone={policy}", "--model.margin=0.5"],
        "reward_ensemble": ["reward_ensemble", *recorded, f"--model.backbone={policy}"],
        "sft": ["sft", *RATE, f"--model.policy={policy}", f"--data.prompts.path={completions}"],
        "rlhf": ["rlhf", *rollouts],
        "grpo": ["rlhf", *rollouts, "--model.advantage=GRPO", "--model.clip=0.2", *KL],
        "worlds/menu": ["worlds/menu", "--trainer.max_epochs=3"],
    }


def make_inputs(folder: Path) -> tuple[str, str, str, str]:
    """A tiny policy, a tiny reward model, pairs and completions."""
    words = [f"word{i} river city question answer good bad Elbe" for i in range(40)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(["<eos>", "<pad>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.1, eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id,
        bos_token_id=None,
    )  # fmt: skip
    paths = [str(folder / name) for name in ("policy", "reward", "rows.jsonl", "completions.jsonl")]
    LlamaForCausalLM(config).save_pretrained(paths[0])
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(paths[1])
    for path in paths[:2]:
        fast.save_pretrained(path)
    rows = [{"prompt": f"word{i} question", "chosen": f" good answer {i}", "rejected": f" bad {i}"} for i in range(6)]
    Path(paths[2]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    Path(paths[3]).write_text("".join(json.dumps(row) + "\n" for row in texts))
    return paths[0], paths[1], paths[2], paths[3]


def results(checkout: Path, arguments: list[str], folder: Path) -> tuple[dict[str, torch.Tensor], list[object]]:
    """Run a command in a checkout; weights of its model and the responses in its ledger."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "lightning_rlhf", "fit", "--config", *arguments, f"--run_dir={folder}"]
    done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{checkout}: {' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    weights = load_file(folder / "model" / "model.safetensors")
    pairs: list[object] = []
    if (folder / "ledger.sqlite").exists():
        with sqlite3.connect(folder / "ledger.sqlite") as db:
            for table, columns in SAMPLES.items():
                if db.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchone():
                    pairs += db.execute(f"SELECT {columns} FROM {table}").fetchall()
    return weights, pairs


def main() -> None:
    """Compare the two checkouts, one line per config."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--old", type=Path, required=True)
    parser.add_argument("--new", type=Path, required=True)
    parser.add_argument("--only", help="name of one run")
    options = parser.parse_args()
    differ = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, arguments in runs(*make_inputs(folder)).items():
            if options.only not in (None, name):
                continue
            full = [*arguments, *COMMON]
            (old, old_pairs), (new, new_pairs) = (
                results(checkout.resolve(), full, folder / side / name.replace("/", "-"))
                for side, checkout in (("old", options.old), ("new", options.new))
            )
            same = old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
            largest = max((old[key] - new[key]).abs().max().item() for key in old.keys() & new.keys())
            weights = "equal" if same else f"DIFFERENT, by up to {largest:.2g}"
            samples = "equal" if old_pairs == new_pairs else "DIFFERENT"
            print(f"{name:16} weights {weights}; {len(new_pairs)} samples {samples}", flush=True)
            differ += not same or old_pairs != new_pairs
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
