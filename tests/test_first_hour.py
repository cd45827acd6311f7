"""Mistakes of the first hour: each is one error, before a model is loaded, with the setting that is meant."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
import pytest
import torch

from lightning_rlhf import DPOModule, PolicyGradientModule, PreferenceDataModule, RolloutDataModule
from lightning_rlhf.commands.checkpoint_export import export_checkpoint
from lightning_rlhf.commands.fit import RLHFTrainer
from lightning_rlhf.datamodules.options import PreferenceRoundOptions
from lightning_rlhf.generation.base import Decoding
from lightning_rlhf.labelers import RecordedLabeler
from lightning_rlhf.prompts import DatasetCompletions, DatasetPrompts, DatasetUnpaired
from lightning_rlhf.rewards import FunctionReward
from lightning_rlhf.samplers import OfflineSampler


SHORT = Decoding(max_new_tokens=8)
Rows = list[dict[str, object]]


def fit(folder: Path, module: L.LightningModule, data: L.LightningDataModule) -> None:
    trainer = L.Trainer(
        default_root_dir=folder,
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)


def offline(rows: object) -> PreferenceDataModule:
    rounds = PreferenceRoundOptions(epochs_per_round=None)
    return PreferenceDataModule(rows, OfflineSampler(), RecordedLabeler(), rounds=rounds, decoding=SHORT)  # type: ignore[arg-type]


def correct(completions: list[str], solution: list[str]) -> list[float]:
    return [float(wanted in completion) for completion, wanted in zip(completions, solution, strict=True)]


@pytest.mark.parametrize(
    ("row", "remedy"),
    [
        ({"prompt": "a", "completion": "b", "label": True}, "'completion' and 'label' are for --config kto"),
        ({"prompt": "a", "completion": "b"}, "'completion' alone are for --config sft"),
        ({"prompt": "a", "answers": [{"answer": "b", "rank": 0}]}, "look like Nectar.*kind=preference reads"),
        ({"prompt": "a", "good": "b", "bad": "c"}, "name these columns by chosen_column, rejected_column"),
    ],
)
def test_rows_without_pairs_are_refused_before_a_model_is_loaded(
    tmp_path: Path, tiny_policy: Path, row: dict[str, object], remedy: str
) -> None:
    module = DPOModule(str(tiny_policy))
    with pytest.raises(ValueError, match=rf"rows in memory have no recorded pairs.*{remedy}"):
        fit(tmp_path, module, offline([row, {**row, "prompt": "z"}]))
    assert module.policy is None


def test_the_error_of_a_reward_says_whose_rows_lack_its_column(tmp_path: Path, tiny_policy: Path) -> None:
    train: Rows = [{"prompt": f"{i} + 1 = ", "solution": str(i + 1)} for i in range(4)]
    heldout: Rows = [{"prompt": "2 + 2 = "}]
    for rows, others, named in [
        (train, heldout, r"held-out rows of rows in memory \(data\.heldout\)"),
        (heldout, train, "training rows"),
    ]:
        data = RolloutDataModule(rows, FunctionReward(correct), heldout=others, decoding=SHORT)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=rf"^{named}.*: correct reads the column 'solution'"):
            fit(tmp_path, PolicyGradientModule(str(tiny_policy)), data)


def test_the_path_of_a_file_is_a_source(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}), encoding="utf-8")
    for path in (file, str(file)):
        source = offline(path).prompt_source
        assert isinstance(source, DatasetPrompts)
        assert [row.pair.chosen for row in source.load() if row.pair] == ["b"]


def test_names_in_place_of_objects_are_refused() -> None:
    with pytest.raises(TypeError, match=r"model\.loss must be an AbstractPreferenceLoss; got 'ipo': give an object"):
        DPOModule("gpt2", loss="ipo")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"lora must be LoRA\(r=16\), or a configuration of PEFT.*got True"):
        DPOModule("gpt2", lora=True)  # type: ignore[arg-type]


def test_a_checkpoint_that_does_not_exist_is_no_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--checkpoint=.*nothere: no such file or folder"):
        export_checkpoint(str(tmp_path / "nothere"), str(tmp_path / "out"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="this run has no checkpoint yet"):
        export_checkpoint(str(tmp_path / "run"), str(tmp_path / "out"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.skipif(torch.backends.mps.is_available(), reason="'gpu' is MPS there")
def test_a_gpu_that_is_not_there_is_named_before_its_precision() -> None:
    with pytest.raises(ValueError, match=r"trainer\.accelerator=gpu: PyTorch .* sees no GPU on this machine"):
        RLHFTrainer(accelerator="gpu", precision="auto", logger=False)


@pytest.mark.parametrize("name", ["rows.txt", "rows.arrow", "data/rows.xlsx"])
def test_the_name_of_a_file_is_not_looked_up_on_the_hub(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: no such file or folder"):
        DatasetPrompts(name).load()


def test_remedies_for_rows_of_other_methods() -> None:
    with pytest.raises(ValueError, match="a text alone is not read; split it into 'prompt' and 'completion'"):
        DatasetCompletions([{"text": "Once upon a time"}]).load()
    with pytest.raises(ValueError, match="completion_column=chosen reads the chosen response"):
        DatasetCompletions([{"prompt": "a", "chosen": "b", "rejected": "c"}]).load()
    with pytest.raises(ValueError, match="label"):
        DatasetUnpaired([{"prompt": "a", "completion": "b"}]).load()
