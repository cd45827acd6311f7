"""Rewards that check by a rule: answers, patterns, JSON schemas and lengths."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from lightning_rlhf.rewards import ExactAnswerReward, JSONSchemaReward, LengthReward, PatternReward
from lightning_rlhf.rewards.verifiable import overlong_penalty, read_json
from lightning_rlhf.types import Prompt, Response


GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "test.jsonl"
SCHEMA = json.dumps({"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]})


def prompts(*columns: dict[str, object]) -> list[Prompt]:
    return [Prompt(i, (i,), "?", columns=row) for i, row in enumerate(columns)]


def responses(*texts: str) -> list[Response]:
    return [Response((1,), text, "eos") for text in texts]


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("18", "She makes 9 * 2 = $18 every day. #### 18", 1.0),
        ("18", "It is 17.", 0.0),
        ("70000", "The profit is $70,000", 1.0),
        ("1/2", r"so it is \boxed{0.5}", 1.0),
        (r"\frac{3}{4}", "the answer is $3/4$", 1.0),
        ("18", "I do not know.", 0.0),
    ],
)
def test_answers_are_compared_as_mathematics(gold: str, answer: str, right: float) -> None:
    reward = ExactAnswerReward()
    gold = f"${gold}$" if "\\" in gold else gold
    assert reward.score(prompts({"answer": gold}), responses(answer)).mean.tolist() == [right]


def test_patterns_find_the_answer_in_column_and_response() -> None:
    reward = ExactAnswerReward(column_pattern="#### (.+)", answer_pattern="#### (.+)")
    row = {"answer": "9 * 2 = 18 eggs\n#### 18"}
    texts = ("#### 17\nno:\n#### 18\nbecause 5", "18", "#### 5\n18")
    assert reward.score(prompts(row, row, row), responses(*texts)).mean.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.skipif(not GSM8K.exists(), reason="needs shared/data/gsm8k")
def test_every_solution_of_gsm8k_is_right_and_no_other_number_is() -> None:
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()[:60]]
    reward = ExactAnswerReward(column_pattern="#### (.+)", answer_pattern="#### (.+)")
    asked = prompts(*rows)
    reward.check_prompts(asked)
    assert reward.score(asked, responses(*(row["answer"] for row in rows))).mean.mean().item() == 1.0
    assert reward.score(asked, responses(*(row["answer"] + "1" for row in rows))).mean.sum().item() == 0.0


def test_rows_without_an_answer_are_named_before_anything_is_sampled() -> None:
    with pytest.raises(ValueError, match="reads the column 'answer', which prompt 1 lacks"):
        ExactAnswerReward().check_prompts(prompts({"answer": "1"}, {"level": 3}))
    with pytest.raises(ValueError, match="prompt 0, '18', does not match column_pattern"):
        ExactAnswerReward(column_pattern="#### (.+)").check_prompts(prompts({"answer": "18"}))
    with pytest.raises(ValueError, match="no number and no expression"):
        ExactAnswerReward().score(prompts({"answer": "yes, of course"}), responses("1"))
    with pytest.raises(ValueError, match="needs a group"):
        ExactAnswerReward(column_pattern="####")


def test_missing_packages_are_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(ModuleNotFoundError, match=r'math-verify.*pip install "lightning-rlhf\[rewards\]"'):
        ExactAnswerReward()
    with pytest.raises(ModuleNotFoundError, match=r'jsonschema.*pip install "lightning-rlhf\[rewards\]"'):
        JSONSchemaReward(SCHEMA)


def test_patterns_match_a_part_or_the_whole() -> None:
    texts = ("<think>\na\n</think> 4", "x <think>a</think>", "4")
    thinks = "<think>.*</think>"
    assert PatternReward(thinks).score([], responses(*texts)).mean.tolist() == [1.0, 1.0, 0.0]
    assert PatternReward(thinks + r"\s*\d", whole=True).score([], responses(*texts)).mean.tolist() == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="is no regular expression"):
        PatternReward("(")


def test_json_is_read_and_checked(tmp_path: Path) -> None:
    texts = ('{"name": "Elbe"}', '{"name": 3}', 'Here:\n```json\n{"name": "Oder"}\n```', "Elbe", "[" * 100_000)
    asked = prompts(*({} for _ in texts))
    expected = [1.0, 0.25, 1.0, 0.0, 0.0]
    assert JSONSchemaReward(SCHEMA, readable=0.25).score(asked, responses(*texts)).mean.tolist() == expected
    (tmp_path / "schema.json").write_text(SCHEMA)
    from_file = JSONSchemaReward(str(tmp_path / "schema.json"), readable=0.25)
    assert from_file.score(asked, responses(*texts)).mean.tolist() == expected
    own = prompts({"schema": SCHEMA}, {"schema": '{"type": "number"}'})
    assert JSONSchemaReward(column="schema").score(own, responses("3", "3")).mean.tolist() == [0.0, 1.0]
    assert read_json("null") == (None,)


def test_json_schemas_are_checked_first() -> None:
    with pytest.raises(ValueError, match="is no JSON schema"):
        JSONSchemaReward('{"type": "nothing"}')
    with pytest.raises(ValueError, match="either a schema or the column"):
        JSONSchemaReward()
    with pytest.raises(ValueError, match="column 'schema', which prompt 1 lacks"):
        JSONSchemaReward(column="schema").check_prompts(prompts({"schema": "{}"}, {}))


def test_the_penalty_on_length_is_that_of_dapo() -> None:
    def by_hand(length: int, most: int, buffer: int) -> float:
        if length <= most - buffer:
            return 0.0
        return (most - buffer - length) / buffer if length <= most else -1.0

    lengths = torch.arange(1, 30)
    expected = [by_hand(int(length), 20, 8) for length in lengths]
    assert overlong_penalty(lengths, 20, 8).tolist() == pytest.approx(expected)
    assert overlong_penalty(torch.tensor([20, 21]), 20, 0).tolist() == [0.0, -1.0]
    long = Response(tuple(range(16)), "x", "length")
    assert LengthReward(20, 8).score([], [long]).mean.tolist() == [-0.5]
    with pytest.raises(ValueError, match="buffer_tokens from 0 to most_tokens"):
        LengthReward(4, 5)
