"""Reward models: trained by the command line on pairs, saved, opened by transformers, and used as a reward by text."""

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
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lightning_rlhf import PreferenceDataModule
from lightning_rlhf.cli import main
from lightning_rlhf.generation.base import Decoding
from lightning_rlhf.labelers import RecordedLabeler
from lightning_rlhf.models.load import load_tokenizer
from lightning_rlhf.modules import RewardModule
from lightning_rlhf.modules.reward import padding_id
from lightning_rlhf.prompts import DatasetPrompts, tokenize_rows
from lightning_rlhf.prompts.tokenize import encode_answers
from lightning_rlhf.rewards import RewardModelReward
from lightning_rlhf.samplers import OfflineSampler, VanillaSampler
from lightning_rlhf.types import Prompt, PromptRow, RecordedPair, Response


def test_padding_is_never_the_end_of_a_response(tiny_policy: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_policy))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert padding_id(tokenizer) is None
    tokenizer.unk_token = "<|user|>"
    assert padding_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|user|>")


def write_rows(path: Path, count: int, first: int = 0, **extra: Any) -> Path:
    """The answer with a "z" is the better one, whatever else it says and however long it is."""
    rows = []
    for i in range(first, first + count):
        word = "abcdefgh"[i % 8] * (1 + i % 5)
        good, bad = f"{word}z", f"{word}y{'x' * (i % 3)}"
        rows.append({"prompt": f"say {i % 7}: ", "chosen": good, "rejected": bad, **extra})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


SETTINGS = [
    *("--config", "reward_model", "--model.learning_rate=3e-3", "--model.warmup_steps=1"),
    *("--data.decoding.max_new_tokens=16", "--data.pairs_per_batch=8", "--trainer.precision=32-true"),
    *("--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> Path:
    """The run folder of a reward model trained by the command line."""
    folder = tmp_path_factory.mktemp("reward_model")
    train, heldout = write_rows(folder / "train.jsonl", 160), write_rows(folder / "heldout.jsonl", 40, first=1000)
    main(
        [
            *("fit", *SETTINGS, f"--model.backbone={tiny_policy}", f"--data.prompts.path={train}"),
            *("--data.heldout=DatasetPrompts", f"--data.heldout.path={heldout}", "--trainer.max_epochs=6"),
            *("--trainer.check_val_every_n_epoch=6", f"--run_dir={folder / 'run'}"),
        ]
    )
    return folder / "run"


def test_it_learns_what_the_pairs_say_and_reports_it(trained: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["accuracy"] > 0.95
    assert summary["pairs"] == 40
    assert summary["longer_accuracy"] < 0.5
    assert summary["brier"] < 0.1
    header = next(trained.rglob("metrics.csv")).read_text().splitlines()[0].split(",")
    for name in ("train/loss", "train/rewards/margins", "train/rewards/accuracies", "val/accuracy", "val/ece"):
        assert name in header


def test_transformers_opens_it_and_scores_alike(trained: Path) -> None:
    folder = trained / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.num_labels == 1
    prompt = Prompt(0, (), "say 3: ")
    answers = ["aaz", "aay", "b"]
    responses = [Response((1,), text, "eos") for text in answers]
    reward = RewardModelReward(str(folder))
    ours = reward.score([prompt] * 3, responses).mean
    for text, score in zip(answers, ours, strict=True):
        ids = [*tokenizer(prompt.text + text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits
        assert score.item() == pytest.approx(logits.item(), abs=1e-5)
    assert ours[0] > ours[1]
    normalised = RewardModelReward(str(folder), normalize=True).score([prompt] * 3, responses).mean
    torch.testing.assert_close(normalised, (ours - model.config.reward_mean) / model.config.reward_std)


def test_it_reads_texts_not_the_ids_of_the_policy(trained: Path) -> None:
    reward = RewardModelReward(str(trained / "model"))
    answer = Response((1,), "ccz", "eos")
    foreign = Response((77, 3, 9), "ccz", "eos")
    chat = Prompt(0, (5,), "x", messages=({"role": "user", "content": "say 3: "},))
    prompts = [Prompt(0, (1,), "say 3: "), Prompt(9, (2,), "say 3: "), chat]
    first, second, third = reward.score(prompts, [answer, foreign, answer]).mean.tolist()
    assert first == pytest.approx(second, abs=1e-5)
    assert abs(third - first) > 1e-4  # its own chat template is around this one
    (cut,) = reward.score([chat], [Response((1,), "ccz", "length")]).mean.tolist()
    assert abs(cut - third) > 1e-4  # no EOS behind an answer that was cut off


def test_answers_are_written_as_training_rows_are(tiny_policy: Path) -> None:
    """What the reward reads of a drawn answer is, id by id, what it was trained on."""
    tokenizer = load_tokenizer(str(tiny_policy))
    messages = ({"role": "user", "content": "say 3"},)
    rows = [
        PromptRow("row 1", text="say 1", pair=RecordedPair("az", "b")),
        PromptRow("row 2", messages=messages, pair=RecordedPair("az", "b")),
    ]
    prompts, _ = tokenize_rows(rows, tokenizer, max_prompt_tokens=99, max_response_tokens=99)
    for prompt in prompts:
        assert prompt.pair is not None
        (found,) = encode_answers([prompt], [prompt.pair[0]], tokenizer, max_prompt_tokens=99)
        assert found == (prompt.ids, prompt.pair[0].ids)
        ((shortened, _),) = encode_answers([prompt], [prompt.pair[0]], tokenizer, max_prompt_tokens=3)
        assert shortened == prompt.ids[-3:]


def data(folder: Path, **options: Any) -> PreferenceDataModule:
    folder.mkdir(exist_ok=True)
    return PreferenceDataModule(
        DatasetPrompts(str(write_rows(folder / "rows.jsonl", 12))),
        OfflineSampler(),
        RecordedLabeler(),
        pairs_per_batch=4,
        epochs_per_round=None,
        decoding=Decoding(max_new_tokens=16),
        **options,
    )


def trainer(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    settings = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False, **options}
    settings.setdefault("enable_checkpointing", any(isinstance(c, ModelCheckpoint) for c in callbacks))
    return L.Trainer(default_root_dir=folder, callbacks=list(callbacks), enable_model_summary=False, **settings)


def weights(module: RewardModule) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def fit(
    folder: Path, tiny_policy: Path, *callbacks: L.Callback, ckpt: str | None = None, **options: Any
) -> RewardModule:
    L.seed_everything(0)
    module = RewardModule(str(tiny_policy), learning_rate=1e-2, margin=0.1, center_coefficient=0.01)
    trainer(folder, *callbacks).fit(module, datamodule=data(folder, **options), ckpt_path=ckpt)
    return module


def test_passes_change_nothing_but_the_passes(tmp_path: Path, tiny_policy: Path) -> None:
    whole = fit(tmp_path / "whole", tiny_policy, tokens_per_batch=None)
    parts = fit(tmp_path / "parts", tiny_policy, tokens_per_batch=30)
    torch.testing.assert_close(weights(whole), weights(parts), atol=1e-4, rtol=1e-3)


def test_a_run_continues_bitwise_from_every_checkpoint(tmp_path: Path, tiny_policy: Path) -> None:
    folder = tmp_path / "run"
    every = ModelCheckpoint(folder / "ckpt", every_n_train_steps=1, save_top_k=-1)
    straight = weights(fit(folder, tiny_policy, every))
    checkpoints = sorted((folder / "ckpt").glob("*.ckpt"))
    assert len(checkpoints) == 6
    for number, checkpoint in enumerate(checkpoints):
        copy = shutil.copytree(folder, tmp_path / f"again{number}")
        torch.testing.assert_close(weights(fit(copy, tiny_policy, ckpt=str(checkpoint))), straight, atol=0, rtol=0)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path, tiny_policy: Path) -> None:
    # 22 rows: the last batch and the validation are uneven
    train, heldout = write_rows(tmp_path / "train.jsonl", 22), write_rows(tmp_path / "heldout.jsonl", 7, first=50)
    summaries, models = [], []
    for name, launcher, extra in (
        ("one", [], []),
        ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"], ["--config=trainer/ddp"]),
    ):
        devices = [] if name == "one" else ["--trainer.devices=2", "--trainer.accelerator=cpu"]
        done = subprocess.run(
            [
                *(sys.executable, *launcher, "-m", "lightning_rlhf", "fit", *SETTINGS, *extra, *devices),
                *("--trainer.precision=32-true", f"--model.backbone={tiny_policy}", f"--data.prompts.path={train}"),
                *("--data.heldout=DatasetPrompts", f"--data.heldout.path={heldout}", f"--run_dir={tmp_path / name}"),
            ],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        summaries.append(json.loads((tmp_path / name / "summary.json").read_text()))
        models.append(AutoModelForSequenceClassification.from_pretrained(tmp_path / name / "model"))
    for key, value in summaries[0].items():
        assert summaries[1][key] == (value and pytest.approx(value, abs=1e-4)), key
    assert summaries[0]["pairs"] == 7
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)
    assert models[0].config.reward_std == pytest.approx(models[1].config.reward_std, rel=1e-4)


def test_bad_use_is_named(tmp_path: Path, tiny_policy: Path) -> None:
    module = RewardModule(str(tiny_policy))
    drawing = data(tmp_path)
    drawing.sampler = VanillaSampler()
    with pytest.raises(ValueError, match=r"VanillaSampler draws responses.*set data\.sampler=OfflineSampler"):
        trainer(tmp_path).fit(module, datamodule=drawing)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "say 1"}')
    unpaired = data(tmp_path, heldout=DatasetPrompts(str(tmp_path / "prompts.jsonl")))
    with pytest.raises(ValueError, match=r"held-out prompt 0 \('say 1'\) has no recorded pair"):
        trainer(tmp_path).validate(RewardModule(str(tiny_policy)), datamodule=unpaired)
    with pytest.raises(ValueError, match="must be >= 0; got -1"):
        RewardModule(str(tiny_policy), margin=-1.0)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        RewardModelReward("/nowhere/at/all")
    with pytest.raises(ValueError, match=r"train with data\.heldout"):
        RewardModelReward(str(tiny_policy), normalize=True).score([], [])
