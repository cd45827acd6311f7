"""``lightning-rlhf run``: stages that feed each other, stopped and continued, and the table at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_rlhf.cli import main
from lightning_rlhf.commands.pipeline import Pipeline, Stage


ROOT = Path(__file__).parents[2]
SHORT: dict[str, Any] = {
    "trainer.max_epochs": 1,
    "trainer.check_val_every_n_epoch": 1,
    "trainer.enable_progress_bar": False,
    "trainer.precision": "32-true",
    "data.decoding.max_new_tokens": 4,
}


def fit(name: str, config: str, **options: Any) -> dict[str, Any]:
    return {"name": name, "config": [config, "trainer/cpu"], "options": {**SHORT, **options}}


def write(path: Path, content: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


def chain(policy: Path) -> dict[str, Any]:
    """Both pipelines of the issue at once: sft -> pairs -> labels -> reward model -> rlaif, and sft -> a reward."""
    small = {"data.rounds.prompts_per_round": 4, "data.prompts.limit": 4, "data.heldout.limit": 2}
    sft = {k: v for k, v in SHORT.items() if k != "data.decoding.max_new_tokens"}
    rl = {**small, "data.prompts_per_batch": 4, "model.policy": "${sft}/model"}
    return {
        "variables": {"policy": str(policy), "rate": 1.0e-3},
        "stages": [
            {
                "name": "sft",
                "config": ["sft", "trainer/cpu"],
                "options": {
                    **sft,
                    "model.policy": "${policy}",
                    "model.optimizer.lr": "${rate}",
                    "data.prompts.path": "rows.jsonl",
                    "data.rows_per_batch": 2,
                    "data.max_completion_tokens": 8,
                },
            },
            {
                "name": "pairs",
                "command": "sample",
                "config": ["dpo_online", "trainer/cpu"],
                "options": {
                    "model.policy": "${sft}/model",
                    "data.sampler": "VanillaSampler",
                    "data.prompts.limit": 4,
                    "data.rounds.prompts_per_round": 4,
                    "data.decoding.max_new_tokens": 4,
                    "trainer.precision": "32-true",
                },
            },
            {
                "name": "labels",
                "verb": "label",
                "options": {
                    "pairs": "LedgerPrompts",
                    "pairs.path": "${pairs}/ledger.sqlite",
                    "pairs.labels": False,
                    "recorded_labels": False,
                    "labeler": "judges.Longer",
                    "out": "${folder}/rows.jsonl",
                },
            },
            fit(
                "reward_model",
                "reward_model",
                **{
                    "model.backbone": "${sft}/model",
                    "data.prompts.path": "${labels}/rows.jsonl",
                    "data.pairs_per_batch": 2,
                },
            ),
            fit("rlaif", "rlaif", **rl, **{"data.reward.path": "${reward_model}/model"}),
            fit("direct", "rlhf", **rl, **{"data.reward": "judges.Length"}),
        ],
        "report": {
            "policies": ["rlaif", "direct"],
            "baseline": "${sft}/model",
            "beta": 0.1,
            "options": {
                "prompts": "BuiltinPrompts",
                "prompts.limit": 3,
                "decoding.max_new_tokens": 4,
                "labeler": "judges.Longer",
                "reward": "judges.Length",
            },
        },
    }


JUDGES = """
import torch
from lightning_rlhf.labelers import AbstractLabeler
from lightning_rlhf.rewards import AbstractReward, RewardOutput
from lightning_rlhf.types import Label


class Longer(AbstractLabeler):
    def label(self, comparisons, key):
        return [Label(0.9 if len(c.a.ids) > len(c.b.ids) else 0.2) for c in comparisons]


class Length(AbstractReward):
    def score(self, prompts, responses):
        return RewardOutput(torch.tensor([float(len(r.text)) for r in responses]))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "judges.py").write_text(JUDGES)
    rows = [{"prompt": f"Say {i}.", "completion": f" {i}"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


@pytest.mark.slow
def test_the_full_chain_ends_in_a_table_and_is_done_only_once(
    folder: Path, tiny_policy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(folder / "chain.yaml", chain(tiny_policy))
    main(["run", path, "--run_dir=runs/chain"])
    table = json.loads((folder / "runs/chain/report.json").read_text())
    assert [row["policy"] for row in table["policies"]] == ["rlaif", "direct"]
    for row in table["policies"]:
        assert row["j"] == pytest.approx(row["score"] - 0.1 * row["kl"])
        assert row["kl_stderr"] is not None and 0 <= row["win_rate"] <= 1
        assert row["labels"] == 4 and row["seconds"] > 0
    assert "| rlaif | " in (folder / "runs/chain/report.md").read_text()
    labeled = [json.loads(line) for line in (folder / "runs/chain/03-labels/rows.jsonl").open()]
    assert {row["probability"] for row in labeled} <= {0.9, 0.8}
    capfd.readouterr()

    main(["run", path, "--run_dir=runs/chain"])
    said = capfd.readouterr().out
    assert said.count(": done") == 8  # six stages, two evaluations
    assert "lightning-rlhf fit" not in said and "| direct | " in said

    with pytest.raises(ValueError, match=r"stage 'sft' was done with other settings.*delete runs/chain/01-sft"):
        main(["run", path, "--run_dir=runs/chain", "--set", "rate=0.5"])


@pytest.mark.slow
def test_a_pipeline_that_was_killed_goes_on_at_its_stage(folder: Path) -> None:
    """The second stage kills its process; the first is not run again, and its label is not asked for again."""
    (folder / "judges.py").write_text(
        JUDGES
        + """
import os, signal
from pathlib import Path

class Mortal(Longer):
    def label(self, comparisons, key):
        with open("asked.txt", "a") as file:
            file.write("".join(f"{c.prompt.index}\\n" for c in comparisons))
        if not Path("spared").exists() and Path("asked.txt").read_text().count("\\n") > 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().label(comparisons, key)
"""
    )
    pairs = [{"prompt": f"Q{i}", "chosen": "yes", "rejected": "no"} for i in range(4)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    base = {"pairs": "DatasetPrompts", "pairs.path": "pairs.jsonl"}
    stages = [
        {"name": "first", "command": "label", "options": {**base, "labeler": "judges.Longer"}},
        {"name": "second", "verb": "label", "options": {**base, "labeler": "judges.Mortal", "chunk": 2}},
    ]
    path = write(folder / "p.yaml", {"stages": stages})
    command = [sys.executable, "-m", "lightning_rlhf", "run", path]
    killed = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)
    assert killed.returncode != 0
    assert "stage 'second' ended with status -9; the same command goes on from there" in killed.stderr
    assert (folder / "runs/p/01-first/done.json").exists() and not (folder / "runs/p/02-second/done.json").exists()
    (folder / "spared").touch()
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)
    assert done.returncode == 0, done.stderr
    assert "first (1 of 2): done" in done.stdout
    asked = (folder / "asked.txt").read_text().split()
    assert sorted(asked[:2] + asked[4:]) == ["0", "1", "2", "3"]  # the chunk that was not answered is asked for again


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": []}, "stages must be a list of at least one"),
        ({"stages": [{"verb": "fit"}]}, r"stages\[0\].name must be a new word"),
        ({"stages": [{"name": "a", "command": "train"}]}, r"stages\[0\].command must be one of fit, label"),
        ({"stages": [{"name": "a", "option": {}}]}, "unknown field 'option'"),
        ({"stages": [{"name": "a", "options": {"x": "${b}/model"}}, {"name": "b"}]}, r"options.x: \$\{b\} is neither"),
        ({"stages": [{"name": "a"}, {"name": "a"}]}, r"stages\[1\].name"),
        ({"stages": [{"name": "a", "options": {"run_dir": "x"}}]}, "run_dir is the pipeline's"),
        ({"stages": [{"name": "a"}], "report": {"policies": ["b"], "baseline": "x"}}, "report.policies must name fit"),
        ({"stages": [{"name": "a"}], "report": {"policies": ["a"]}}, "report.baseline"),
        ({"stage": []}, "unknown field 'stage'"),
    ],
)
def test_a_mistake_is_named_before_anything_runs(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pipeline(write(tmp_path / "p.yaml", change))


def test_settings_are_filled_in(tmp_path: Path) -> None:
    stages = [
        {"name": "one"},
        {"name": "two", "config": "base", "options": {"a": "${one}/model", "b": "${n}", "c": ["${folder}"], "d": None}},
    ]
    path = write(tmp_path / "p.yaml", {"run_dir": "r", "variables": {"n": 3}, "stages": stages})
    assert Pipeline(path).stages[1].arguments == [
        *("fit", "--config=base", "--run_dir=r/02-two"),
        *("--a=r/01-one/model", "--b=3", '--c=["r/02-two"]', "--d=null"),
    ]
    assert Pipeline(path, overrides={"n": "4"}).stages[1].options["b"] == "4"
    with pytest.raises(ValueError, match="variables has no 'm' to change"):
        Pipeline(path, overrides={"m": "4"})


def test_what_is_done_is_known_by_its_config_files_and_by_the_runs_it_builds_on(folder: Path) -> None:
    (folder / "pairs.jsonl").write_text('{"prompt": "Q", "chosen": "yes", "rejected": "no"}\n')
    (folder / "mine.yaml").write_text("chunk: 2\n")
    label = {"pairs": "DatasetPrompts", "labeler": "judges.Longer"}
    first = {**label, "pairs.path": "pairs.jsonl", "out": "${folder}/rows.jsonl"}
    second = {**label, "pairs.path": "${one}/rows.jsonl"}
    stages = [
        {"name": "one", "command": "label", "config": "mine.yaml", "options": first},
        {"name": "two", "command": "label", "options": second},
    ]
    pipeline = Pipeline(write(folder / "p.yaml", {"stages": stages}))
    one, two = (stage.folder / "done.json" for stage in pipeline.stages)
    for marker in (one, two):
        marker.parent.mkdir(parents=True)
    done = {"arguments": [], "seconds": 1.0, "finished": 1.0}
    one.write_text(json.dumps({**done, "digest": pipeline._digest(pipeline.stages[0])}))
    two.write_text(json.dumps({**done, "digest": pipeline._digest(pipeline.stages[1])}))
    pipeline.run()  # nothing is left to do
    one.write_text(json.dumps({**json.loads(one.read_text()), "finished": 2.0}))
    with pytest.raises(ValueError, match="stage 'two' was done with other settings, or on an earlier run"):
        pipeline.run()
    (folder / "mine.yaml").write_text("chunk: 3\n")
    with pytest.raises(ValueError, match="stage 'one' was done with other settings"):
        pipeline.run()


def test_a_table_is_stale_when_its_baseline_or_its_judge_was_run_again(tmp_path: Path) -> None:
    report = {"policies": ["policy"], "baseline": "${sft}/model", "options": {"reward.path": "${judge}/model"}}
    content = {"run_dir": str(tmp_path), "stages": [{"name": n} for n in ("sft", "judge", "policy")], "report": report}
    pipeline = Pipeline(write(tmp_path / "p.yaml", content))
    assert pipeline.report is not None and pipeline.report.needs == ("sft", "judge")
    options = {"reward.path": str(tmp_path / "02-judge/model"), "a": str(tmp_path / "03-policy/model")}
    options |= dict.fromkeys(("b", "options.reference"), str(tmp_path / "01-sft/model"))
    where = tmp_path / "report" / "policy"
    made = Stage("policy", "evaluate", (), options, where, ("policy", "sft", "judge"))
    done = {"arguments": [], "seconds": 1.0, "finished": 1.0}

    def finish(stage: Stage, **changes: Any) -> None:
        stage.folder.mkdir(parents=True, exist_ok=True)
        (stage.folder / "done.json").write_text(json.dumps({**done, "digest": pipeline._digest(stage), **changes}))

    for stage in (*pipeline.stages, made):
        finish(stage)
    (where / "report.json").write_text("{}")
    assert pipeline.run() is not None
    # a report of version 0.1 knew its policy alone
    earlier = [arg.replace("--options.reference=", "--reference=") for arg in made.arguments]
    finish(made, digest=pipeline._digest(replace(made, needs=("policy",)), earlier))
    assert pipeline.run() is not None
    for number in (0, 1):
        finish(made)
        finish(pipeline.stages[number], finished=2.0 + number)
        with pytest.raises(ValueError, match="stage 'policy' was done with other settings, or on an earlier run"):
            pipeline.run()


def test_the_example_is_a_pipeline() -> None:
    pipeline = Pipeline(str(ROOT / "examples" / "rlaif_pipeline.yaml"))
    assert [stage.name for stage in pipeline.stages] == ["sft", "pairs", "labels", "reward_model", "rlaif", "drlaif"]
    assert pipeline.report is not None and pipeline.report.baseline == "runs/rlaif_pipeline/01-sft/model"
