"""RewardBench: rows in its form, accuracy by subset and section, and the implicit reward of a policy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_rlhf.cli import main
from lightning_rlhf.commands.label import LabelRun
from lightning_rlhf.evaluation.benchmarks import CODE, SECTIONS, rewardbench_sections, subset_accuracies
from lightning_rlhf.labelers import RewardLabeler
from lightning_rlhf.models import load_tokenizer
from lightning_rlhf.prompts import RewardBenchPrompts, text_prompts
from lightning_rlhf.rewards import AbstractReward, ImplicitReward, RewardOutput
from lightning_rlhf.types import Prompt, Response


def test_sections_weigh_subsets_by_pairs_and_mathematics_as_all_code() -> None:
    accuracies = {subset: {"accuracy": 0.5, "pairs": 10.0} for subsets in SECTIONS.values() for subset in subsets}
    accuracies["alpacaeval-easy"] = {"accuracy": 1.0, "pairs": 60.0}
    accuracies["math-prm"] = {"accuracy": 0.9, "pairs": 1.0}
    accuracies |= {subset: {"accuracy": 0.7, "pairs": 4.0} for subset in CODE}
    found = rewardbench_sections(accuracies)
    assert found["Chat"] == pytest.approx((60 * 1.0 + 40 * 0.5) / 100)
    assert found["Chat Hard"] == found["Safety"] == 0.5
    assert found["Reasoning"] == pytest.approx((0.9 + 0.7) / 2)
    assert found["score"] == pytest.approx((0.8 + 0.5 + 0.5 + 0.8) / 4)
    del accuracies["donotanswer"]
    assert set(rewardbench_sections(accuracies)) == {"Chat", "Chat Hard", "Reasoning"}


def test_accuracy_by_subset_counts_ties_one_half() -> None:
    found = subset_accuracies([1.0, 0.0, 0.5, 1.0, 1.0], ["x", "x", "x", "y", ""])
    assert list(found) == ["x", "y"]
    assert (found["x"]["accuracy"], found["x"]["pairs"]) == (0.5, 3.0)
    assert found["x"]["accuracy_low"] < 0.5 < found["x"]["accuracy_high"]
    assert found["y"]["accuracy"] == 1.0


class Length(AbstractReward):
    """Prefers the longer response."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        del prompts
        return RewardOutput(torch.tensor([float(len(response.text)) for response in responses]))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Three pairs of each subset; the longer response is the chosen one in code alone, and once it is a tie."""
    lines = []
    for section, subsets in SECTIONS.items():
        for subset in subsets:
            for n in range(3):
                longer, shorter = f"a longer answer {n}", f"short {n}"
                pair = (longer, shorter) if section == "Reasoning" else (shorter, longer)
                lines.append({"id": len(lines), "prompt": f"{subset} {n}?", "chosen": pair[0], "rejected": pair[1]})
                lines[-1]["subset"] = subset
    lines[0] |= {"chosen": "equal", "rejected": "equbl"}
    path = tmp_path / "bench.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_a_reward_is_measured_by_subset_and_section(rows: Path, tmp_path: Path) -> None:
    labeler = RewardLabeler(Length(), rule="argmax")
    report = LabelRun(RewardBenchPrompts(str(rows)), labeler, str(tmp_path / "run")).run()
    assert {name: found["accuracy"] for name, found in report["subsets"].items() if found["accuracy"]} == {
        "alpacaeval-easy": pytest.approx(0.5 / 3),
        **dict.fromkeys(SECTIONS["Reasoning"], 1.0),
    }
    assert report["sections"]["Reasoning"] == 1.0
    assert report["sections"]["score"] == pytest.approx((1 + 0.5 / 15) / 4)
    assert report["figures"]["alignment"] == pytest.approx(21.5 / 69)
    text = (tmp_path / "run" / "report.md").read_text()
    assert "| hep-rust | 100.0 % [" in text
    assert "| **Safety** | 0.0 % | RewardBench |" in text


def test_rows_of_another_form_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "q", "chosen": ["a"], "rejected": ["b", "c", "d"], "subset": "Ties"}))
    with pytest.raises(ValueError, match="RewardBench 2"):
        RewardBenchPrompts(str(path)).load()
    path.write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": None}))
    with pytest.raises(ValueError, match="field 'rejected' must be text"):
        RewardBenchPrompts(str(path)).load()


# -- the implicit reward -----------------------------------------------------------------------------------------------


def plain_logp(folder: Path, question: str, answer: str) -> tuple[float, int]:
    """Log-probability of an answer and its end by a plain forward pass, and its number of tokens."""
    tokenizer: Any = load_tokenizer(str(folder))
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    turns = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False).input_ids
    response = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    return float(logits.log_softmax(-1)[range(len(response)), response].sum()), len(response)


@pytest.fixture
def trained(tiny_policy: Path, tmp_path: Path) -> Path:
    """The policy with other weights."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_policy)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "trained")
    load_tokenizer(str(tiny_policy)).save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


def test_the_implicit_reward_is_beta_times_the_log_ratio(tiny_policy: Path, trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"why {n}?", "chosen": "since it is " * (n + 1), "rejected": "no"} for n in range(3)]
    path.write_text("\n".join(map(json.dumps, lines)))
    prompts = text_prompts(RewardBenchPrompts(str(path)).load())
    responses = [prompt.pair[0] for prompt in prompts if prompt.pair is not None]
    policy, reference = (
        [plain_logp(f, line["prompt"], line["chosen"]) for line in lines] for f in (trained, tiny_policy)
    )
    ratios = [a - b for (a, _), (b, _) in zip(policy, reference, strict=True)]
    reward = ImplicitReward(str(trained), str(tiny_policy), beta=0.3, device="cpu")
    torch.testing.assert_close(reward.score(prompts, responses).mean, 0.3 * torch.tensor(ratios), rtol=1e-4, atol=1e-4)
    alone = ImplicitReward(str(trained), beta=2.0, per_token=True, device="cpu").score(prompts, responses).mean
    torch.testing.assert_close(alone, torch.tensor([2 * a / n for a, n in policy]), rtol=1e-4, atol=1e-4)
    same = ImplicitReward(str(trained), str(trained), device="cpu").score(prompts, responses).mean
    assert torch.equal(same, torch.zeros(3))
    with pytest.raises(ValueError, match="prompt 0: an empty response"):
        reward.score(prompts[:1], [Response((0,), " ", "eos")])
    with pytest.raises(ValueError, match="window"):
        reward.score(prompts[:1], [Response((0,), "long " * 100, "eos")])
    with pytest.raises(ValueError, match="beta must be > 0"):
        ImplicitReward(str(trained), beta=0.0)


def test_the_command_line_measures_a_policy_by_its_implicit_reward(
    rows: Path, tiny_policy: Path, trained: Path, tmp_path: Path
) -> None:
    main(
        [
            *("label", "--pairs=RewardBenchPrompts", f"--pairs.path={rows}", "--pairs.limit=6"),
            *("--labeler=RewardLabeler", "--labeler.rule=argmax", "--labeler.reward=ImplicitReward"),
            *(f"--labeler.reward.policy={trained}", f"--labeler.reward.reference={tiny_policy}"),
            f"--run_dir={tmp_path / 'run'}",
        ]
    )
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    lines = [json.loads(line) for line in rows.read_text().splitlines()[:6]]
    right = []
    for line in lines:
        chosen, rejected = (
            plain_logp(trained, line["prompt"], line[side])[0] - plain_logp(tiny_policy, line["prompt"], line[side])[0]
            for side in ("chosen", "rejected")
        )
        right.append(float(chosen > rejected))
    assert report["subsets"]["alpacaeval-easy"]["accuracy"] == pytest.approx(sum(right[:3]) / 3)
    assert report["subsets"]["alpacaeval-length"]["accuracy"] == pytest.approx(sum(right[3:]) / 3)
