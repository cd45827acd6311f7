"""Supervised fine-tuning: completions alone carry loss, rows are read as written, a command trains and saves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_rlhf.cli import main
from lightning_rlhf.datamodules.completions import CompletionDataModule
from lightning_rlhf.datamodules.options import BatchOptions
from lightning_rlhf.models.load import load_tokenizer
from lightning_rlhf.modules import SFTModule
from lightning_rlhf.prompts import DatasetCompletions, DatasetPrompts, tokenize_rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
PLAIN = [{"prompt": f"say {i}: ", "completion": "ab" * (1 + i % 4)} for i in range(12)]


def test_rows_of_every_kind(tmp_path: Path, tiny_policy: Path) -> None:
    rows = [
        {"prompt": "say: ", "completion": "abc"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": "hi", "completion": [ANSWER]},
        {"messages": [USER, {"role": "assistant", "content": "no"}, USER, ANSWER]},
        {"prompt": "x", "completion": "  "},
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    source = DatasetCompletions(str(path))
    loaded = source.load()
    assert [(row.text, row.completion) for row in loaded[:1]] == [("say: ", "abc")]
    assert loaded[1].messages == loaded[2].messages == (USER,)
    assert [len(row.messages or ()) for row in loaded[1:]] == [1, 1, 3]
    assert source.report == {"empty completion": 1}
    every = DatasetCompletions(str(path), turns="all").load()
    assert [row.completion for row in every] == ["abc", "yes", "yes", "no", "yes"]

    tokenizer = load_tokenizer(str(tiny_policy))
    prompts, _ = tokenize_rows(loaded, tokenizer, max_prompt_tokens=99, max_response_tokens=99)
    for prompt in prompts:
        assert prompt.completion is not None and prompt.pair is None
        assert prompt.completion.ids[-1] == tokenizer.eos_token_id
    whole = tokenizer.apply_chat_template(rows[3]["messages"], tokenize=False)
    assert prompts[3].completion is not None
    assert tokenizer.decode([*prompts[3].ids, *prompts[3].completion.ids]) == whole
    cut, report = tokenize_rows(loaded[:1], tokenizer, max_prompt_tokens=99, max_response_tokens=2)
    assert cut[0].completion is not None and cut[0].completion.finish_reason == "length"
    assert report == {"truncated completions": 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x"}, r"no column 'completion' or 'messages'; its columns are \['prompt'\]"),
        ({"prompt": "x", "messages": None}, r"row 1: field 'completion' and 'messages' are both missing"),
        ({"completion": "x"}, r"row 1: field 'prompt' is missing"),
        ({"messages": [USER]}, r"does not end with the assistant's answer"),
        ({"prompt": "x", "completion": 3}, r"row 1: field 'completion' must be text"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DatasetCompletions(str(write(tmp_path / "rows.jsonl", [row]))).load()


def data(folder: Path, rows: list[dict[str, Any]] | None = None, **options: Any) -> CompletionDataModule:
    folder.mkdir(exist_ok=True)
    path = write(folder / "rows.jsonl", PLAIN if rows is None else rows)
    settings = {"rows_per_batch": 4, "max_completion_tokens": 32, **options}
    return CompletionDataModule(DatasetCompletions(str(path)), **settings)


def fit(folder: Path, policy: Path, *callbacks: L.Callback, ckpt: str | None = None, **options: Any) -> SFTModule:
    L.seed_everything(0, verbose=False)
    aggregation, accumulate = options.pop("aggregation", "token_mean"), options.pop("accumulate", 1)
    module = Plain(str(policy), aggregation=aggregation)
    trainer = L.Trainer(
        default_root_dir=folder, max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, accumulate_grad_batches=accumulate, callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
    )  # fmt: skip
    trainer.fit(module, datamodule=data(folder, **options), ckpt_path=ckpt)
    return module


class Plain(SFTModule):
    """Without the normalization of AdamW, so that updates are gradients."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


class Losses(L.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.values.append(outputs["loss"].item())


def weights(module: L.LightningModule) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_the_loss_is_that_of_completions_alone(tmp_path: Path, tiny_policy: Path, aggregation: str) -> None:
    losses = Losses()
    fit(tmp_path, tiny_policy, losses, rows_per_batch=12, aggregation=aggregation)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_policy), load_tokenizer(str(tiny_policy))
    nats: list[torch.Tensor] = []
    for row in PLAIN:
        prompt = tokenizer(row["prompt"], add_special_tokens=False).input_ids
        answer = [*tokenizer(row["completion"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        nats.append(F.cross_entropy(logits, torch.tensor(answer), reduction="none"))
    expected = torch.cat(nats).mean() if aggregation == "token_mean" else torch.stack([n.mean() for n in nats]).mean()
    assert losses.values[0] == pytest.approx(expected.item(), abs=1e-5)
    assert losses.values[1] < losses.values[0]


def test_micro_batches_and_accumulation_change_nothing(tmp_path: Path, tiny_policy: Path) -> None:
    whole = weights(fit(tmp_path / "whole", tiny_policy, batching=BatchOptions(None)))
    parts = weights(fit(tmp_path / "parts", tiny_policy, batching=BatchOptions(20)))
    accumulated = weights(
        fit(tmp_path / "both", tiny_policy, rows_per_batch=2, accumulate=2, batching=BatchOptions(20))
    )
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(accumulated, whole, atol=1e-4, rtol=1e-3)


def test_a_run_continues_bitwise_from_every_checkpoint(tmp_path: Path, tiny_policy: Path) -> None:
    every = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=1, save_top_k=-1)
    straight = weights(fit(tmp_path / "run", tiny_policy, every))
    checkpoints = sorted((tmp_path / "ckpt").glob("*.ckpt"))
    assert len(checkpoints) == 6
    for number, checkpoint in enumerate(checkpoints[::2]):
        again = weights(fit(tmp_path / f"again{number}", tiny_policy, ckpt=str(checkpoint)))
        torch.testing.assert_close(again, straight, atol=0, rtol=0)
    shutil.rmtree(tmp_path / "ckpt")


def test_the_command_line_trains_reports_and_saves(
    tmp_path: Path, tiny_policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, heldout = write(tmp_path / "train.jsonl", PLAIN * 4), write(tmp_path / "heldout.jsonl", PLAIN[:7])
    main(
        [
            *("fit", "--config", "sft", f"--model.policy={tiny_policy}", f"--data.prompts.path={train}"),
            *("--data.heldout=DatasetCompletions", f"--data.heldout.path={heldout}", "--data.rows_per_batch=8"),
            *("--model.optimizer.lr=1e-2", "--model.lr_scheduler.warmup_steps=1", "--trainer.max_epochs=6"),
            *("--data.max_completion_tokens=32", "--trainer.precision=32-true", "--trainer.accelerator=cpu"),
            *("--trainer.enable_progress_bar=false", f"--run_dir={tmp_path / 'run'}"),
        ]
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert line.startswith(f"held-out loss {summary['loss']:.3f} nats per token")
    # the completions are "ab" again and again, whose end alone is uncertain
    assert summary["loss"] < 1.0 and summary["token_accuracy"] > 0.6
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    prompt = tokenizer("say 1: ", return_tensors="pt", add_special_tokens=False).input_ids
    assert "ab" in tokenizer.decode(model.generate(prompt, max_new_tokens=4, do_sample=False)[0])


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path, tiny_policy: Path) -> None:
    # 11 and 7 rows: the last batch and the validation are uneven
    train, heldout = write(tmp_path / "train.jsonl", PLAIN[:11]), write(tmp_path / "heldout.jsonl", PLAIN[:7])
    summaries, models = [], []
    for name, launcher, extra in (
        ("one", [], []),
        (
            "two",
            ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
            ["--config=trainer/ddp", "--trainer.devices=2"],
        ),
    ):
        done = subprocess.run(
            [
                *(sys.executable, *launcher, "-m", "lightning_rlhf", "fit", "--config", "sft", *extra),
                *(f"--model.policy={tiny_policy}", f"--data.prompts.path={train}", "--data.rows_per_batch=4"),
                *("--data.heldout=DatasetCompletions", f"--data.heldout.path={heldout}", "--trainer.accelerator=cpu"),
                *("--model.optimizer.lr=1e-3", "--model.lr_scheduler.warmup_steps=0", "--trainer.precision=32-true"),
                *("--data.max_completion_tokens=32", f"--run_dir={tmp_path / name}"),
            ],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        summaries.append(json.loads((tmp_path / name / "summary.json").read_text()))
        models.append(AutoModelForCausalLM.from_pretrained(tmp_path / name / "model"))
    assert summaries[0] == {key: pytest.approx(value, abs=1e-4) for key, value in summaries[1].items()}
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


def test_rows_without_completions_are_refused(tmp_path: Path, tiny_policy: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "say 1"}])
    module = SFTModule(str(tiny_policy))
    trainer = L.Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"512 tokens leave no room .* lower data\.max_completion_tokens"):
        trainer.fit(module, datamodule=CompletionDataModule(DatasetPrompts(str(path))))
    with pytest.raises(ValueError, match=r"training row 0 \('say 1'\) has no completion to imitate"):
        trainer.fit(module, datamodule=CompletionDataModule(DatasetPrompts(str(path)), max_completion_tokens=9))


def test_a_teacher_is_imitated(tmp_path: Path, tiny_policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sample with one policy, export, fine-tune another: the commands of the page."""
    small = ["--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.enable_progress_bar=false"]
    main(
        [
            *("sample", "--config", "rlhf", f"--model.policy={tiny_policy}", "--model.advantage=RLOO", *small),
            *("--data.reward=LexiconReward", "--data.rounds.prompts_per_round=3", "--data.responses_per_prompt=2"),
            *(
                "--data.decoding.max_new_tokens=4",
                "--data.prompt_options.max_prompt_tokens=200",
                f"--run_dir={tmp_path / 'teacher'}",
            ),
            f"--out={tmp_path / 'rows.jsonl'}",
        ]
    )
    assert "wrote 6 rollouts to" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len({row["prompt_index"] for row in rows}) == 3 and {row["reward"] for row in rows} == {None}
    main(["export", f"--ledger={tmp_path / 'teacher' / 'ledger.sqlite'}", f"--out={tmp_path / 'again.jsonl'}"])
    assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "rows.jsonl").read_text()
    main(
        [
            *("fit", "--config", "sft", f"--model.policy={tiny_policy}", *small, "--trainer.max_steps=1"),
            *(f"--data.prompts.path={tmp_path / 'rows.jsonl'}", "--data.max_completion_tokens=9"),
            f"--run_dir={tmp_path / 'student'}",
        ]
    )
    assert (tmp_path / "student" / "model" / "config.json").exists()
