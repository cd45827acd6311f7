"""A run never reads the rounds of another one: settings, rows, files; from Python and from the command line."""

from __future__ import annotations

import json
import shutil
import sqlite3
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.optim import AdamW

from lightning_rlhf import DPOModule, PolicyGradientModule, PreferenceDataModule, RolloutDataModule
from lightning_rlhf.callbacks import HFExport
from lightning_rlhf.cli import main
from lightning_rlhf.commands.label import LabelRun
from lightning_rlhf.datamodules.completions import CompletionDataModule
from lightning_rlhf.datamodules.options import PreferenceRoundOptions, RoundOptions
from lightning_rlhf.generation.base import Decoding
from lightning_rlhf.labelers import RewardLabeler
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.modules import SFTModule
from lightning_rlhf.prompts import BuiltinPrompts, DatasetCompletions, DatasetPrompts
from lightning_rlhf.rewards import AbstractReward, RewardOutput
from lightning_rlhf.runtime.fingerprint import (
    content_digest,
    described,
    differences,
    with_contents,
    without_new_defaults,
)
from lightning_rlhf.samplers import BestOfNSampler, MixtureSampler, PILAFSampler, VanillaSampler
from lightning_rlhf.types import Prompt, Response


class Letters(AbstractReward):
    """Likes some tokens more than others, or less."""

    def __init__(self, sign: int = 1) -> None:
        self.sign = sign
        self.calls = 0

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        del prompts
        self.calls += 1
        return RewardOutput(torch.tensor([float(self.sign * sum(token % 7 for token in r.ids)) for r in responses]))


def rows(path: Path, count: int, name: str = "river", **extra: str) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"Name {name} {i}.", **extra}) + "\n" for i in range(count)))
    return path


def pairs(source: Any, **options: Any) -> PreferenceDataModule:
    settings = {"pairs_per_batch": 2, "decoding": Decoding(max_new_tokens=3), **options}
    settings["rounds"] = PreferenceRoundOptions(prompts_per_round=2, ledger=settings.pop("ledger", None))
    sampler, reward = settings.pop("sampler", VanillaSampler()), settings.pop("reward", Letters())
    return PreferenceDataModule(source, sampler, RewardLabeler(reward), **settings)


def rollouts(source: Any, **options: Any) -> RolloutDataModule:
    settings = {"rounds": RoundOptions(2), "prompts_per_batch": 2, "responses_per_prompt": 2, **options}
    reward, sampler = settings.pop("reward", Letters()), settings.pop("sampler", None)
    assert sampler is None
    return RolloutDataModule(source, reward, decoding=Decoding(max_new_tokens=3), **settings)


def fit(folder: Path, module: L.LightningModule, data: L.LightningDataModule, epochs: int = 1, **options: Any) -> None:
    L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, **options},
    ).fit(module, datamodule=data, ckpt_path=None)


def other_policy(tiny_policy: Path, folder: Path) -> Path:
    """The same tokenizer, other weights."""
    shutil.copytree(tiny_policy, folder)
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    save_file({n: w + 0.1 for n, w in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["pairs", "rollouts"])
def test_a_second_run_from_python_in_the_same_folder_is_refused(tmp_path: Path, tiny_policy: Path, kind: str) -> None:
    data: Callable[..., Any] = pairs if kind == "pairs" else rollouts

    def module(policy: Path = tiny_policy, **options: Any) -> L.LightningModule:
        return (DPOModule if kind == "pairs" else PolicyGradientModule)(str(policy), **options)

    source = rows(tmp_path / "rows.jsonl", 4)
    fit(tmp_path, module(), data(DatasetPrompts(str(source))))

    def held() -> list[str]:
        with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
            return [line for line in db.iterdump() if '"writer"' not in line and "'writer'" not in line]

    before = held()
    shutil.copytree(tiny_policy, tmp_path / "moved")
    shutil.copy(source, tmp_path / "copy.jsonl")

    other = other_policy(tiny_policy, tmp_path / "other")
    same = DatasetPrompts(str(source))
    shorter = DatasetPrompts(str(source), limit=3)
    cases: list[tuple[str, L.LightningModule, Any]] = [
        (r"rows\.jsonl: other rows; 4 in the ledger, 3 now", module(), data(shorter)),
        (r"training rows of BuiltinPrompts: other rows", module(), data(BuiltinPrompts())),
        (r"reward.*init_args\.sign: 1 in the ledger, -1 now", module(), data(same, reward=Letters(-1))),
        (r"data\.init_args\.decoding\.max_new_tokens|data\.init_args\.seed: 0", module(), data(same, seed=1)),
        (r"model\.init_args\.policy: .* now", module(other), data(same)),
        (
            r"model\.init_args\.optimizer\.init_args\.lr: 1e-06 in the ledger, 0\.001 now",
            module(optimizer=partial(AdamW, lr=1e-3, weight_decay=0.0)),
            data(same),
        ),
    ]
    if kind == "pairs":
        cases += [(r"data\.init_args\.sampler\.class_path", module(), data(same, sampler=BestOfNSampler(2)))]
    for message, model, loaded in cases:
        with pytest.raises(ValueError, match=message):
            fit(tmp_path, model, loaded)
    rows(source, 4, name="city")
    with pytest.raises(ValueError, match=r"rows\.jsonl: other rows; 4 in the ledger, 4 now, 4 changed.*city 0"):
        fit(tmp_path, module(), data(same))
    assert held() == before
    # the same rows and the same policy lie elsewhere, and the run is longer: it goes on, and reads its first round
    reward = Letters()
    loaded = data(DatasetPrompts(str(tmp_path / "copy.jsonl")), reward=reward)
    fit(tmp_path, module(tmp_path / "moved"), loaded, epochs=2)
    assert reward.calls == 1


def test_a_ledger_of_an_earlier_version_goes_on_and_is_compared_by_its_prompts(
    tmp_path: Path, tiny_policy: Path
) -> None:
    source = rows(tmp_path / "rows.jsonl", 4)
    fit(tmp_path, DPOModule(str(tiny_policy)), pairs(DatasetPrompts(str(source))))
    db = sqlite3.connect(tmp_path / "ledger.sqlite")
    db.execute("DELETE FROM run WHERE key IN ('training_rows', 'heldout_rows')")
    db.execute("UPDATE run SET value = '{\"seed\": 0}' WHERE key = 'fingerprint'")
    db.execute("DROP TABLE ties")
    db.execute("PRAGMA user_version = 2")
    db.commit()
    db.close()
    with PreferenceStore(tmp_path / "ledger.sqlite", read_only=True) as store:
        assert (store.num_labels, store.count_ties()) == (2, 0)
    rows(source, 4, name="city")
    with pytest.raises(ValueError, match=r"rows\.jsonl: other rows; prompt \d is 'Name river"):
        fit(tmp_path, DPOModule(str(tiny_policy)), pairs(DatasetPrompts(str(source))))
    rows(source, 4)
    reward = Letters()
    fit(tmp_path, DPOModule(str(tiny_policy)), pairs(DatasetPrompts(str(source)), reward=reward))
    assert reward.calls == 0
    with pytest.raises(ValueError, match=r"sign: 1 in the ledger, -1 now"):
        fit(tmp_path, DPOModule(str(tiny_policy)), pairs(DatasetPrompts(str(source)), reward=Letters(-1)))


def test_other_code_of_a_users_class_is_a_warning(tmp_path: Path, tiny_policy: Path) -> None:
    def reward(sign: int) -> AbstractReward:
        class Closed(Letters):
            def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
                return RewardOutput(sign * super().score(prompts, responses).mean)

        return Closed()

    source = BuiltinPrompts("train", limit=4)
    fit(tmp_path, DPOModule(str(tiny_policy)), pairs(source, reward=reward(1)))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the code of")
        fit(tmp_path, DPOModule(str(tiny_policy)), pairs(source, reward=reward(1)))
    with pytest.warns(UserWarning, match=r"the code of .*Closed has changed since the run in .* began"):
        fit(tmp_path, DPOModule(str(tiny_policy)), pairs(source, reward=reward(-1)))


def test_a_trained_module_on_its_first_round_again_is_a_warning(tmp_path: Path, tiny_policy: Path) -> None:
    module, source = DPOModule(str(tiny_policy)), BuiltinPrompts("train", limit=4)
    fit(tmp_path, module, pairs(source))
    with pytest.warns(UserWarning, match="has been trained before, and this fit begins at round 0"):
        fit(tmp_path, module, pairs(source))


def test_one_datamodule_serves_two_runs(tmp_path: Path, tiny_policy: Path) -> None:
    data = pairs(BuiltinPrompts("train", limit=4))
    other = other_policy(tiny_policy, tmp_path / "other")
    drawn = []
    for folder, policy in (("a", tiny_policy), ("b", other), ("c", tiny_policy)):
        fit(tmp_path / folder, DPOModule(str(policy)), data)
        assert data.round is not None
        drawn.append([c.a.ids for c in data.round.comparisons])
    assert drawn[0] == drawn[2] != drawn[1]


@pytest.mark.parametrize("options", [{"epochs": 0}, {"max_steps": 0}, {"limit_train_batches": 0}])
def test_a_run_of_no_steps_buys_nothing(tmp_path: Path, tiny_policy: Path, options: dict[str, int]) -> None:
    for kind in (pairs, rollouts):
        module = (DPOModule if kind is pairs else PolicyGradientModule)(str(tiny_policy))
        reward = Letters()
        fit(tmp_path / kind.__name__, module, kind(BuiltinPrompts("train", limit=4), reward=reward), **options)
        assert reward.calls == 0
        with PreferenceStore(tmp_path / kind.__name__ / "ledger.sqlite", read_only=True) as store:
            assert not store.has_samples()


def test_a_trial_leaves_nothing_behind(tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows(tmp_path / "rows.jsonl", 4, chosen=" Elbe", rejected=" Rhine")
    command = ["fit", "--config", "dpo_offline", f"--model.policy={tiny_policy}", "--data.prompts.path=rows.jsonl"]
    command += ["--trainer.accelerator=cpu", "--data.decoding.max_new_tokens=8", "--data.pairs_per_batch=2"]
    command += ["--run_dir=run", "--trainer.enable_progress_bar=false"]
    main([*command, "--trainer.fast_dev_run=true"])
    callback = HFExport(str(tmp_path / "run" / "exported"))
    data = pairs(BuiltinPrompts("train", limit=4), ledger="run/ledger.sqlite")
    fit(tmp_path / "run", DPOModule(str(tiny_policy)), data, fast_dev_run=1, callbacks=[callback])
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == []
    # in a folder with a run it disturbs nothing
    main([*command, "--trainer.max_epochs=1"])
    left = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    main([*command, "--trainer.fast_dev_run=2", "--model.beta=0.7"])
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == left


def test_an_edited_file_is_named_and_the_same_file_may_lie_elsewhere(
    tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    policy = shutil.copytree(tiny_policy, tmp_path / "policy")

    def run(path: str, epochs: int, *options: str, policy: str = "policy") -> None:
        command = ["fit", "--config", "dpo_offline", f"--model.policy={policy}", f"--data.prompts.path={path}"]
        command += ["--trainer.accelerator=cpu", "--data.decoding.max_new_tokens=8", "--data.pairs_per_batch=2"]
        command += ["--run_dir=run", "--trainer.enable_progress_bar=false", f"--trainer.max_epochs={epochs}"]
        main([*command, *options])

    def summary() -> Any:
        return json.loads((tmp_path / "run" / "summary.json").read_text())["steps"]

    held = ["--data.heldout=DatasetPrompts", "--data.heldout.path=held.jsonl", "--data.heldout.kind=prompt"]
    rows(tmp_path / "held.jsonl", 2)
    rows(tmp_path / "rows.jsonl", 4, chosen=" Elbe", rejected=" Rhine")
    run("rows.jsonl", 1, *held)
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "rows.jsonl", tmp_path / "elsewhere" / "data.jsonl")
    rows(tmp_path / "rows.jsonl", 5, chosen=" Elbe", rejected=" Rhine")
    with pytest.raises(ValueError, match=r"rows\.jsonl: other rows; 4 in the ledger, 5 now, new from prompt 5"):
        run("rows.jsonl", 2, *held)
    rows(tmp_path / "rows.jsonl", 4, chosen=" Elbe", rejected=" Ruhr")
    with pytest.raises(ValueError, match=r"rows\.jsonl: other rows; 4 in the ledger, 4 now, 4 changed in place"):
        run("rows.jsonl", 2, *held)
    rows(tmp_path / "held.jsonl", 3)
    short_name = "--data.class_path=PreferenceDataModule"
    shutil.move(policy, tmp_path / "moved")
    with pytest.warns(UserWarning, match=r"held\.jsonl: other rows; 2 before, 3 now"):
        run("elsewhere/data.jsonl", 2, *held, short_name, policy="moved")
    assert summary() == 4
    template = tmp_path / "moved" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    with pytest.raises(ValueError, match=r"model\.init_args\.policy: the content of moved has changed"):
        run("elsewhere/data.jsonl", 3, *held, policy="moved")


def test_supervised_checkpoints_know_their_rows(tmp_path: Path, tiny_policy: Path) -> None:
    source = rows(tmp_path / "rows.jsonl", 4, completion=" Elbe")

    def run(epochs: int, checkpoint: Path | None = None) -> None:
        data = CompletionDataModule(DatasetCompletions(str(source)), rows_per_batch=2, max_completion_tokens=8)
        run = L.Trainer(default_root_dir=tmp_path, accelerator="cpu", max_epochs=epochs, logger=False)
        run.fit(SFTModule(str(tiny_policy)), datamodule=data, ckpt_path=checkpoint)

    run(1)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    rows(source, 4, completion=" Rhine")
    with pytest.raises(ValueError, match=r"rows\.jsonl: other rows; 4 in the checkpoint, 4 now, 4 changed"):
        run(2, checkpoint)
    rows(source, 4, completion=" Elbe")
    run(2, checkpoint)


def test_validating_on_nothing_is_an_error(tiny_policy: Path, tmp_path: Path) -> None:
    run = L.Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False)
    with pytest.raises(ValueError, match=r"nothing to validate on: set data\.heldout"):
        run.validate(DPOModule(str(tiny_policy)), datamodule=pairs(BuiltinPrompts()), verbose=False)


def test_labels_of_another_labeler_are_refused_from_python(tmp_path: Path) -> None:
    source = rows(tmp_path / "rows.jsonl", 2, chosen=" Elbe", rejected=" Rhine")

    def run(sign: int, path: Path = source) -> int:
        labeler = RewardLabeler(Letters(sign))
        return int(LabelRun(DatasetPrompts(str(path)), labeler, run_dir=str(tmp_path / "run")).run()["bought_now"])

    assert run(1) == 2
    with pytest.raises(ValueError, match=r"labeler\.init_args\.reward\.init_args\.sign: 1 in the ledger, -1 now"):
        run(-1)
    assert run(1, Path(shutil.copy(source, tmp_path / "copy.jsonl"))) == 0


def test_objects_are_described_by_class_and_arguments() -> None:
    reward = Letters(sign=2)
    reward.calls = 7  # what it has done since does not matter
    tree = described(MixtureSampler([VanillaSampler(), PILAFSampler(tilt=0.5)], weights=[1, 2]))
    assert tree["init_args"]["samplers"][1]["init_args"] == {"tilt": 0.5}
    assert described(reward) == {"class_path": f"{__name__}.Letters", "init_args": {"sign": 2}}
    reward.sign = -2
    assert described(reward)["init_args"] == {"sign": -2}
    models = [torch.nn.Linear(2, 2) for _ in range(2)]
    assert described(models[0]) == described(models[0]) != described(models[1])
    assert described([lambda x: x]) == described([lambda x: x])  # by what they do
    assert described(lambda x: x) != described(lambda x: -x)


def test_differences_ignore_how_a_class_was_spelt_and_where_content_lies() -> None:
    old = {
        "data": {
            "class_path": "lightning_rlhf.datamodules.preferences.PreferenceDataModule",
            "init_args": {"s": [{"a": 1}]},
        }
    }
    new = {"data": {"class_path": "PreferenceDataModule", "init_args": {"s": [{"a": 1, "init_args": {}}]}}}
    assert differences(old, new, "in the ledger") == []
    digests = ("0123456789abcdef", "fedcba9876543210")
    first, second = ({"policy": f"{name} [content {digests[0]}]"} for name in ("a", "b/c"))
    assert differences(first, second, "then") == []
    assert differences({"policy": "a"}, first, "then") == []
    assert differences({"policy": "b"}, first, "then") == ["  policy: 'b' then, 'a' now"]
    changed = {"policy": f"a [content {digests[1]}]"}
    assert differences(first, changed, "then") == ["  policy: the content of a has changed"]


def test_a_setting_that_a_newer_version_added_is_no_difference_at_its_default() -> None:
    now = {"class_path": "lightning_rlhf.samplers.PILAFSampler", "init_args": {"tilt": None}}
    assert without_new_defaults({"class_path": "PILAFSampler"}, now) == ({**now, "init_args": {}}, ["tilt"])
    now["init_args"] = {"tilt": 0.5}
    assert without_new_defaults({"class_path": "PILAFSampler"}, now) == (now, [])


def test_content_of_models_and_files(tmp_path: Path, tiny_policy: Path) -> None:
    folder = shutil.copytree(tiny_policy, tmp_path / "model")
    digest = content_digest(str(folder))
    assert digest == content_digest(str(tiny_policy)) is not None
    (folder / "README.md").write_text("hello")
    assert content_digest(str(folder)) == digest
    config = folder / "config.json"
    config.write_text(config.read_text() + " ")
    assert content_digest(str(folder)) != digest
    task = tmp_path / "task.yaml"
    task.write_text("a: 1")
    (tmp_path / "log.txt").write_text("a run may write this")
    tree = {
        "task": str(task),
        "log": str(tmp_path / "log.txt"),
        "prompts": {"path": str(task)},
        "folder": str(tmp_path),
    }
    found = with_contents(tree)
    assert found == {**tree, "task": f"{task} [content {content_digest(str(task))}]"}
    large = tmp_path / "large.safetensors"
    with large.open("wb") as file:
        file.truncate(70 << 20)
    first = content_digest(str(large))
    with large.open("r+b") as file:
        file.seek((70 << 20) - 3)
        file.write(b"x")
    assert content_digest(str(large)) != first
