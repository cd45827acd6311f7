"""Names of other libraries on our command line: each is answered with ours, and the table agrees with the docs."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import yaml

from lightning_rlhf import losses
from lightning_rlhf.cli import main
from lightning_rlhf.commands.elsewhere import CLASSES, COMMANDS, SETTINGS, our_setting


PAGE = Path(__file__).parents[2] / "docs" / "coming-from-trl.md"
SECTIONS = ("Rows", "Reward functions", "Metrics", "The shortest way", "Behaves differently", "Not here")
OFFLINE = ["fit", "--config=dpo_offline", "--model.policy=x"]


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> list[str]:
    """Lines of the error of a command line, without the two of usage."""
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[:-2]


def rows_of_the_page() -> list[tuple[set[str], set[str]]]:
    """Names of TRL and paths of ours in each row of the tables of settings."""
    parts = re.split(r"^## (.*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    text = "\n".join(text for title, text in zip(parts[1::2], parts[2::2], strict=True) if title not in SECTIONS)
    found = []
    for line in text.splitlines():
        cells = re.split(r"(?<!\\)\|", line)[1:-1]
        if len(cells) < 2:
            continue
        names = {name for name in re.findall(r"`([a-z]\w*)(?:: [^`]*)?`", cells[0]) if name != "accelerate"}
        paths = {span.partition("=")[0] for span in re.findall(r"`([a-z][\w.]*(?:=[^`]*)?)`", cells[1])}
        found.append((names, {path for path in paths if "." in path or path.startswith(("run_dir", "seed_", "check"))}))
    return found


def test_every_setting_on_the_page_for_users_of_trl_is_answered() -> None:
    named = set().union(*(names for names, _ in rows_of_the_page()))
    assert len(named) > 120
    assert {name for name in named if our_setting(name) is None} == set()


def test_the_answers_are_those_of_the_page() -> None:
    """Each setting that an answer gives stands in a row of the same name, or the page has none for it."""
    rows = rows_of_the_page()
    for name in set().union(*(names for names, _ in rows)) & SETTINGS.keys():
        ours = set(re.findall(r"--([a-z_]+(?:\.[a-z_]+)*)(?![\w.])", SETTINGS[name].partition("(")[0])) - {"config"}
        listed = set().union(*(paths for names, paths in rows if name in names))
        # a row may name the group of a setting
        agree = [path for path in ours if any(f"{path}.".startswith(f"{other}.") for other in listed)]
        assert not listed or not ours or agree, (name, ours, listed)


def test_every_setting_of_an_answer_exists() -> None:
    rows = [*OFFLINE, "--data.prompts.path=x"]
    held_out = ["--data.heldout=DatasetPrompts", "--data.heldout.path=x"]
    commands = [
        [*OFFLINE, "--data.prompts.path={path: x}", *held_out, "--model.lora.r=8", "--model.loss=CDPOLoss"],
        [*rows, "--trainer.logger=WandbLogger", "--trainer.callbacks=ModelCheckpoint", "--model.loss=SimPOLoss"],
        [*rows, "--data.reward=WeightedReward", "--data.reward.rewards={}", "--model.loss=DiscoPOPLoss"],
        [*rows, "--data.reward=FunctionReward", "--data.reward.function=f", "--model.loss=NLLTermLoss"],
        [*rows, "--data.reward=RewardModelReward", "--data.reward.path=x"],
        [*OFFLINE, "--data.prompts=MixedPrompts", "--data.prompts.sources={}"],
        ["fit", "--config=sft", "--model.policy=x", "--data.prompts.path=x"],
        ["fit", "--config=kto", "--model.policy=x", "--data.prompts.path=x"],
        ["fit", "--config=reward_model", "--model.backbone=x", "--data.prompts.path=x"],
        ["fit", "--config=rlhf", "--model.policy=x", "--data.reward=LexiconReward", "--model.advantage=GRPO"],
    ]
    known: set[str] = set()
    for command in commands:
        out = io.StringIO()
        with redirect_stdout(out), pytest.raises(SystemExit) as ended:
            main([*command, "--print_config"])
        assert ended.value.code in (0, None), command
        known |= paths_in(yaml.safe_load(out.getvalue()), "")
    for name, text in SETTINGS.items():
        for path in re.findall(r"--([a-z_]+(?:\.[a-z_0-9]+)*)\+?", text):
            assert path in known | {"config", "checkpoint", "out"}, (name, path)


def paths_in(value: object, path: str) -> set[str]:
    """Paths of all settings of a printed config, without the levels of classes."""
    if isinstance(value, list):
        return set().union(*(paths_in(entry, path) for entry in value), {path})
    found = {path}
    if isinstance(value, dict):
        for name, inner in value.items():
            level = path if name in ("init_args", "class_path") else f"{path}.{name}".lstrip(".")
            found |= paths_in(inner, level)
    return found


def test_a_whole_command_line_of_trl_is_translated_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    args = [
        "--model_name_or_path",
        "x",
        "--dataset_name=rows",
        "--learning_rate",
        "1e-6",
        "--bf16",
        "--vllm_mode=a",
        "--zz=1",
    ]
    lines = refused(capsys, "fit", "--config=dpo_offline", *args)
    assert lines[0].startswith("error: no setting --model_name_or_path; here it is --model.policy")
    assert lines[1:] == [
        "  no setting --dataset_name; here it is --data.prompts.path",
        "  no setting --learning_rate; here it is --model.optimizer.lr",
        "  no setting --bf16; here it is --trainer.precision=bf16-mixed",
        "  no setting --vllm_mode: the only setting of vLLM is --model.options.use_vllm",
        "  no setting --zz",
    ]


@pytest.mark.parametrize(
    ("args", "cause"),
    [
        ([*OFFLINE, "--beta=0.2"], "no setting --beta; here it is --model.beta"),
        ([*OFFLINE, "--model.lr=1e-6"], "--model: DPOModule takes no 'lr'; here it is --model.optimizer.lr"),
        (
            [*OFFLINE, "--model.learning_rte=1"],
            "--model: DPOModule takes no 'learning_rte'; here it is --model.optimizer.lr",
        ),
        ([*OFFLINE, "--model.lora.rank=8"], "--model.lora: LoRA takes no 'rank'; here it is --model.lora.r"),
        (
            [*OFFLINE, "--data.batch_size=4"],
            "--data: PreferenceDataModule takes no 'batch_size'; here it is --data.pairs_per",
        ),
        (
            [*OFFLINE, "--model.lora=true"],
            "--model.lora: got true, but LoRA is a group of settings, such as --model.lora.r",
        ),
        ([*OFFLINE, "--model.loss=sigmoid"], "--model.loss: no class 'sigmoid'; did you mean DPOLoss?"),
        ([*OFFLINE, "--model.optimizer=adamw"], "--model.optimizer: no class 'adamw'; did you mean AdamW?"),
        ([*OFFLINE, "--model.optimizer.lr=high"], "--model.optimizer.lr: must be of type float or Tensor; got high"),
        (
            [*OFFLINE, "--model.lr_scheduler=cosine"],
            "--model.lr_scheduler: no class 'cosine'; did you mean CosineWithWarmup?",
        ),
        ([*OFFLINE, "--trainer.logger=wandb"], "--trainer.logger: no class 'wandb'; did you mean WandbLogger?"),
        ([*OFFLINE, "--trainer.max_epochs=1.5"], "--trainer.max_epochs: must be of type int or null; got 1.5"),
        (
            [*OFFLINE, "--data.reward=nofile.Mine"],
            "--data.reward: no class 'nofile.Mine': no module 'nofile' in the working",
        ),
        ([*OFFLINE, "--data.reward=json.Mine"], "--data.reward: no class 'Mine' in module 'json'"),
        (["fit", "--config=dpo_offline", "--model=x"], "--model: no class 'x'; a checkpoint is --model.policy=x"),
        (["fit", "dpo_offline"], "no setting dpo_offline; did you mean --config dpo_offline?"),
        (["fit"], "no class is chosen; begin with a config, as in --config dpo_offline"),
        (["fit", "--model.policy=x"], "--model: no class is chosen; begin with a config, as in --config dpo_offline"),
        (["dpo", "--beta=1"], "no command 'dpo'; here it is lightning-rlhf fit --config dpo_offline"),
        (["evaluate", "--model=x"], "no setting --model; did you mean --a, the policy that is evaluated?"),
    ],
    ids=str,
)
def test_guesses_of_users_of_other_libraries(capsys: pytest.CaptureFixture[str], args: list[str], cause: str) -> None:
    assert refused(capsys, *args)[0].startswith(f"error: {cause}")


def test_a_file_in_place_of_a_class(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n', encoding="utf-8")
    reads = "is no class: --data.prompts=DatasetPrompts --data.prompts.path="
    # there, and misspelt
    assert refused(capsys, *OFFLINE, "--data.prompts=rows.jsonl") == [
        f"error: --data.prompts: 'rows.jsonl' {reads}rows.jsonl reads it"
    ]
    assert refused(capsys, *OFFLINE, "--data.prompts=row.jsonl") == [
        f"error: --data.prompts: 'row.jsonl' {reads}row.jsonl reads it"
    ]
    assert refused(capsys, *OFFLINE, "--data=rows.jsonl") == [
        "error: --data: 'rows.jsonl' is no class: rows are --data.prompts.path=rows.jsonl"
    ]
    asked = refused(capsys, "evaluate", "--prompts=rows.jsonl", "--a=x")
    assert asked == [
        "error: --prompts: 'rows.jsonl' is no class: --prompts=DatasetPrompts --prompts.path=rows.jsonl reads it"
    ]


def test_a_config_of_another_library(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "trl.yaml").write_text("model_name_or_path: gpt2\nlearning_rate: 1.0e-6\n", encoding="utf-8")
    (cause,) = refused(capsys, "fit", f"--config={tmp_path}/trl.yaml")
    assert cause.startswith("error: no setting model_name_or_path in a config; here it is --model.policy")


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["--config=dpo_offline", "--data.heldout.path=t"], "DatasetPrompts"),
        (["--config=dpo_offline", "--data.prompts=HHPrompts", "--data.heldout.path=t"], "HHPrompts"),
        (["--config=sft", "--data.heldout.path=t"], "DatasetCompletions"),
        (["--config=dpo_offline", "--data.heldout=HHPrompts", "--data.heldout.path=t"], "HHPrompts"),
        (
            ["--config=rlhf", "--data.prompts=DatasetPrompts", "--data.heldout.limit=4", "--data.reward=LexiconReward"],
            "BuiltinPrompts",
        ),
    ],
    ids=str,
)
def test_held_out_rows_have_the_class_of_the_training_rows(
    capsys: pytest.CaptureFixture[str], args: list[str], wanted: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fit", *args, "--model.policy=x", "--data.prompts.path=x", "--print_config"])
    assert ended.value.code in (0, None)
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["data"]["init_args"]["heldout"]["class_path"] == f"lightning_rlhf.prompts.{wanted}"


def test_classes_and_commands_of_other_libraries_lead_to_ours() -> None:
    assert COMMANDS.keys().isdisjoint({"fit", "validate", "sample", "evaluate"})
    assert {name for name in CLASSES.values() if name.endswith("Loss") and not hasattr(losses, name)} == set()
