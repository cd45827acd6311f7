"""What users plug in is checked when a run is set up, and errors of constructors say what is wrong, then where."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_rlhf.cli import main
from lightning_rlhf.collectors.preferences import labeled
from lightning_rlhf.datamodules.preferences import PreferenceDataModule
from lightning_rlhf.labelers import AbstractLabeler, RecordedLabeler, RewardLabeler
from lightning_rlhf.prompts import BuiltinPrompts
from lightning_rlhf.randomness import Key
from lightning_rlhf.rewards import AbstractReward, RewardOutput, UncertaintyPenalty
from lightning_rlhf.runtime.plugins import check_plugin
from lightning_rlhf.samplers import BestOfNSampler, MixtureSampler, OfflineSampler, VanillaSampler
from lightning_rlhf.types import Comparison, Label, Prompt, Response


PLUGINS = """
from typing import Any
from lightning.pytorch import Callback
from lightning_rlhf.labelers import AbstractLabeler, RewardLabeler
from lightning_rlhf.losses import AbstractPreferenceLoss
from lightning_rlhf.rewards import AbstractReward
from lightning_rlhf.samplers import AbstractPairSampler

class Bare(AbstractLabeler):
    def __init__(self, reward):
        self.reward = reward
    def label(self, comparisons, key):
        return []

class Sub(RewardLabeler):
    def __init__(self, reward: Any, rule="bernoulli"):
        super().__init__(reward, rule)

class Sampler(AbstractPairSampler):
    def __init__(self, others=()):
        self.others = others
    def sample(self, prompts, engine, key):
        return []

class Loss(AbstractPreferenceLoss):
    def __init__(self, inner=None):
        self.inner = inner
    def __call__(self, pairs, beta):
        return pairs.margin()

class Shows(Callback):
    def __init__(self, reward=None):
        self.reward = reward

class Letters(AbstractReward):
    def __init__(self, size: int = 30):
        if size < 10:
            raise ValueError(f"size {size} is too small: take at least 10")
    def score(self, prompts, responses):
        return [1.0 for _ in responses]
"""


@pytest.fixture
def fit(tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "plug.py").write_text(PLUGINS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "plug", raising=False)

    def run(*options: str) -> None:
        fixed = ["--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.max_epochs=1"]
        main(["fit", "--config", "dpo_online", *fixed, f"--model.policy={tiny_policy}", "--run_dir=run", *options])

    return run


@pytest.mark.parametrize(
    ("options", "argument", "kind"),
    [
        (["--data.labeler=plug.Bare", "--data.labeler.reward=plug.Letters"], "data.labeler.reward", "AbstractReward"),
        (
            ["--data.labeler=plug.Bare", "--data.labeler.reward={class_path: plug.Letters}"],
            "data.labeler.reward",
            "AbstractReward",
        ),
        (
            ["--data.labeler=plug.Sub", "--data.labeler.reward={class_path: plug.Letters}"],
            "data.labeler.reward",
            "AbstractReward",
        ),
        (["--data.labeler=plug.Bare", "--data.labeler.reward=LexiconReward"], "data.labeler.reward", "AbstractReward"),
        (
            ["--data.sampler=plug.Sampler", "--data.sampler.others=[{class_path: plug.Sampler}]"],
            "data.sampler.others",
            "AbstractPairSampler",
        ),
        (
            ["--model.loss=plug.Loss", "--model.loss.inner=lightning_rlhf.losses.DPOLoss"],
            "model.loss.inner",
            "AbstractPreferenceLoss",
        ),
        (
            ["--trainer.callbacks=plug.Shows", "--trainer.callbacks.reward={class_path: plug.Letters}"],
            "trainer.callbacks[0].reward",
            "AbstractReward",
        ),
    ],
)
def test_an_argument_without_a_type_is_named_before_anything_is_built(
    fit: Any, options: list[str], argument: str, kind: str
) -> None:
    with pytest.raises(TypeError) as caught:
        fit(*options)
    message = str(caught.value)
    assert message.startswith(f"{argument}: ")
    assert f": {kind}`" in message
    assert "\n" not in message


def test_an_error_of_a_constructor_is_the_cause_and_the_place(fit: Any) -> None:
    with pytest.raises(ValueError) as caught:
        fit("--data.labeler.reward=plug.Letters", "--data.labeler.reward.size=3")
    cause, place = str(caught.value).splitlines()
    assert cause == "size 3 is too small: take at least 10"
    assert "plug.Letters at data.labeler.reward; " in place
    assert "plug.py:" in place
    assert "Namespace" not in str(caught.value)
    with pytest.raises((ValueError, SystemExit)) as caught:
        fit("--data.labeler.reward=plug.Letters", "--data.rounds.prompts_per_round=0")
    assert "data.rounds.prompts_per_round must be at least 1; got 0" in str(caught.value)
    assert "Namespace" not in str(caught.value)


def test_from_python_the_seat_is_named() -> None:
    described: Any = {"class_path": "plug.Letters"}
    prompts = BuiltinPrompts("train")
    with pytest.raises(TypeError, match=r"data\.labeler must be an AbstractLabeler; got the description of a plug"):
        PreferenceDataModule(prompts, VanillaSampler(), described)
    with pytest.raises(TypeError, match=r"data\.sampler must be .*got the class VanillaSampler: give an object"):
        PreferenceDataModule(prompts, VanillaSampler, RecordedLabeler())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"RewardLabeler\.reward must be an AbstractReward; got 'plug\.Letters'"):
        RewardLabeler("plug.Letters")  # type: ignore[arg-type]

    class Duck:
        def score(self, prompts: Any, responses: Any) -> list[float]:
            return [0.0] * len(responses)

    check_plugin("data.reward", Duck(), AbstractReward)


# ---- what plug-ins return ------------------------------------------------------------------------------------------


class Fixed(AbstractReward):
    def __init__(self, value: Any) -> None:
        self.value = value

    def score(self, prompts: Any, responses: Any) -> Any:
        return self.value


def pairs(count: int, **meta: Any) -> list[Comparison]:
    answers = [Response((i,), text, "eos") for i, text in enumerate("ab")]
    return [Comparison(Prompt(i, (1,), "?"), *answers, meta=dict(meta)) for i in range(count)]


@pytest.mark.parametrize(
    "value",
    [
        [1.0, 2.0],
        (1, 2),
        np.array([1.0, 2.0], dtype=np.float32),
        torch.tensor([1, 2]),
        [torch.tensor(1.0), torch.tensor(2.0)],
        [np.float64(1.0), np.int64(2)],
        RewardOutput([1.0, 2.0], std=np.zeros(2)),  # type: ignore[arg-type]
    ],
)
def test_rewards_as_lists_and_arrays_are_taken(value: Any) -> None:
    (label,) = RewardLabeler(Fixed(value), rule="soft").label(pairs(1), Key((0,)))
    assert label.probability == pytest.approx(1 / (1 + math.e))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"Fixed\.score returned None as its mean; return RewardOutput\(mean=\.\.\.\) with a tensor of floats"),
        ("ab", r"Fixed\.score returned a str as its mean"),
        (["a", "b"], r"Fixed\.score returned a list as its mean"),
        ([None, 1.0], r"Fixed\.score returned a list as its mean"),
        (3.0, r"Fixed\.score returned a float as its mean"),
        ({"mean": [1.0]}, r"Fixed\.score returned a dict as its mean"),
        ([1.0], r"shape \(1,\) for 2 responses"),
        (np.zeros((2, 1)), r"shape \(2, 1\) for 2 responses"),
        (RewardOutput(torch.zeros(2), std=torch.zeros(3)), r"a std of shape \(3,\)"),
        (RewardOutput(torch.zeros(2), members=torch.zeros(2)), r"a members of shape \(2,\)"),
        ([1.0, math.nan], r"returned nan for prompt 0, response 'b'"),
        (torch.tensor([1j, 2j]), r"returned a Tensor as its mean"),
    ],
)
def test_what_is_no_reward_is_named(value: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        RewardLabeler(Fixed(value)).label(pairs(1), Key((0,)))


def test_a_penalty_on_a_reward_without_numbers_names_the_reward() -> None:
    with pytest.raises(TypeError, match=r"Fixed\.score returned None"):
        UncertaintyPenalty(Fixed(None)).score([], [])


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (None, r"Says\.label returned None; return a list with a Label per comparison"),
        ([0.5], r"returned a list that holds 0\.5"),
        ([Label(0.5)] * 2, r"returned 2 labels for 1 comparisons"),
        ("x", r"returned 'x'"),
    ],
)
def test_what_is_no_label_is_named(made: Any, message: str) -> None:
    class Says(AbstractLabeler):
        def label(self, comparisons: Any, key: Key) -> Any:
            return made

    with pytest.raises((TypeError, ValueError), match=message):
        labeled(OfflineSampler(), Says(), pairs(1), Key((0,)))


# ---- best of N with an oracle --------------------------------------------------------------------------------------


class Never(AbstractLabeler):
    def label(self, comparisons: Any, key: Key) -> Any:
        raise AssertionError("the oracle has said which is better")


def test_best_of_n_with_an_oracle_reward_is_labeled_by_the_oracle() -> None:
    sampler = BestOfNSampler(n=8, reward=Fixed(None))
    best, tie = pairs(1, score_a=0.1, score_b=0.0), pairs(1, score_a=0.2, score_b=0.2)
    labels = labeled(sampler, Never(), best + tie, Key((0,)))
    # a Bernoulli label would be 0 in 48 of 100 such pairs
    assert [label.probability for label in labels] == [1.0, 0.5]
    assert [label.cost for label in labels] == [4.0, 4.0]
    assert labels[0].meta == {"reward_a": 0.1, "reward_b": 0.0}


def test_best_of_n_by_the_implicit_reward_asks_the_labeler() -> None:
    labels = labeled(BestOfNSampler(), RewardLabeler(Fixed([1.0, 2.0]), "argmax"), pairs(1), Key((0,)))
    assert [label.probability for label in labels] == [0.0]


def test_in_a_mixture_each_member_says_its_own() -> None:
    sampler = MixtureSampler([VanillaSampler(), BestOfNSampler(reward=Fixed(None))])
    mixed = [*pairs(1, member=1, score_a=1.0, score_b=0.0), *pairs(1, member=0)]
    labels = labeled(sampler, RewardLabeler(Fixed([1.0, 2.0]), "argmax"), mixed, Key((0,)))
    assert [label.probability for label in labels] == [1.0, 0.0]
