"""Policies made in stages: shared runs are run once, curves are joined and cut, calls counted, claims judged."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from lightning_rlhf.cli import main
from lightning_rlhf.commands.config_files import find_config
from lightning_rlhf.evaluation.concordance import pair_agreement
from lightning_rlhf.experiments import Claim, Curve, CurvePoint, FitStage, StagedArm, StagedExperiment, StagedSetting
from lightning_rlhf.experiments.claims import judge_claims
from lightning_rlhf.experiments.curves import read_cell
from lightning_rlhf.experiments.plots import claims_figure
from lightning_rlhf.experiments.report import grid_of
from lightning_rlhf.experiments.stages import labels_bought, needs, stage_points
from lightning_rlhf.ledger.store import PreferenceStore


ROOT = Path(__file__).parents[2]


def experiment(stages: dict[str, FitStage], *arms: str) -> StagedExperiment:
    setting = StagedSetting({arm: StagedArm([arm]) for arm in arms})
    return StagedExperiment(stages, {"one": setting}, args=["--shared"], seeds=2, first_seed=3)


def test_jobs_are_what_arms_need_each_once_behind_what_they_name() -> None:
    made = experiment(
        {
            "policy": FitStage(
                ["worlds/menu_rl"], ["--data.reward.path={scorer}/model", "--model.start={first}/model"]
            ),
            "first": FitStage(args=["--data.reward.path={scorer}/model", "--data.reward.seed={seed}"]),
            "scorer": FitStage(["worlds/menu_reward"]),
            "unused": FitStage(),
        },
        "policy",
        "first",
    )
    jobs = list(made.jobs())
    assert [job.name for job in jobs[:3]] == ["stages/scorer/3", "stages/first/3", "stages/policy/3"]
    assert jobs[2].after == ("stages/scorer/3", "stages/first/3")
    scorer = ["--config=worlds/menu_reward", "--shared"]
    assert jobs[0].identity == {"seed": 3, "args": scorer, "behind": {"scorer": scorer}}
    # an arm waits for all that it builds on
    assert jobs[3].name == "curves/one/policy/3"
    assert jobs[3].after == ("stages/scorer/3", "stages/first/3", "stages/policy/3")
    assert len(jobs) == 2 * (3 + 2)
    assert needs(FitStage(args=["{a}/x{b}", "{seed}", "{a}"])) == ["a", "b"]


def test_results_are_others_where_a_stage_behind_them_changed() -> None:
    def identities(rate: str) -> list[dict[str, object]]:
        stages = {"scorer": FitStage(args=[rate]), "policy": FitStage(args=["{scorer}"]), "other": FitStage()}
        return [job.identity for job in experiment(stages, "policy", "other").jobs()]

    before, after = identities("--rate=1"), identities("--rate=2")
    # scorer, policy, other, and the curves of the two arms, for two seeds
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, False, True, False, True] * 2


def test_stages_that_cannot_be_run_are_refused() -> None:
    with pytest.raises(ValueError, match="a -> b -> a"):
        experiment({"a": FitStage(args=["{b}"]), "b": FitStage(args=["{a}"])}, "a")
    with pytest.raises(ValueError, match=r"'a' refers to \{c\}, which is no stage"):
        experiment({"a": FitStage(args=["{c}"])}, "a")
    with pytest.raises(ValueError, match="needs stages"):
        experiment({"a": FitStage()}, "b")
    with pytest.raises(ValueError, match="at least one seed"):
        StagedExperiment({}, {}, seeds=0)
    with pytest.raises(ValueError, match=r"cannot refer to \{a\}"):
        StagedExperiment({"a": FitStage()}, {}, args=["--data.reward.path={a}"])


def test_pair_agreement_counts_pairs_within_groups() -> None:
    truth = torch.tensor([1.0, 2.0, 3.0, 1.0, 1.0])
    scores = torch.tensor([0.0, 5.0, 5.0, 9.0, 8.0])
    # pairs of the first group: right, right, tied; the second group ties the truth, and counts for nothing
    share, pairs = pair_agreement(truth, scores, torch.tensor([0, 0, 0, 1, 1]))
    assert (share, pairs) == (pytest.approx(2.5 / 3), 3)
    assert math.isnan(pair_agreement(truth[:1], scores[:1], torch.tensor([0]))[0])


def curve(arm: str, seed: int, rewards: tuple[float, float], kl: float, agreement: tuple[float, float]) -> Curve:
    points = tuple(
        CurvePoint(i, 10 * i, r, kl * i, r - 0.1 * kl * i, agreement=a)
        for i, (r, a) in enumerate(zip(rewards, agreement, strict=True))
    )
    return Curve("one", arm, seed, points, None, math.nan, calls=10.0)


def test_claims_are_judged_by_paired_differences_of_their_metrics() -> None:
    good = [curve("good", s, (0.0, 2.0 + s + 0.01 * s), 1.0, (0.7, 0.6 - 0.001 * s)) for s in range(5)]
    bad = [curve("bad", s, (0.0, 1.0 + s), 8.0, (0.7, 0.65)) for s in range(5)]
    far = [curve("far", s, (0.0, 3.0 + s + 0.01 * s), 60.0, (0.7, 0.65)) for s in range(5)]
    blind = [replace(c, arm="blind", points=tuple(replace(p, agreement=None) for p in c.points)) for c in good]
    grid = grid_of([*good, *bad, *far, *blind])
    claims = [
        Claim("better", "one", "good", "bad", ["reward", "j"]),
        Claim("better", "one", "bad", "good"),
        # more reward, at a price
        Claim("higher", "one", "far", "good", ["reward", "j"]),
        Claim("falls", "one", "good", "good", ["agreement"], better_at="start"),
        Claim("same start", "one", "good", "bad", ["reward"], "start", "start"),
        Claim("nobody", "one", "good", "nobody"),
        Claim("unknown", "one", "good", "blind", ["agreement"]),
    ]
    judged = judge_claims(grid, claims)
    verdicts = ["reproduced", "contradicted", "partly", "reproduced", "not shown", "not measured"]
    assert [claim.verdict for claim in judged] == verdicts
    assert judged[0].differences["reward"].value == pytest.approx(1.02)
    assert judged[3].differences["agreement"].value == pytest.approx(0.102)
    assert judged[3].as_row().figures.startswith("good, start − end: Δagreement +0.102 [")
    assert "good − bad: Δreward +1.020 [" in judged[0].as_row().figures
    figure = claims_figure(judged, "Claims")
    assert [len(axes.get_yticklabels()) for axes in figure.axes] == [4, 2]
    with pytest.raises(ValueError, match="metrics are some of reward"):
        judge_claims(grid, [Claim("x", "one", "good", "bad", ["speed"])])


def test_comparisons_of_rlaif_parse_and_their_claims_name_what_is_there() -> None:
    for name in ("rlaif", "rlaif_smoke"):
        content = yaml.safe_load(find_config(f"compare/{name}").read_text())
        settings = content["experiment"]["init_args"]["settings"]
        for claim in content["claims"]:
            arms = settings[claim["setting"]]["arms"]
            assert claim["worse"] in arms
            assert claim["better"] in arms or name == "rlaif_smoke"
        with pytest.raises(SystemExit) as ended:
            main(["compare", f"compare/{name}", "--print_config"])
        assert ended.value.code in (0, None)


@pytest.mark.slow
def test_smoke_comparison_of_rlaif_writes_its_section(tmp_path: Path) -> None:
    environment = {**os.environ, "LIGHTNING_RLHF_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "benchmarks.results", "--smoke", "--only=rlaif", f"--runs={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    section = (tmp_path / "results.md").read_text().partition("<!-- begin rlaif -->")[2].partition("<!-- end rlaif")[0]
    assert "(results/rlaif.md)" in section
    tables = (tmp_path / "results" / "rlaif.md").read_text()
    pictures = re.findall(r"\]\((rlaif_\w+\.png)\)", tables)
    assert len(set(pictures)) == 4
    assert all((tmp_path / "results" / picture).stat().st_size > 0 for picture in pictures)
    assert "labels to reach" not in tables
    assert "direct beats canonical" in tables
    cells = tmp_path / "rlaif" / "cells"
    assert not (cells / "stages" / "unused").exists()
    figures = json.loads((tmp_path / "rlaif" / "report.json").read_text())["settings"]
    calls = {arm: found["calls"] for arms in figures.values() for arm, found in arms.items()}
    # pairs in both orders cost two calls, scores one, and those of a reward model none
    assert calls == {"64 pairs": 128, "32 pairs": 64, "canonical": 128, "direct": 128, "refreshed": 192}
    for seed in ("0", "1"):
        with PreferenceStore(cells / "stages" / "both" / seed / "ledger.sqlite", read_only=True) as store:
            assert store.total_cost == calls["64 pairs"]
        assert labels_bought(cells / "stages" / "direct" / seed) == 128
        whole, cut, joined, first = (
            read_cell(cells / "curves" / where / seed / "cell.json")[0][0]
            for where in ("pairs/64_pairs", "pairs/32_pairs", "rewards/refreshed", "rewards/canonical")
        )
        assert cut.points == whole.points[:2]
        assert [point.labels for point in joined.points] == [0, 64, 128, 192, 256]
        # the second stage begins where the first ended, under a reward model of its own
        assert joined.points[:2] == first.points[:2]
        assert joined.points[2].kl == pytest.approx(first.last.kl, abs=1e-4)
        assert joined.points[2].reward == pytest.approx(first.last.reward)
        assert joined.points[2].agreement != first.last.agreement
        rows = list(csv.DictReader((cells / "stages" / "canonical" / seed / "agreement.csv").open()))
        assert [p.agreement for p in stage_points(cells / "stages" / "canonical" / seed)] == [
            float(row["agreement"]) for row in rows
        ]
        assert all(0 <= float(row["agreement"]) <= 1 and int(row["pairs"]) > 0 for row in rows)
