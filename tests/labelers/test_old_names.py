"""Arguments of judges by their names of version 0.1: on the command line, in configs, in Python and in ledgers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_rlhf.commands.config_files import classes_in_configs
from lightning_rlhf.commands.evaluate import EvaluationOptions, EvaluationRun
from lightning_rlhf.judging.options import ChainOfThought, JudgeOptions
from lightning_rlhf.labelers import LLMLabeler
from lightning_rlhf.prompts import BuiltinPrompts
from lightning_rlhf.renamed import renamed_arguments, renamed_config, renamed_settings
from lightning_rlhf.rewards import LexiconReward
from lightning_rlhf.runtime.fingerprint import comparable, described, differences, without_new_defaults


def llm(**arguments: Any) -> dict[str, Any]:
    return {"class_path": "lightning_rlhf.labelers.LLMLabeler", "init_args": arguments}


def test_the_command_line_knows_the_class_from_the_arguments() -> None:
    given = [
        "--labeler=LLMLabeler",
        "--labeler.samples=3",
        "--labeler.chain_of_thought=true",
        "--labeler.dtype=float16",
    ]
    assert renamed_arguments(given, command="label") == [
        "--labeler=LLMLabeler",
        "--labeler.chain_of_thought.samples=3",
        "--labeler.judge_options.dtype=float16",
    ]
    # a class of the user's own keeps its argument
    own = ["--labeler=mine.Labeler", "--labeler.samples=3"]
    assert renamed_arguments(own, command="label") == own


def test_the_command_line_knows_the_class_from_configs(tmp_path: Path) -> None:
    classes = classes_in_configs(["fit", "--config", "drlaif", "--data.reward.dtype=bfloat16"])
    assert classes["data.reward"] == "LLMScoreReward"
    assert renamed_arguments(["--data.reward.dtype=bfloat16"], classes=classes) == [
        "--data.reward.judge_options.dtype=bfloat16"
    ]
    # the server of a labeler needs no class
    server = ["--data.labeler=ServerLabeler", "--data.labeler.server.concurrency=2"]
    assert renamed_arguments(server)[1] == "--data.labeler.server.requests.concurrency=2"


def test_the_settings_of_evaluate_move_into_groups() -> None:
    assert renamed_arguments(["--dtype=float16", "--seed", "3"], command="evaluate") == [
        "--policy_options.dtype=float16",
        "--options.seed",
        "3",
    ]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"chain_of_thought": True, "samples": 2, "temperature": 0.5}, {"samples": 2, "temperature": 0.5}),
        ({"samples": 2, "chain_of_thought": True}, {"samples": 2}),
        ({"chain_of_thought": False, "samples": 1, "max_rationale_tokens": 5}, None),
    ],
)
def test_a_config_may_switch_the_chain_of_thought(old: dict[str, Any], new: dict[str, Any] | None) -> None:
    found = renamed_config({"data": {"class_path": "X", "init_args": {"labeler": llm(**old)}}})
    assert found["data"]["init_args"]["labeler"]["init_args"] == {"chain_of_thought": new}


@pytest.mark.parametrize("thinking", [False, True])
def test_an_old_run_has_the_fingerprint_of_a_new_one(tiny_judge: Path, thinking: bool) -> None:
    earlier = llm(
        judge=str(tiny_judge),
        task="helpful",
        style="base",
        shots=0,
        chain_of_thought=thinking,
        samples=1,
        temperature=0.0,
        top_p=1.0,
        max_rationale_tokens=512,
        min_mass=0.05,
        max_candidate_chars=8000,
        chat=None,
        chat_template=None,
        dtype="float32",
        device=None,
        tokens_per_batch=8192,
        cost=1.0,
        trust_remote_code=False,
    )
    now = described(LLMLabeler(str(tiny_judge), chain_of_thought=ChainOfThought() if thinking else None))
    with pytest.warns(DeprecationWarning, match="judge_options.dtype"):
        by_old_names = described(LLMLabeler(str(tiny_judge), chain_of_thought=thinking, dtype="float32"))  # type: ignore[arg-type, call-arg]

    def settings(labeler: dict[str, Any]) -> dict[str, Any]:
        return comparable({"data": {"class_path": "PreferenceDataModule", "init_args": {"labeler": labeler}}})

    # as `ledger.same_run` compares: what version 0.2 has added, such as chain_of_thought.vote, is at its default
    known, added = without_new_defaults(settings(earlier), settings(now))
    assert differences(settings(earlier), known, "then") == []
    assert added == (["data.labeler.chain_of_thought.vote"] if thinking else [])
    assert by_old_names == now
    ledger = renamed_settings({"verb": "label", "seed": 0, "labeler": earlier}, "label")
    assert ledger["command"] == "label"


def test_constructors_take_old_names(tiny_judge: Path) -> None:
    with pytest.warns(DeprecationWarning, match=r"LLMLabeler\(chat=...\) is judge_options.chat"):
        made = LLMLabeler(str(tiny_judge), chat=False, chain_of_thought=True, max_rationale_tokens=7)  # type: ignore[call-arg, arg-type]
    assert made.judge.options == JudgeOptions(chat=False)
    assert made.chain_of_thought == ChainOfThought(max_tokens=7)
    with pytest.warns(DeprecationWarning, match="options.seed"):
        run = EvaluationRun(BuiltinPrompts("heldout"), "chosen", reward=LexiconReward(), seed=3)  # type: ignore[call-arg]
    assert run.options == EvaluationOptions(seed=3)
