"""An exported folder under lm-evaluation-harness, on a task that lies on this disk. Needs the extra ``eval``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_rlhf.models import LoRA, load_policy, load_tokenizer, save_policy


lm_eval: Any = pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'lightning-rlhf[eval]'")

TASK = """
task: offline
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


def choice(model: Any, tokenizer: Any, question: str, choices: list[str]) -> int:
    """The likeliest continuation by plain forward passes."""
    found = []
    for text in choices:
        prompt, whole = (
            tokenizer(part, add_special_tokens=False).input_ids for part in (question, f"{question} {text}")
        )
        with torch.no_grad():
            logps = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
        found.append(sum(float(logps[place - 1, whole[place]]) for place in range(len(prompt), len(whole))))
    return found.index(max(found))


@pytest.mark.slow
def test_an_exported_policy_gets_the_accuracy_of_its_own_likelihoods(
    tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    policy: Any = load_policy(str(tiny_policy), lora=LoRA(r=2))
    tokenizer = load_tokenizer(str(tiny_policy))
    save_policy(policy, tokenizer, tmp_path / "model")
    documents = [
        {"question": f"number {n} is", "choices": ["small", "large", "odd"], "answer": n % 3} for n in range(9)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "offline.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    result = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "model"), "dtype": "float32"},
        tasks=["offline"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
    )
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    right = [choice(model, tokenizer, d["question"], d["choices"]) == d["answer"] for d in documents]  # type: ignore[arg-type]
    assert result["results"]["offline"]["acc,none"] == pytest.approx(sum(right) / len(right))
