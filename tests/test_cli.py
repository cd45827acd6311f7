"""The command line: shipped configs, plug-ins from a user's file, one switch per idea, and clear errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_rlhf.cli import main
from lightning_rlhf.commands.config_files import config_names, find_config
from lightning_rlhf.evaluation import read_frontier
from lightning_rlhf.generation import DecodeEngine
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.runtime.precision import bf16_instructions, choose_precision
from lightning_rlhf.types import Prompt, Response


# what makes a shipped config fit in seconds on a random model
SMALL = [
    *("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.max_steps=2", "--trainer.precision=32-true"),
    *("--trainer.enable_progress_bar=false", "--trainer.strategy=auto", "--trainer.check_val_every_n_epoch=1"),
    *("--data.pairs_per_batch=2", "--data.decoding.max_new_tokens=4"),
]
ONLINE = [*SMALL, "--data.rounds.prompts_per_round=2", "--data.prompts.limit=6", "--data.heldout.limit=3"]
RUNNABLE = ["dpo_iterative", "dpo_online", "quickstart"]


def fit(*args: str) -> None:
    main(["fit", *args])


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of a user, from which her files are found as with ``python -m``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, dict[str, object]]:
    """What ``fit --print_config`` shows."""
    with pytest.raises(SystemExit) as stop:
        fit(*args, "--print_config")
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_every_config_starts_with_its_command() -> None:
    for name in config_names():
        first = find_config(name).read_text().splitlines()[0]
        assert first.startswith("# lightning-rlhf ") or name == "base", f"{name}: {first}"


@pytest.mark.parametrize("config", RUNNABLE)
def test_shipped_configs_fit_two_steps(in_folder: Path, tiny_policy: Path, config: str) -> None:
    fit("--config", config, f"--model.policy={tiny_policy}", *ONLINE, "--run_dir=run")
    assert json.loads((in_folder / "run" / "summary.json").read_text())["labels"] >= 2
    assert (in_folder / "run" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    points = read_frontier(in_folder / "run" / "frontier.csv")
    assert (points[0].step, points[0].labels, points[-1].step) == (0, 0, 2)
    assert (in_folder / "run" / "checkpoints" / "last.ckpt").exists()
    AutoModelForCausalLM.from_pretrained(in_folder / "run" / "model")
    AutoTokenizer.from_pretrained(in_folder / "run" / "model")
    assert list((in_folder / "run").rglob("metrics.csv"))
    assert list((in_folder / "run").rglob("events.out.tfevents*"))


MODEL_SAMPLERS = ["sampler/infomax", "sampler/thompson"]
OVERLAYS = [name for name in config_names() if name.startswith("sampler/") and name not in MODEL_SAMPLERS]
OVERLAYS += ["trainer/cpu", "debug"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_shipped_overlays_fit_two_steps(in_folder: Path, tiny_policy: Path, overlay: str) -> None:
    del in_folder
    fit("--config", "dpo_online", "--config", overlay, f"--model.policy={tiny_policy}", *ONLINE, "--run_dir=run")


# a fit of the preference model after two labels
SILVER = [
    *("--data.silver.min_labels=2", "--data.silver.refit_every=2", "--data.silver.start_samples=4"),
    *("--data.silver.pairs_per_step=4", "--trainer.max_steps=5"),
]


@pytest.mark.parametrize(
    "configs",
    [
        ["dpo_online", "scarce_labels"],
        ["dpo_online", "scarce_labels", "sampler/infomax"],
        ["dpo_online", "scarce_labels", "sampler/thompson"],
        ["efficient_exploration"],
    ],
)
def test_configs_with_a_preference_model_label_silver_pairs(
    in_folder: Path, tiny_policy: Path, configs: list[str]
) -> None:
    named = [f"--config={name}" for name in configs]
    small = ["--data.sampler.n=3"] if configs[-1] != "scarce_labels" else []
    fit(*named, f"--model.policy={tiny_policy}", *ONLINE, *SILVER, *small, "--run_dir=run")
    summary = json.loads((in_folder / "run" / "summary.json").read_text())
    assert summary["steps"] == 5
    assert 2 <= summary["labels"] <= 8
    assert summary["silver_pairs"] >= 8


@pytest.mark.parametrize("overlay", MODEL_SAMPLERS)
def test_samplers_that_ask_a_model_need_one(tiny_policy: Path, overlay: str) -> None:
    with pytest.raises(ValueError, match=r"set data\.silver\.model"):
        fit("--config=dpo_online", f"--config={overlay}", f"--model.policy={tiny_policy}", *ONLINE)


@pytest.mark.parametrize("model", ["KTOModule", "BCOModule"])
def test_kto_trains_on_single_responses(in_folder: Path, tiny_policy: Path, model: str) -> None:
    rows = [{"prompt": f"Say {i}. ", "completion": f"It is {i}.", "label": i % 2 == 0} for i in range(4)]
    (in_folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = ["--data.heldout=DatasetUnpaired", "--data.heldout.path=rows.jsonl"]
    fit(
        "--config=kto",
        f"--model={model}",
        f"--model.policy={tiny_policy}",
        *SMALL,
        "--data.prompts.path=rows.jsonl",
        *held_out,
    )
    summary = json.loads((in_folder / "runs" / "kto" / "summary.json").read_text())
    assert (summary["steps"], summary["labels"]) == (2, 4)
    AutoModelForCausalLM.from_pretrained(in_folder / "runs" / "kto" / "model")


def test_a_reward_model_chooses_the_pairs_of_its_next_round(in_folder: Path, tiny_policy: Path) -> None:
    small = [*SMALL, "--data.rounds.prompts_per_round=4", "--data.prompts.limit=4", f"--model.policy={tiny_policy}"]
    fit(
        "--config=rlhf_pilaf", *small, f"--model.backbone={tiny_policy}", "--data.sampler=VanillaSampler", "--run_dir=a"
    )
    reward = in_folder / "a" / "model"
    options = [f"--model.backbone={reward}", f"--data.sampler.reward.path={reward}", "--data.sampler.n=3"]
    fit("--config=rlhf_pilaf", *small, *options, "--run_dir=b")
    with PreferenceStore(in_folder / "b" / "ledger.sqlite", read_only=True) as store:
        assert {p.comparison.branch for p in store.preferences()} == {"sir"}
        assert all("reward_gap" in p.comparison.meta for p in store.preferences())
    assert (in_folder / "b" / "model").is_dir()


def test_spin_plays_against_the_policy_of_the_last_round(in_folder: Path, tiny_policy: Path) -> None:
    rows = [{"prompt": f"Say {i}. ", "chosen": f"It is {i}.", "rejected": "No."} for i in range(6)]
    (in_folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--data.prompts.path=rows.jsonl", "--data.rounds.prompts_per_round=3", "--data.pairs_per_batch=3"]
    options += ["--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--data.decoding.max_new_tokens=16"]
    fit("--config=spin", f"--model.policy={tiny_policy}", *options, "--run_dir=run")
    summary = json.loads((in_folder / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["labels"], summary["cost"]) == (2, 6, 0.0)
    with PreferenceStore(in_folder / "run" / "ledger.sqlite", read_only=True) as store:
        pairs = list(store.preferences())
    assert [pair.label.probability for pair in pairs] == [1.0] * 6
    assert {(pair.comparison.a.source, pair.comparison.b.source) for pair in pairs} == {("dataset", "policy")}


def test_dpo_offline_fits_recorded_pairs(in_folder: Path, tiny_policy: Path) -> None:
    rows = [{"prompt": f"Say {i}. ", "chosen": f"It is {i}.", "rejected": "No."} for i in range(6)]
    (in_folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fit(
        "--config",
        "dpo_offline",
        f"--model.policy={tiny_policy}",
        "--data.prompts.path=rows.jsonl",
        *SMALL,
        "--run_dir=run",
    )
    assert json.loads((in_folder / "run" / "summary.json").read_text())["labels"] == 6


def test_a_second_offline_run_takes_the_reference_from_the_cache(
    in_folder: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_RLHF_REFERENCE_CACHE", str(in_folder / "cache"))
    rows = [{"prompt": f"Say {i}. ", "chosen": f"It is {i}.", "rejected": "No."} for i in range(6)]
    (in_folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    computed = 0
    score = DecodeEngine.with_reference_logps

    def counting(engine: DecodeEngine, prompts: list[Prompt], responses: list[Response]) -> list[Response]:
        nonlocal computed
        computed += sum(response.reference_logps is None for response in responses)
        return score(engine, prompts, responses)

    monkeypatch.setattr(DecodeEngine, "with_reference_logps", counting)
    found = []
    # the beta of the loss is no matter of the reference; nor is the precision as long as it means float32
    for run, extra in (("first", "--model.beta=0.1"), ("second", "--model.beta=0.2")):
        computed = 0
        small = [o for o in SMALL if "precision" not in o]
        policy = (f"--model.policy={tiny_policy}", "--data.prompts.path=rows.jsonl")
        fit("--config", "dpo_offline", *policy, *small, f"--run_dir={run}", extra)
        found.append(computed)
    assert found == [12, 0]


def test_precision_auto_is_shown_with_its_reason(
    in_folder: Path, tiny_policy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    device_type = "cpu"
    precision, reason = choose_precision(device_type, bf16_instructions(device_type))
    options = [o for o in ONLINE if "precision" not in o]
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fit("--config", "dpo_online", f"--model.policy={tiny_policy}", *options, "--run_dir=run")
    shown = [record.getMessage() for record in caplog.records if record.getMessage().startswith("precision:")]
    assert shown == [f"precision: {precision}, {reason}"]
    # another machine that continues the run decides for itself
    config = yaml.safe_load(next((in_folder / "run").rglob("config.yaml")).read_text())
    assert config["trainer"]["precision"] == "auto"


@pytest.mark.parametrize("overlay", ["trainer/gpu", "trainer/ddp", "trainer/fsdp"])
def test_machine_overlays_parse(capsys: pytest.CaptureFixture[str], overlay: str) -> None:
    config = printed(capsys, "--config", "dpo_online", "--config", overlay, "--model.policy=x")
    assert config["trainer"]["accelerator"] in ("gpu", "auto")


def test_one_switch_per_idea(in_folder: Path, tiny_policy: Path) -> None:
    fit(
        *("--config", "quickstart", f"--model.policy={tiny_policy}", *ONLINE, "--run_dir=run"),
        *("--data.sampler=BestOfNSampler", "--data.sampler.n=3", "--model.loss=IPOLoss"),
    )
    config = yaml.safe_load(next((in_folder / "run").rglob("config.yaml")).read_text())
    assert config["data"]["init_args"]["sampler"]["init_args"]["n"] == 3
    assert config["model"]["init_args"]["loss"]["class_path"] == "lightning_rlhf.losses.IPOLoss"


def test_a_loss_within_another_trains_on_pairs_accepted_by_a_reward(in_folder: Path, tiny_policy: Path) -> None:
    fit(
        *("--config", "dpo_online", f"--model.policy={tiny_policy}", *ONLINE, "--run_dir=run"),
        *("--data.sampler=RSOSampler", "--data.sampler.n=3", "--data.sampler.reward=LexiconReward"),
        *("--model.loss=NLLTermLoss", "--model.loss.base=SimPOLoss", "--model.loss.base.gamma=1.0"),
    )
    config = yaml.safe_load(next((in_folder / "run").rglob("config.yaml")).read_text())
    assert config["model"]["init_args"]["loss"]["init_args"]["base"]["init_args"] == {"gamma": 1.0}
    with PreferenceStore(in_folder / "run" / "ledger.sqlite", read_only=True) as store:
        assert {p.comparison.branch for p in store.preferences()} == {"rso"}


def test_interpolation_follows_the_command_line(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (in_folder / "mine.yaml").write_text(
        "data: {class_path: lightning_rlhf.PreferenceDataModule, init_args: "
        "{sampler: {class_path: PILAFSampler, init_args: {tilt: '${model.init_args.beta}'}}}}"
    )
    config = printed(
        capsys, *("--config", "dpo_online", "--config", "mine.yaml", "--model.policy=x", "--model.beta=0.3")
    )
    assert config["data"]["init_args"]["sampler"]["init_args"]["tilt"] == 0.3


def test_changing_the_sampler_leaves_no_argument_of_the_old_one(capsys: pytest.CaptureFixture[str]) -> None:
    config = printed(
        capsys,
        *(
            "--config",
            "dpo_online",
            "--config",
            "sampler/best_of_n",
            "--data.sampler=VanillaSampler",
            "--model.policy=x",
        ),
    )
    assert config["data"]["init_args"]["sampler"].get("init_args", {}) == {}


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(
    "options",
    [["--data.sampler=custom_sampler.{}"], ["--data.labeler.reward=custom_reward.{}"]],
    ids=["sampler", "reward"],
)
def test_the_examples_plug_in_by_class_path(
    in_folder: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = options[0].split("=")[1].split(".")[0]
    source = (EXAMPLES / f"{module}.py").read_text()
    name = next(line.split()[1].split("(")[0] for line in source.splitlines() if line.startswith("class "))
    fit("--config", "quickstart", f"--model.policy={tiny_policy}", *ONLINE, "--run_dir=run", options[0].format(name))
    config = yaml.safe_load(next((in_folder / "run").rglob("config.yaml")).read_text())
    assert f"{module}.{name}" in json.dumps(config)


def test_sample_draws_without_labels(in_folder: Path, tiny_policy: Path) -> None:
    options = [o for o in ONLINE if "max_steps" not in o]
    main(
        [
            "sample",
            "--config",
            "dpo_online",
            f"--model.policy={tiny_policy}",
            *options,
            "--run_dir=run",
            "--out=pairs.jsonl",
        ]
    )
    rows = [json.loads(line) for line in (in_folder / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert {"prompt", "a", "b", "branch", "source_a"} <= rows[0].keys()


def test_a_run_is_exported_as_rows_that_load_again(in_folder: Path, tiny_policy: Path) -> None:
    fit("--config", "dpo_online", f"--model.policy={tiny_policy}", *ONLINE, "--run_dir=run")
    main(["export", "--ledger=run/ledger.sqlite", "--out=rows.jsonl"])
    fit(
        "--config",
        "dpo_offline",
        f"--model.policy={tiny_policy}",
        "--data.prompts.path=rows.jsonl",
        *SMALL,
        "--run_dir=again",
    )
    assert (in_folder / "again" / "summary.json").exists()


def test_validate_reports_reward_kl_and_j(
    in_folder: Path, tiny_policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del in_folder
    options = [o for o in ONLINE if "max_steps" not in o]
    main(["validate", "--config", "dpo_online", f"--model.policy={tiny_policy}", *options, "--run_dir=run"])
    out = capsys.readouterr().out
    assert "val/reward" in out
    assert "val/objective/kl" in out
    assert "val/objective/j" in out


REWARDS = """
import torch
from lightning_rlhf.rewards import AbstractReward, RewardOutput

class NaN(AbstractReward):
    def score(self, prompts, responses):
        return RewardOutput(torch.tensor([float("nan")] * len(responses)))

class Short(AbstractReward):
    def score(self, prompts, responses):
        return RewardOutput(torch.zeros(len(responses) - 1))
"""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.betta=0.2"], "betta"),
        (["--data.sampler=NoSuchSampler"], "NoSuchSampler"),
        (["--config=no_such_config"], "no config 'no_such_config'"),
        (["--data.pairs_per_batch=0"], "data.pairs_per_batch must be at least 1"),
        (["--model.beta=-1"], "model.beta must be > 0"),
    ],
)
def test_bad_options_are_one_clear_error(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    with pytest.raises((SystemExit, ValueError)) as error:
        fit("--config", "dpo_online", "--model.policy=x", *options)
    assert message in capsys.readouterr().err + str(error.value)


@pytest.mark.parametrize(
    ("reward", "message"), [("NaN", "returned nan for prompt"), ("Short", "returned a mean of shape")]
)
def test_a_reward_that_misbehaves_is_named(in_folder: Path, tiny_policy: Path, reward: str, message: str) -> None:
    (in_folder / "bad_rewards.py").write_text(REWARDS)
    sys.modules.pop("bad_rewards", None)
    with pytest.raises(ValueError, match=message):
        fit(
            *("--config", "dpo_online", f"--model.policy={tiny_policy}", *ONLINE, "--run_dir=run"),
            f"--data.labeler.reward=bad_rewards.{reward}",
        )


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("", [], "rows.jsonl"),
        ('{"question": "x"}\n', [], "question"),
        ('{"prompt": "x", "chosen": "a", "rejected": 3}\n', [], "row 1.*rejected"),
        (
            '{"prompt": "%s", "chosen": "a", "rejected": "b"}\n' % ("x" * 300),
            ["--data.prompt_options.on_long_prompt=error"],
            "row 1.*tokens",
        ),
    ],
    ids=["empty data set", "missing column", "wrong type", "prompt longer than the window"],
)
def test_bad_rows_stop_before_a_model_is_loaded(
    in_folder: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch, content: str, options: list[str], message: str
) -> None:
    (in_folder / "rows.jsonl").write_text(content)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("lightning_rlhf.modules.policy.load_policy", fail)
    with pytest.raises(ValueError, match=message):
        fit(
            *("--config", "dpo_offline", f"--model.policy={tiny_policy}", "--data.prompts.path=rows.jsonl"),
            *(*SMALL, "--run_dir=run", *options),
        )


def test_the_last_validation_is_of_the_final_policy(in_folder: Path, tiny_policy: Path) -> None:
    options = [o for o in ONLINE if "max_steps" not in o and "check_val" not in o]
    fit(
        *("--config", "dpo_online", f"--model.policy={tiny_policy}", *options, "--run_dir=run"),
        *("--trainer.check_val_every_n_epoch=50", "--trainer.callbacks+=LabelBudget", "--trainer.callbacks.labels=5"),
    )
    points = read_frontier(in_folder / "run" / "frontier.csv")
    assert [(point.step, point.labels) for point in points] == [(0, 0), (3, 5)]


def test_a_chat_template_by_name(in_folder: Path, tiny_policy: Path) -> None:
    fit(
        *("--config", "dpo_online", f"--model.policy={tiny_policy}", *ONLINE, "--run_dir=run"),
        "--model.options.chat_template=human_assistant",
    )
    with PreferenceStore(in_folder / "run" / "ledger.sqlite", read_only=True) as store:
        assert all(p.comparison.prompt.text.endswith("Assistant:") for p in store.preferences())


def test_settings_of_speed_alone_may_change_on_a_restart(in_folder: Path, tiny_policy: Path) -> None:
    del in_folder
    command = ["--config", "dpo_online", f"--model.policy={tiny_policy}", *ONLINE, "--run_dir=run"]
    fit(*command)
    fit(*command, "--data.decoding.rows=3", "--model.options.scoring_batch_tokens=512", "--trainer.max_steps=3")


def test_another_configuration_in_the_same_folder_is_refused(in_folder: Path, tiny_policy: Path) -> None:
    del in_folder
    command = ["--config", "dpo_online", f"--model.policy={tiny_policy}", *ONLINE, "--run_dir=run"]
    fit(*command)
    with pytest.raises(ValueError, match=r"model\.init_args\.beta"):
        fit(*command, "--model.beta=0.2")
