"""Every argument with a new name still works by its old one: on the command line, in YAML and in Python."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import reduce
from typing import Any

import pytest
import torch
import yaml

from lightning_rlhf import DPOModule, PolicyGradientModule, RewardModule, SFTModule
from lightning_rlhf.commands.fit import RLHFCLI
from lightning_rlhf.renamed import CLASS_PATHS, RENAMED, renamed_arguments, renamed_config
from lightning_rlhf.runtime.fingerprint import comparable, differences, without_new_defaults


VALUES: dict[str, Any] = {
    **{"learning_rate": 2e-3, "weight_decay": 0.25, "warmup_steps": 3, "dtype": "bfloat16", "layout": "padded"},
    **{"attn_implementation": "eager", "gradient_checkpointing": True, "chat_template": "human_assistant"},
    **{"tokens_per_batch": 77, "use_vllm": False, "trust_remote_code": True, "disable_dropout": False},
    **{"ema_decay": 0.5, "objective": "penalty", "kl_placement": "loss_k3", "kl_target": 4.0, "kl_gain": 0.2},
    **{"clip": 0.3, "aggregation": "token_mean", "whiten_advantages": True, "value_model": "gpt2"},
    **{"value_learning_rate": 1e-4, "value_coefficient": 0.5, "value_clip": 0.2, "margin": 0.5},
    **{"center_coefficient": 0.1, "prompts_per_round": 5, "epochs_per_round": 2, "replay": "all", "label_attempts": 3},
    **{"ledger": "l.sqlite", "length_window": 4, "max_prompt_tokens": 99, "on_long_prompt": "drop"},
    **{"system_prompt": "Be brief.", "normalize_rewards": "std", "missing_eos_penalty": 1.0},
}
ENTRIES = [(section, old, new) for section, names in RENAMED.items() for old, new in names.items()]
COMMON = ["learning_rate", "weight_decay", "warmup_steps", "dtype", "tokens_per_batch", "disable_dropout"]
CLASSES: dict[Callable[..., Any], list[str]] = {
    DPOModule: [*COMMON, "ema_decay", "layout"],
    PolicyGradientModule: [*COMMON, *(n for n in RENAMED["model"] if RENAMED["model"][n][:3] in ("kl.", "val", "los"))],
    RewardModule: [*COMMON, "margin", "center_coefficient"],
    SFTModule: [*COMMON, "chat_template"],
}


def text(value: Any) -> str:
    """A value as it is written on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)


@pytest.mark.parametrize(("section", "old", "new"), ENTRIES)
def test_each_name_is_translated(section: str, old: str, new: str) -> None:
    value, notes = VALUES[old], []
    for prefix in (f"--{section}.", f"--{section}.init_args."):
        assert renamed_arguments([f"{prefix}{old}={text(value)}"], notes.append) == [f"--{section}.{new}={text(value)}"]
    assert notes[0] == f"--{section}.{old} is --{section}.{new} since version 0.2"
    group, leaf = new.split(".")
    for found in (
        renamed_config({section: {"class_path": "X", "init_args": {old: value}}})[section]["init_args"],
        renamed_config({section: {old: value}})[section],  # an overlay
    ):
        held = found[group]
        assert (held["init_args"] if group in CLASS_PATHS else held) == {leaf: value}


@pytest.mark.parametrize("config", ["dpo_online", "rlhf", "reward_model", "sft"])
def test_a_command_with_old_names_is_that_with_new_ones(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All old names that the classes of a config know, parsed for real."""
    skipped = {"sft": {"ema_decay"}, "reward_model": {"ema_decay"}}.get(config, set())
    kinds = {"dpo_online": DPOModule, "rlhf": PolicyGradientModule, "reward_model": RewardModule, "sft": SFTModule}
    data = ["length_window", "max_prompt_tokens"] + ([] if config == "sft" else ["prompts_per_round", "ledger"])
    old = [("model", name) for name in CLASSES[kinds[config]] if name not in skipped]
    # the parser refuses these together
    old = [entry for entry in old if not (config in ("rlhf",) and entry[1] in ("margin", "center_coefficient"))]
    old = [entry for entry in old if not (config == "reward_model" and entry[1] not in [*COMMON, "margin"])]
    old += [("data", name) for name in data]
    printed = []
    for new_names in (False, True):
        arguments = [
            f"--{section}.{RENAMED[section][name] if new_names else name}={text(VALUES[name])}" for section, name in old
        ]
        needed = ["--model.backbone=x" if config == "reward_model" else "--model.policy=x"]
        needed += ["--data.prompts.path=x"] if config in ("reward_model", "sft") else []
        needed += ["--data.reward.path=x"] if config == "rlhf" else []
        command = ["fit", f"--config={config}", *needed, *arguments, "--print_config"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(SystemExit):
                RLHFCLI(command)
        printed.append(yaml.safe_load(capsys.readouterr().out))
    assert printed[0] == printed[1]
    for section, name in old:
        group, leaf = RENAMED[section][name].split(".")
        held = printed[1][section]["init_args"][group]
        assert (held["init_args"] if group in CLASS_PATHS else held)[leaf] == VALUES[name]


@pytest.mark.parametrize("kind", list(CLASSES))
def test_python_takes_old_names_with_a_warning(kind: Callable[..., Any]) -> None:
    names = [name for name in CLASSES[kind] if name not in ("margin", "center_coefficient") or kind is RewardModule]
    names = [name for name in names if kind is not RewardModule or not RENAMED["model"][name].startswith("loss.clip")]
    for name in names:
        # a target is refused for the convex objective
        needed = {"objective": "penalty"} if name == "kl_target" else {}
        with pytest.warns(DeprecationWarning, match=f"{name}=.*since version 0.2"):
            module = kind("nowhere", **{name: VALUES[name]}, **needed)
        group, leaf = RENAMED["model"][name].split(".")
        if group == "optimizer":
            made = module.optimizer([torch.nn.Parameter(torch.zeros(1))])
            assert made.defaults[leaf] == VALUES[name]
            # the other settings keep the defaults of 0.1
            assert made.defaults["weight_decay"] == (VALUES[name] if leaf == "weight_decay" else 0.0)
        elif group == "lr_scheduler":
            made = module.lr_scheduler(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0))
            assert getattr(made, leaf) == VALUES[name]
        else:
            held = {"reference": "reference_update"}.get(group, group)
            assert is_dataclass(getattr(module, held))
            assert reduce(getattr, (held, leaf), module) == VALUES[name]


def test_classes_of_version_0_1_are_found_where_they_are_now() -> None:
    assert renamed_arguments(["--model.loss=SigmoidLoss", "--data=lightning_rlhf.datamodule.PreferenceDataModule"]) == [
        "--model.loss=DPOLoss",
        "--data=lightning_rlhf.datamodules.PreferenceDataModule",
    ]
    old = {"experiment": {"class_path": "lightning_rlhf.comparison.FitExperiment"}}
    assert renamed_config(old) == {"experiment": {"class_path": "lightning_rlhf.experiments.FitExperiment"}}


def test_settings_that_version_0_1_stored_compare_equal() -> None:
    """Flat names, the class path of then, and none of the settings that are new."""
    flat = {"policy": "x", "beta": 0.1, "learning_rate": 5e-7, "weight_decay": 0.0, "warmup_steps": 10}
    then = {"model": {"class_path": "lightning_rlhf.modules.dpo.DPOModule", "init_args": flat}}
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 5e-7, "weight_decay": 0.0, "eps": 1e-8}}
    schedule = {"class_path": "lightning_rlhf.modules.ConstantWithWarmup", "init_args": {"warmup_steps": 10}}
    now = {"policy": "x", "beta": 0.1, "optimizer": optimizer, "lr_scheduler": schedule, "start": None}
    new = {"model": {"class_path": "lightning_rlhf.DPOModule", "init_args": now}}
    kept, added = without_new_defaults(comparable(then), comparable(new))
    assert differences(comparable(then), kept, "stored") == []
    assert added == ["model.optimizer.eps", "model.start"]
    optimizer["init_args"]["lr"] = 1e-6
    kept, _ = without_new_defaults(comparable(then), comparable(new))
    assert differences(comparable(then), kept, "stored") == [
        "  model.init_args.optimizer.init_args.lr: 5e-07 stored, 1e-06 now"
    ]


def test_settings_of_a_group_that_was_off_do_not_switch_it_on() -> None:
    notes: list[str] = []

    def translated(**arguments: Any) -> Any:
        labeler = {"class_path": "LLMLabeler", "init_args": {"model": "judge", **arguments}}
        data = {"class_path": "PreferenceDataModule", "init_args": {"labeler": labeler}}
        return renamed_config({"data": data}, notes.append)["data"]["init_args"]["labeler"]["init_args"]

    assert translated(samples=8) == {"model": "judge"}
    assert any("LLMLabeler.samples has no effect without LLMLabeler.chain_of_thought" in note for note in notes)
    assert translated(samples=8, chain_of_thought=False)["chain_of_thought"] is None
    for arguments in ({"samples": 8, "chain_of_thought": True}, {"chain_of_thought": True, "samples": 8}):
        assert translated(**arguments)["chain_of_thought"] == {"samples": 8}
    assert translated(samples=8, chain_of_thought={})["chain_of_thought"] == {"samples": 8}
