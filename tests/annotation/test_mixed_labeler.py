"""MixedLabeler with people behind a real server: exit, a kill, late labels, one budget in money, and the report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_rlhf.cli import main
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.runtime.preemption import WAITING


# the tiny judge is never sure: margins of 1e-4 tell its pairs apart
SMALL = [
    *("--config=dpo_online", "--config=labeler/mixed", "--trainer.accelerator=cpu", "--trainer.devices=1"),
    *("--trainer.max_epochs=2", "--trainer.precision=32-true", "--trainer.enable_progress_bar=false"),
    *("--trainer.strategy=auto", "--trainer.check_val_every_n_epoch=1", "--data.pairs_per_batch=2"),
    *("--data.decoding.max_new_tokens=4", "--data.rounds.prompts_per_round=6", "--data.prompts.limit=12"),
    *("--data.heldout.limit=2", "--trainer.max_steps=-1", "--data.labeler.people.pairs.overlap=0"),
    *("--data.labeler.route=share", "--data.labeler.share=0.34", "--data.labeler.audit=0.5"),
    *("--data.labeler.ai.min_mass=0", "--data.labeler.ai_weight=0.5"),
]


def outcome(run_dir: Path) -> tuple[str, list[tuple[int, float, str]], float]:
    """Hash of the trained weights, the labels, and what they cost."""
    with PreferenceStore(run_dir / "ledger.sqlite", read_only=True) as store:
        labels = [(p.round, p.probability, str(p.label.meta.get("source"))) for p in store.preferences()]
        cost = store.total_cost
    (checkpoint,) = run_dir.rglob("last.ckpt")
    weights = torch.load(checkpoint, weights_only=False)["state_dict"]
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(weights[name].numpy().tobytes())
    return digest.hexdigest(), labels, cost


@pytest.mark.slow
def test_a_run_that_exits_and_goes_on_ends_like_the_undisturbed_one(
    tiny_policy: Path,
    tiny_judge: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    start_server: Callable[..., Any],
    start_robot: Callable[..., Any],
    robot_class: type[Any],
) -> None:
    monkeypatch.chdir(tmp_path)
    start_robot(start_server(tmp_path / "plain"), "ann")
    command = ["fit", *SMALL, f"--model.policy={tiny_policy}", f"--data.labeler.ai.judge={tiny_judge}"]
    main([*command, "--run_dir=run", f"--data.labeler.people.server_dir={tmp_path / 'plain'}"])
    expected = outcome(tmp_path / "run")
    sources = {source for _, _, source in expected[1]}
    assert {"ai", "human"} <= sources
    votes = sum(source == "human" for _, _, source in expected[1])
    assert votes >= 4, "a third of six pairs are two, in each of two rounds"
    assert expected[2] == pytest.approx(votes + 0.01 * sum(source != "None" for _, _, source in expected[1]))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["cost"] == pytest.approx(expected[2])
    assert summary["sources"]["human"]["labels"] == votes == summary["people"]["votes"]
    assert summary["people"]["people"]["ann"]["votes"] == votes
    routed = summary["alignment"]["routed"]["count"] + summary["alignment"]["audited"]["count"]
    assert routed == votes
    said = capsys.readouterr().out
    assert "labels by source: ai" in said and f"cost {expected[2]:.6g}" in said

    server = start_server(tmp_path / "exits")
    statuses: list[object] = []
    options = [f"--data.labeler.people.server_dir={tmp_path / 'exits'}", "--data.labeler.people.wait=exit"]
    for _ in range(12):
        try:
            main([*command, "--run_dir=stubborn", *options])
            break
        except SystemExit as stop:
            statuses.append(stop.code)
        robot = robot_class(server, "ann")
        robot.judge()
        robot.judge()
    assert len(statuses) >= 2 and set(statuses) == {WAITING}
    assert outcome(tmp_path / "stubborn") == expected


def test_a_budget_of_money_ends_a_run_and_the_report_shows_it(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lexicon = ["RewardLabeler", "LexiconReward"]
    command = [
        *("fit", *(option for option in SMALL if "people." not in option and "labeler.ai." not in option)),
        *(f"--model.policy={tiny_policy}", "--trainer.max_epochs=9", "--data.labeler.route=margin"),
    ]
    for side, cost in (("ai", 0.25), ("people", 2.0)):
        command += [f"--data.labeler.{side}={lexicon[0]}", f"--data.labeler.{side}.reward={lexicon[1]}"]
        command += [f"--data.labeler.{side}.cost={cost}"]
    command += ["--trainer.callbacks+=LabelBudget", "--trainer.callbacks.cost=16"]
    for _ in range(2):
        main([*command, "--run_dir=run"])
        with PreferenceStore(tmp_path / "run" / "ledger.sqlite", read_only=True) as store:
            rounds = store.rounds()
            costs = [store.cost(round_ + 1) for round_ in rounds]
        assert costs[-1] >= 16 > costs[-2], "no round begins when the money is spent"
        assert costs[-1] == json.loads((tmp_path / "run" / "summary.json").read_text())["cost"]
    assert len(rounds) < 9
