"""One command line: its overview, help at every level, errors of a few lines with the nearest name, seeds, faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightning_rlhf.cli import main
from lightning_rlhf.commands.overview import COMMANDS


QUICK = ["fit", "--config=quickstart"]


def failed(capsys: pytest.CaptureFixture[str], *args: str) -> list[str]:
    """Lines of the error of a command line that is refused."""
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    assert stop.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    return told.err.splitlines()


def helped(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Text of a command line that asks for help."""
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_every_command_is_in_the_overview(capsys: pytest.CaptureFixture[str]) -> None:
    shown = helped(capsys, "--help")
    assert all(f"\n  {name} " in shown for name in COMMANDS)
    assert "exit statuses" in shown
    assert helped(capsys, "--version").startswith("lightning-rlhf 0.")


@pytest.mark.parametrize(
    ("args", "cause"),
    [
        (["fti"], "no command 'fti'; did you mean fit?"),
        ([], "no command given"),
        (["fit", "--config=quickstar"], "no config 'quickstar', neither a file nor a name; did you mean quickstart?"),
        ([*QUICK, "--model.betta=1"], "--model: DPOModule takes no 'betta'; did you mean beta?"),
        (
            [*QUICK, "--data.samplr=PILAFSampler"],
            "--data: PreferenceDataModule takes no 'samplr'; did you mean sampler?",
        ),
        ([*QUICK, "--model.loss=ipoloss"], "--model.loss: no class 'ipoloss'; did you mean IPOLoss?"),
        (
            [*QUICK, "--data=PreferenceDataModul"],
            "--data: no class 'PreferenceDataModul'; did you mean PreferenceDataM",
        ),
        ([*QUICK, "--model.optimizer.lrr=1"], "--model.optimizer: AdamW takes no 'lrr'; did you mean lr?"),
        ([*QUICK, "--model.lora.r=a"], "--model.lora.r: must be of type int; got a"),
        ([*QUICK, "--model.los.help"], "DPOModule takes no 'los'; did you mean loss?"),
        ([*QUICK, "--model.loss.help=IPOLos"], "no class 'IPOLos' for --model.loss"),
        (["fit", "--config=dpo_offline", "--model.policy=x"], "DatasetPrompts needs path: set --data.prompts.path"),
        (
            ["fit", "--data=PreferenceDataModule", "--model=DPOModule", "--model.policy=x"],
            "PreferenceDataModule needs pro",
        ),
        (["evaluate", "--promptz=x"], "no setting --promptz; did you mean --prompts?"),
        (["export", "--outt=x"], "no setting --outt; did you mean --out?"),
    ],
    ids=str,
)
def test_the_cause_comes_first_and_usage_after_it(
    capsys: pytest.CaptureFixture[str], args: list[str], cause: str
) -> None:
    lines = failed(capsys, *args)
    assert lines[0].startswith(f"error: {cause}")
    assert lines[1].startswith("usage: lightning-rlhf")
    assert "--help" in lines[2]
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        (
            [*QUICK, "--model.help"],
            ["classes: ", ", DPOModule, ", "--model.beta\n      float, default 0.1: strength"],
        ),
        (["fit", "--model.help"], ["RewardModule", "--model.help=BCOModule explains one of them"]),
        (["fit", "--model.help=SFTModule"], ["modules.sft.SFTModule", "--model.aggregation"]),
        ([*QUICK, "--data.sampler.help=BestOfNSampler"], ["BestOfNSampler", "--data.sampler.n\n"]),
        ([*QUICK, "--model.lora.help"], ["LoRA | null, default null", "--model.lora.r\n      int, default 16"]),
        ([*QUICK, "--help=model.lora"], ["--model.lora.r\n      int, default 16"]),
        ([*QUICK, "--data.rounds.help"], ["--data.rounds.heldout_generate", "bool | null"]),
        ([*QUICK, "--model.init_args.beta.help"], ["--model.beta: float, default 0.1"]),
        ([*QUICK, "--model.optimizer.help"], ["AdamW", "SGD", "--model.optimizer.lr\n"]),
        ([*QUICK, "--trainer.max_epochs.help"], ["--trainer.max_epochs: "]),
        (["label", "--labeler.help"], ["classes: ", "LLMLabeler"]),
    ],
    ids=str,
)
def test_help_at_every_level(capsys: pytest.CaptureFixture[str], args: list[str], texts: list[str]) -> None:
    shown = helped(capsys, *args)
    for text in texts:
        assert text in shown
    # bases are no choices
    assert "FittedModule" not in shown


@pytest.mark.parametrize(
    ("options", "seeds"),
    [
        (["--seed_everything=7"], (7, 7)),
        (["--seed_everything=7", "--data.seed=3"], (7, 3)),
        (["--data.seed=3"], (0, 3)),
        ([], (0, 0)),
    ],
)
def test_seed_everything_seeds_everything(tmp_path: Path, options: list[str], seeds: tuple[int, int]) -> None:
    """A run is made up to its objects, whose configuration is saved before anything is loaded."""
    from lightning_rlhf.commands.fit import RLHFCLI

    class Parsed(RLHFCLI):
        def instantiate_classes(self) -> None:
            raise InterruptedError(self.config.fit.seed_everything, self.config.fit.data.init_args.seed)

    del tmp_path
    with pytest.raises(InterruptedError) as found:
        Parsed(args=[*QUICK, *options])
    assert found.value.args == seeds


def test_an_error_of_ours_has_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightning_rlhf", "export", "--out=x"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert done.stderr.startswith("error: name what to export: either --ledger=")
    assert "Traceback" not in done.stderr


def test_the_fault_of_a_judge_is_in_the_error(
    tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Say {i}. ", "chosen": f"It is {i}.", "rejected": "No."} for i in range(2)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    # nobody listens at port 9
    with pytest.raises(RuntimeError, match=r"'timeout': 2.*2 times http://127\.0\.0\.1:9/v1: no connection \(.*\)"):
        main(
            [
                *("fit", "--config=dpo_offline", "--config=labeler/server", f"--model.policy={tiny_policy}"),
                *("--data.prompts.path=rows.jsonl", "--data.labeler.server.base_url=http://127.0.0.1:9/v1"),
                *("--data.labeler.server.model=judge", "--data.labeler.server.requests.retries=0"),
                *("--data.decoding.max_new_tokens=16", "--trainer.accelerator=cpu", "--run_dir=run"),
                *("--trainer.precision=32-true", "--trainer.enable_progress_bar=false"),
            ]
        )


def test_print_config_still_prints(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*QUICK, "--print_config"])
    assert stop.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["beta"] == 0.1
