"""Model cards: what a folder to publish says about its run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, GenerationConfig

from lightning_rlhf.cli import main
from lightning_rlhf.models.card import RunFacts, is_hub_id, model_card


def front_matter(text: str) -> dict[str, Any]:
    fields: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return fields


SETTINGS: dict[str, Any] = {
    "model": {
        "class_path": "lightning_rlhf.DPOModule",
        "init_args": {
            "beta": 0.1,
            "loss": {"class_path": "lightning_rlhf.losses.IPOLoss"},
            "lora": {"r": 4, "alpha": 8},
        },
    },
    "data": {
        "class_path": "lightning_rlhf.PreferenceDataModule",
        "init_args": {"prompts": {"class_path": "x.DatasetPrompts", "init_args": {"path": "owner/pairs"}}},
    },
}


def test_a_card_has_the_fields_of_the_hub_and_the_facts_of_the_run() -> None:
    facts = RunFacts(
        "owner/base", SETTINGS, {"val/kl": 1.23456, "train/loss": 3.0}, 7, 4, 12, 3.5, {"torch": "2.0"}, "mit"
    )
    card = model_card(facts, "mine")
    assert front_matter(card) == {
        **{"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["lightning-rlhf", "dpo"]},
        **{"license": "mit", "base_model": "owner/base", "datasets": ["owner/pairs"]},
    }
    for row in (
        *("| loss | IPOLoss |", "| beta | 0.1 |", "| lora | r 4, alpha 8 |", "| optimizer steps | 7 |"),
        *("| prompts | DatasetPrompts owner/pairs |", "| labels | 12 |", "| val/kl | 1.235 |"),
        "| cost of the labels | 3.5, in the unit of the labeler |",
    ):
        assert row in card
    assert "On held-out rows, after 4 steps of training." in card
    # metrics of training are no results
    assert "train/loss" not in card
    assert "# mine\n\nTrained from `owner/base` by [DPO](https://arxiv.org/abs/2305.18290)" in card


def test_a_card_leaves_out_what_is_not_known(tmp_path: Path) -> None:
    card = model_card(RunFacts(str(tmp_path), {}), "mine", adapter=True)
    assert front_matter(card) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lightning-rlhf", "rlhf"],
    }
    assert "Not stated yet" in card
    assert "PeftModel.from_pretrained" in card
    assert f"An adapter for `{tmp_path}`, trained with `lightning_rlhf`" in card
    assert "Results" not in card
    assert [is_hub_id(name) for name in ("a/b", "gpt2", "pypi:x", "world:menu", str(tmp_path))] == [
        *(True, True, False, False, False)
    ]


def test_a_run_leaves_a_folder_to_publish(tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Say {i}. ", "chosen": f"It is {i}.", "rejected": "No."} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "base").symlink_to(tiny_policy)
    (tmp_path / "card.yaml").write_text(
        "trainer:\n  callbacks:\n    - class_path: lightning_rlhf.callbacks.HFExport\n"
        "      init_args: {license: apache-2.0}\n"
    )
    main(
        [
            *("fit", "--config=dpo_offline", "--config=card.yaml", "--model.policy=base", "--model.lora.r=2"),
            *("--data.prompts.path=rows.jsonl", "--trainer.max_steps=2", "--trainer.accelerator=cpu"),
            *("--trainer.enable_progress_bar=false", "--trainer.precision=32-true", "--data.pairs_per_batch=2"),
            *("--data.decoding.max_new_tokens=12", "--run_dir=my_run"),
        ]
    )
    model = tmp_path / "my_run" / "model"
    card, adapter = (model / "README.md").read_text(), (model / "adapter" / "README.md").read_text()
    assert "# my_run" in card
    # as the user named it, and not where it was found
    assert "Trained from `base`" in card
    assert str(tiny_policy) not in card
    assert "An adapter for `base`" in adapter
    assert front_matter(adapter)["library_name"] == "peft"
    assert front_matter(card)["license"] == "apache-2.0"
    assert "| prompts | DatasetPrompts rows.jsonl train |" in card
    assert "| labels | 6 |" in card
    assert "| beta | 0.1 |" in card
    AutoModelForCausalLM.from_pretrained(model)
    GenerationConfig.from_pretrained(model)
