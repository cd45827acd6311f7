"""One process, two under DDP and two under FSDP2: the same pairs, the same labels, the same policy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_rlhf.ledger.recorded import RecordedTable
from lightning_rlhf.ledger.silver import UNLABELED, SilverTable
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.models.load import LoRA, load_policy, load_tokenizer, save_policy


REWARD = """
import torch
from lightning_rlhf.rewards import AbstractReward, RewardOutput

class Bytes(AbstractReward):
    def score(self, prompts, responses):
        return RewardOutput(torch.tensor([float(sum(token % 7 for token in r.ids)) for r in responses]))
"""
OPTIONS = [
    *("fit", "--config", "dpo_online", "--config", "sampler/t_pilaf"),
    *("--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=2", "--trainer.enable_progress_bar=false"),
    *("--model.optimizer.lr=1e-3", "--model.lr_scheduler.warmup_steps=0", "--data.labeler.reward=my_reward.Bytes"),
    *(
        "--data.heldout.limit=5",
        "--data.rounds.prompts_per_round=10",
        "--data.pairs_per_batch=4",
        "--data.rounds.replay=all",
    ),
    *("--data.decoding.max_new_tokens=5", "--data.decoding.rows=4", "--data.prompt_options.max_prompt_tokens=240"),
]
LORA = ["--model.lora.r=2", "--model.lora.alpha=4"]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def check_same_pairs(one: Path, two: Path) -> None:
    """Fail unless both runs sampled the same pairs, with the same labels and weights."""
    with (
        PreferenceStore(one / "ledger.sqlite", read_only=True) as expected,
        PreferenceStore(two / "ledger.sqlite", read_only=True) as got,
    ):
        for a, b in zip(expected.preferences(), got.preferences(), strict=True):
            assert (a.round, a.comparison.prompt) == (b.round, b.comparison.prompt)
            assert (a.comparison.a.ids, a.comparison.b.ids) == (b.comparison.a.ids, b.comparison.b.ids)
            assert a.probability == b.probability
            assert a.comparison.weight == pytest.approx(b.comparison.weight, abs=1e-5)


def run(folder: Path, policy: Path, name: str, launcher: list[str], *overlay: str, precision: str = "32-true") -> Path:
    (folder / "my_reward.py").write_text(REWARD)
    done = subprocess.run(
        [
            *(sys.executable, *launcher, "-m", "lightning_rlhf", *OPTIONS, f"--model.policy={policy}"),
            *(*overlay, "--trainer.accelerator=cpu", f"--trainer.precision={precision}", f"--run_dir={name}"),
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{folder}:{Path(__file__).parents[1]}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overlay", "options"),
    [
        ("trainer/ddp", []),
        ("trainer/fsdp", ["--model.reference.rule=ema", "--model.reference.ema_decay=0.5", "--model.start=earlier"]),
        ("trainer/fsdp", [*LORA, "--model.reference.rule=previous", "--model.start=earlier"]),
    ],
    ids=["ddp", "fsdp_ema", "fsdp_lora_previous"],
)
def test_two_processes_equal_one(tmp_path: Path, tiny_policy: Path, overlay: str, options: list[str]) -> None:
    torch.manual_seed(1)
    earlier = load_policy(str(tiny_policy), lora=LoRA(r=2, alpha=4) if options[:2] == LORA else None)
    with torch.no_grad():
        for parameter in earlier.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    save_policy(earlier, load_tokenizer(str(tiny_policy)), tmp_path / "earlier")
    one = run(tmp_path, tiny_policy, "one", [], "--config=trainer/cpu", *options)
    two = run(tmp_path, tiny_policy, "two", TWO, f"--config={overlay}", "--trainer.devices=2", *options)
    check_same_pairs(one, two)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, two)]
    assert summaries[0]["labels"] == summaries[1]["labels"] == 20
    single, several = (AutoModelForCausalLM.from_pretrained(folder / "model") for folder in (one, two))
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "earlier" if overlay == "trainer/fsdp" else tiny_policy)
    moved = max((p - q).abs().max().item() for p, q in zip(single.parameters(), start.parameters(), strict=True))
    assert moved > 1e-4
    for p, q in zip(single.parameters(), several.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


SILVER = """
data:
  class_path: lightning_rlhf.PreferenceDataModule
  init_args:
    silver:
      model: {class_path: lightning_rlhf.preference_models.KernelPreferenceModel}
      steps_per_round: 3
      pairs_per_step: 5
      min_labels: 5
      refit_every: 5
      start_samples: 10
"""


@pytest.mark.slow
def test_two_processes_train_on_the_silver_pairs_of_one(tmp_path: Path, tiny_policy: Path) -> None:
    """Rounds of an odd number of pairs: the ranks have different shares of real and of silver pairs."""
    (tmp_path / "silver.yaml").write_text(SILVER)
    options = ["--config=silver.yaml", "--data.sampler=InfomaxSampler", "--data.sampler.n=3"]
    options += ["--data.rounds.replay=last", "--data.rounds.prompts_per_round=5", "--trainer.max_epochs=6"]
    one = run(tmp_path, tiny_policy, "one", [], "--config=trainer/cpu", *options)
    for name in ("ddp", "fsdp"):
        two = run(tmp_path, tiny_policy, name, TWO, f"--config=trainer/{name}", "--trainer.devices=2", *options)
        check_same_pairs(one, two)
        check_same_silver_pairs(one, two)
        single, several = (AutoModelForCausalLM.from_pretrained(folder / "model") for folder in (one, two))
        for p, q in zip(single.parameters(), several.parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


def check_same_silver_pairs(one: Path, two: Path) -> None:
    """Fail unless both runs have the same unlabeled samples and silver pairs."""
    with (
        PreferenceStore(one / "ledger.sqlite", read_only=True) as expected,
        PreferenceStore(two / "ledger.sqlite", read_only=True) as got,
    ):
        for epoch in (UNLABELED, 0, 3, 5):
            found = [SilverTable(store).pairs(epoch) for store in (expected, got)]
            assert len(found[0]) == 5
            for (a, label), (b, other) in zip(*found, strict=True):
                assert (a.prompt, a.a.ids, a.b.ids) == (b.prompt, b.a.ids, b.b.ids)
                if label is not None and other is not None:
                    assert label.probability == pytest.approx(other.probability, abs=1e-5)


@pytest.mark.slow
def test_shards_take_the_steps_of_ddp_in_mixed_precision_and_with_accumulation(
    tmp_path: Path, tiny_policy: Path
) -> None:
    options = [
        "--trainer.accumulate_grad_batches=2",
        "--trainer.devices=2",
        "--model.options.gradient_checkpointing=true",
    ]
    options += ["--data.rounds.prompts_per_round=12"]
    folders = [
        run(tmp_path, tiny_policy, name, TWO, f"--config=trainer/{name}", *options, precision="bf16-mixed")
        for name in ("ddp", "fsdp")
    ]
    check_same_pairs(*folders)
    start, ddp, fsdp = (
        list(AutoModelForCausalLM.from_pretrained(folder).parameters())
        for folder in (tiny_policy, *(folder / "model" for folder in folders))
    )
    assert max((p - q).abs().max().item() for p, q in zip(start, ddp, strict=True)) > 1e-4
    for p, q in zip(ddp, fsdp, strict=True):
        torch.testing.assert_close(p, q, atol=5e-5, rtol=1e-4)  # of a step, 1e-3


@pytest.mark.slow
def test_two_processes_read_their_rows_from_disk_and_score_them_ahead(tmp_path: Path, tiny_policy: Path) -> None:
    lines = [{"prompt": f"{n}?", "chosen": "yes" * (n % 3 + 1), "rejected": "no" * (n % 4 + 1)} for n in range(132)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    cache = {"LIGHTNING_RLHF_CACHE": str(tmp_path / "cache")}

    def train(name: str, launcher: list[str], *options: str) -> Path:
        done = subprocess.run(
            [
                *(sys.executable, *launcher, "-m", "lightning_rlhf", "fit", "--config=dpo_offline", *options),
                *(f"--model.policy={tiny_policy}", "--data.prompts.path=rows.jsonl", "--data.pairs_per_batch=2"),
                *("--data.decoding.max_new_tokens=8", "--data.decoding.rows=4", "--model.optimizer.lr=1e-3"),
                *("--data.prompt_options.rows=disk", "--data.rounds.ledger_pairs=rows", f"--run_dir={name}"),
                *("--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.enable_progress_bar=false"),
                *("--trainer.logger=false", "--trainer.limit_val_batches=0"),
            ],
            cwd=tmp_path,
            env={**os.environ, **cache, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return tmp_path / name

    # 66 steps: two windows
    folders = [train("one", [], "--config=trainer/cpu")]
    for overlay in ("ddp", "fsdp"):
        folders.append(train(overlay, TWO, f"--config=trainer/{overlay}", "--trainer.devices=2"))
    single, *several = (AutoModelForCausalLM.from_pretrained(folder / "model") for folder in folders)
    known = []
    for folder in folders:
        with PreferenceStore(folder / "ledger.sqlite", read_only=True) as store:
            known.append(RecordedTable(store).reference_logps(0, 132))
            assert (store.num_labels, list(store.preferences())) == (132, [])
    for other, logps in zip(several, known[1:], strict=True):
        torch.testing.assert_close(torch.from_numpy(logps), torch.from_numpy(known[0]), atol=1e-4, rtol=1e-5)
        for p, q in zip(single.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)
