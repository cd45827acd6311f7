"""Plain functions as rewards: TRL's signature, columns of the rows, async functions, and clear errors."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from lightning_rlhf.rewards import AbstractReward, FunctionReward, RewardOutput, UncertaintyPenalty, WeightedReward
from lightning_rlhf.types import Prompt, Response


def plain(count: int = 3) -> list[Prompt]:
    return [Prompt(i, (i,), f"ask {i}", columns={"answer": str(i), "level": i}) for i in range(count)]


def responses(*texts: str) -> list[Response]:
    return [Response((1, 2), text, "eos") for text in texts]


def right(completions: list[str], answer: list[str], **kwargs: list[object]) -> list[float]:
    assert set(kwargs) == {"prompts", "completion_ids", "level"}
    return [float(completion == wanted) for completion, wanted in zip(completions, answer, strict=True)]


async def slow_length(completions: list[str]) -> list[float | None]:
    await asyncio.sleep(0)
    return [None if not completion else len(completion) / 10 for completion in completions]


def test_a_function_gets_texts_and_the_columns_of_the_rows() -> None:
    output = FunctionReward(right).score(plain(), responses("0", "no", "2"))
    assert output.mean.tolist() == [1.0, 0.0, 1.0]
    assert output.parts["right"].tolist() == [1.0, 0.0, 1.0]


def test_a_function_without_kwargs_gets_the_arguments_that_it_names() -> None:
    def levels(level: list[int], prompts: list[str]) -> list[int]:
        assert prompts == ["ask 0", "ask 1", "ask 2"]
        return level

    assert FunctionReward(levels).score(plain(), responses("a", "b", "c")).mean.tolist() == [0.0, 1.0, 2.0]


def test_conversations_arrive_as_messages() -> None:
    turns = ({"role": "user", "content": "hi"},)
    seen: list[object] = []

    def keep(prompts: list[object], completions: list[object], **_: object) -> list[float]:
        seen.extend([*prompts, *completions])
        return [0.0]

    FunctionReward(keep).score([Prompt(0, (1,), "<user>hi", turns)], responses("yes"))
    assert seen == [[{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "yes"}]]


def test_none_is_no_reward_and_no_point_of_the_curve() -> None:
    output = FunctionReward(slow_length, unscored=-1.0).score(plain(2), responses("abcde", ""))
    assert output.mean.tolist() == [0.5, -1.0]
    assert output.parts["slow_length"].isnan().tolist() == [False, True]


def test_async_functions_run_in_a_notebook_too() -> None:
    async def cell() -> list[float]:
        return FunctionReward(slow_length).score(plain(1), responses("ab")).mean.tolist()

    assert asyncio.run(cell()) == [0.2]


def test_functions_by_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "def short(completions, **_):\n    return [-len(c) for c in completions]\n"
    source += "class Judge:\n    async def __call__(self, completions):\n        return [1.0 for _ in completions]\n"
    (tmp_path / "own_rewards.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert FunctionReward("own_rewards.short").score(plain(1), responses("abc")).mean.tolist() == [-3.0]
    judge = FunctionReward("own_rewards.Judge")
    assert judge.is_async
    assert judge.score(plain(1), responses("abc")).mean.tolist() == [1.0]
    with pytest.raises(ValueError, match=r"own_rewards has no 'long': write module\.function"):
        FunctionReward("own_rewards.long")
    with pytest.raises(ValueError, match="there is no module 'nowhere'"):
        FunctionReward("nowhere.long")


def test_a_missing_column_is_named_before_anything_is_sampled() -> None:
    def graded(completions: list[str], solution: list[str]) -> list[float]:
        return [0.0 for _ in completions]

    with pytest.raises(
        ValueError, match=r"graded reads the column 'solution', and the rows have \['answer', 'level'\]"
    ):
        FunctionReward(graded).check_prompts(plain())


@pytest.mark.parametrize(
    ("made", "message"),
    [([1.0], "returned 1 values for 2"), (3.0, "returned a float"), (["good", "bad"], "other things than numbers")],
)
def test_bad_results_are_refused(made: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        FunctionReward(lambda **_: made).score(plain(2), responses("a", "b"))


class Unsure(AbstractReward):
    """1 for each response, with a std."""

    def __init__(self, std: float) -> None:
        self.std = std

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        return RewardOutput(torch.ones(len(responses)), std=torch.full((len(responses),), self.std))


def test_a_weighted_sum_keeps_its_parts_and_adds_variances() -> None:
    members: dict[str, AbstractReward] = {"a": Unsure(3.0), "b": Unsure(2.0), "slow": FunctionReward(slow_length)}
    output = WeightedReward(members, {"b": 2.0, "slow": 10.0}).score(plain(2), responses("abc", ""))
    assert output.mean.tolist() == [1.0 + 2.0 + 3.0, 1.0 + 2.0]
    # sqrt(3^2 + (2 * 2)^2)
    assert output.std is not None
    assert output.std.tolist() == [5.0, 5.0]
    assert list(output.parts) == ["a", "b", "slow"]
    assert output.parts["slow"][0].item() == pytest.approx(0.3)
    assert output.parts["slow"].isnan().tolist() == [False, True]


def test_sums_in_sums_keep_the_names_of_both() -> None:
    inner = WeightedReward({"x": Unsure(0.0), "y": Unsure(0.0)})
    assert list(WeightedReward({"in": inner, "z": Unsure(0.0)}).score(plain(1), responses("a")).parts) == [
        "in/x",
        "in/y",
        "z",
    ]


def test_sums_refuse_what_they_cannot_add() -> None:
    with pytest.raises(ValueError, match="names 'c', which is none of a"):
        WeightedReward({"a": Unsure(0.0)}, {"c": 1.0})
    with pytest.raises(ValueError, match="at least one reward"):
        WeightedReward({})
    with pytest.raises(ValueError, match="put UncertaintyPenalty around the WeightedReward"):
        WeightedReward({"a": UncertaintyPenalty(Unsure(0.0))})
    with pytest.raises(ValueError, match="must be finite"):
        WeightedReward({"a": Unsure(0.0)}, {"a": float("nan")})
