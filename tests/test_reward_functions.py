"""Runs whose rewards read columns of the rows: GRPO on math problems, preferences by a function, and resumed runs."""

from __future__ import annotations

import csv
import json
import sqlite3
from contextlib import closing
from functools import partial
from pathlib import Path

import lightning as L
import pytest
from torch.optim import AdamW

from lightning_rlhf import Decoding, PolicyGradientModule, RolloutDataModule
from lightning_rlhf.advantages import RLOO
from lightning_rlhf.cli import main
from lightning_rlhf.datamodules.options import RoundOptions
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.prompts import DatasetPrompts
from lightning_rlhf.rewards import FunctionReward, WeightedReward


FUNCTIONS = '''
def graded(prompts, completions, answer, **columns):
    """The number in the row, and something for the response."""
    assert len(prompts) == len(completions) == len(answer) and set(columns) >= {"tags", "completion_ids"}
    return [float(number) + len(completion) / 1000 for number, completion in zip(answer, completions)]


async def rare(completions, answer):
    return [None if number == "0" else 1.0 for number in answer]
'''


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "own_functions", raising=False)
    (tmp_path / "own_functions.py").write_text(FUNCTIONS)
    return tmp_path


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def problems(path: Path, shift: int = 0) -> Path:
    rows = [{"question": f"{i} + 1?", "answer": f"It is one more.\n#### {i + 1 + shift}"} for i in range(4)]
    return write(path, rows)


def logged(folder: Path) -> dict[str, str]:
    """Last value of each logged column of the run in a folder."""
    found: dict[str, str] = {}
    for file in sorted(folder.rglob("metrics.csv")):
        for row in csv.DictReader(file.open()):
            found |= {name: value for name, value in row.items() if value}
    return found


def test_grpo_on_math_problems_logs_a_curve_for_each_reward(in_folder: Path, tiny_policy: Path) -> None:
    problems(in_folder / "train.jsonl")
    main(
        [
            *("fit", "--config=gsm8k_grpo", f"--model.policy={tiny_policy}", "--data.prompts.path=train.jsonl"),
            *("--data.heldout.path=train.jsonl", "--data.prompt_options.system_prompt=Add.", "--run_dir=run"),
            *("--data.decoding.max_new_tokens=6", "--data.rounds.prompts_per_round=2", "--data.prompts_per_batch=2"),
            *("--data.responses_per_prompt=2", "--trainer.max_epochs=2", "--trainer.accelerator=cpu"),
            *("--trainer.enable_progress_bar=false", "--trainer.precision=32-true"),
        ]
    )
    curves = logged(in_folder / "run")
    assert {f"rollout/rewards/{name}/{kind}" for name in ("correct", "format") for kind in ("mean", "std")} <= set(
        curves
    )
    # r = correct + 0.1 format
    total = float(curves["rollout/rewards/correct/mean"]) + 0.1 * float(curves["rollout/rewards/format/mean"])
    assert float(curves["rollout/reward"]) == pytest.approx(total)
    assert (in_folder / "run" / "model" / "model.safetensors").exists()
    with PreferenceStore(in_folder / "run" / "ledger.sqlite", read_only=True) as store:
        assert [store.round_info(i)["parts"]["correct"]["count"] for i in (0, 1)] == [4, 4]  # type: ignore[index]


def test_math_problems_without_answers_stop_before_a_model_is_loaded(in_folder: Path) -> None:
    write(in_folder / "train.jsonl", [{"question": "1 + 1?", "answer": "two"}])
    with pytest.raises(ValueError, match="'two', does not match column_pattern"):
        main(
            [
                *("fit", "--config=worlds/menu_rl", "--data.prompts=DatasetPrompts", "--data.prompts.path=train.jsonl"),
                *("--data.prompts.prompt_column=question", "--data.reward=ExactAnswerReward", "--run_dir=run"),
                "--data.reward.column_pattern='#### (.+)'",  # quoted: # begins a comment in YAML
            ]
        )


def test_labels_by_a_function_of_the_working_folder(in_folder: Path, tiny_policy: Path) -> None:
    write(in_folder / "rows.jsonl", [{"prompt": f"Say {i}", "answer": str(i), "tags": ["a", "b"]} for i in range(4)])
    (in_folder / "reward.yaml").write_text(
        "data:\n  init_args:\n    labeler:\n      class_path: RewardLabeler\n      init_args:\n        reward:\n"
        "          class_path: WeightedReward\n          init_args:\n            rewards:\n"
        "              graded: {class_path: FunctionReward, init_args: {function: own_functions.graded}}\n"
        "              rare: {class_path: FunctionReward, init_args: {function: own_functions.rare}}\n"
        "            weights: {rare: 0.5}\n"
    )
    main(
        [
            *("fit", "--config=dpo_online", "--config=reward.yaml", f"--model.policy={tiny_policy}", "--run_dir=run"),
            *("--data.prompts=DatasetPrompts", "--data.prompts.path=rows.jsonl", "--data.heldout=DatasetPrompts"),
            *("--data.heldout.path=rows.jsonl", "--data.decoding.max_new_tokens=4", "--data.pairs_per_batch=2"),
            *("--data.rounds.prompts_per_round=2", "--trainer.max_steps=2", "--trainer.accelerator=cpu"),
            *("--trainer.enable_progress_bar=false", "--trainer.precision=32-true", "--data.sampler=VanillaSampler"),
        ]
    )
    with PreferenceStore(in_folder / "run" / "ledger.sqlite", read_only=True) as store:
        # the ledger keeps no columns, and yet the reward has read them
        pairs = [(comparison, label) for i in (0, 1) for _, comparison, label in store.comparisons(i)]
    assert len(pairs) == 4
    for comparison, label in pairs:
        number = float(comparison.prompt.text.split("Say ")[1][0])
        assert label is not None
        assert label.meta["reward_a/graded"] == pytest.approx(number + len(comparison.a.text) / 1000)
        assert label.meta["reward_a"] == pytest.approx(label.meta["reward_a/graded"] + 0.5 * bool(number))
        assert ("reward_a/rare" in label.meta) == bool(number)
    assert {"train/reward", "train/reward/graded", "val/reward"} <= set(logged(in_folder / "run"))


def fit(folder: Path, policy: Path, rows: Path, reward: FunctionReward | WeightedReward) -> RolloutDataModule:
    L.seed_everything(0, verbose=False)
    module = PolicyGradientModule(str(policy), RLOO(), optimizer=partial(AdamW, lr=1e-3))
    data = RolloutDataModule(
        DatasetPrompts(str(rows), prompt_column="question"),
        reward,
        responses_per_prompt=2,
        rounds=RoundOptions(prompts_per_round=4),
        prompts_per_batch=4,
        decoding=Decoding(max_new_tokens=4, rows=4),
    )
    trainer = L.Trainer(
        default_root_dir=folder,
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    return data


class Flaky:
    """Fails at its second call, as a judge may; notes the answers that it was shown."""

    def __init__(self) -> None:
        self.calls, self.answers = 0, list[str]()

    def __call__(self, completions: list[str], answer: list[str], **_: object) -> list[float]:
        self.calls += 1
        if self.calls == 2:
            raise ConnectionError("the judge has gone")
        self.answers += answer
        return [float(text[-1]) for text in answer]


def test_a_run_that_failed_scores_the_responses_of_its_ledger_with_their_columns(
    tmp_path: Path, tiny_policy: Path
) -> None:
    rows, flaky = problems(tmp_path / "rows.jsonl"), Flaky()
    with pytest.raises(ConnectionError):
        fit(tmp_path / "run", tiny_policy, rows, FunctionReward(flaky))
    data = fit(tmp_path / "run", tiny_policy, rows, FunctionReward(flaky))
    assert data.round is not None
    # two chunks of two prompts: one before the failure, one after it, and none twice
    assert flaky.calls == 3
    assert sorted(flaky.answers) == sorted(2 * [f"It is one more.\n#### {i + 1}" for i in range(4)])
    for rollout in data.round.rollouts:
        assert rollout.reward == float(rollout.prompt.text.split(" ")[0]) + 1
    # the curve of the reward is about all chunks, also those of the run that failed: mean and std of 1, 1, ..., 4, 4
    (part,) = data.round.parts.values()
    assert part == {"mean": 2.5, "std": pytest.approx(1.25**0.5), "count": 8}
    with closing(sqlite3.connect(tmp_path / "run" / "ledger.sqlite")) as db:
        assert db.execute("SELECT COUNT(*) FROM run WHERE key LIKE 'parts/%'").fetchone() == (0,)


def length(completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def test_columns_are_no_part_of_a_run_but_a_change_is_reported(tmp_path: Path, tiny_policy: Path) -> None:
    fit(tmp_path / "run", tiny_policy, problems(tmp_path / "rows.jsonl"), FunctionReward(length))
    changed = problems(tmp_path / "rows.jsonl", shift=1)
    with pytest.warns(UserWarning, match="columns that rewards may read have changed"):
        fit(tmp_path / "run", tiny_policy, changed, FunctionReward(length))
