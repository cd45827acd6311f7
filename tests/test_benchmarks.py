"""The benchmarks run, and refuse to time two sides that do not compute the same."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import annotation_load, results
from benchmarks.harness import check_same, ids_in_order, model_folder
from lightning_rlhf.datamodules.options import PreferenceRoundOptions, PromptOptions
from lightning_rlhf.experiments.curves import Curve, CurvePoint, write_cell, write_curves


ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dpo_step", ["--peer", "trl"]),
        ("reward_step", ["--peer", "trl"]),
        ("online_round", []),
        ("generation", []),
        ("rl_step", []),
        ("judge", []),
    ],
)
def test_a_benchmark_prints_a_table_and_a_line_of_json(tmp_path: Path, name: str, options: list[str]) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--steps=1", "--repeats=1", "--new-tokens=4"]
    done = subprocess.run(
        [*command, *options, "--batch=4" if name == "rl_step" else "--batch=2", f"--out={tmp_path / 'out.jsonl'}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    line = json.loads((tmp_path / "out.jsonl").read_text())
    assert line["benchmark"] == name
    arms = [value for value in line.values() if isinstance(value, dict)]
    assert arms
    assert all(arm["cpu"] > 0 and arm["peak_mb"] > 0 for arm in arms)
    assert sum(row.startswith("| ") for row in done.stdout.splitlines()) == len(arms) + 2
    if options:
        # TRL has computed the same loss on the same tokens
        assert "agree" in done.stderr


@pytest.mark.slow
def test_the_load_of_the_annotation_server_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("starlette")
    found = annotation_load.measure(tmp_path, robots=2, think=0.0, seconds=30.0, pairs=12, words=20)
    # the robots stop when there is no pair left
    assert found["votes"] == 12
    assert 0 < found["next_p50_ms"] <= found["next_p99_ms"] and 0 < found["vote_p50_ms"] <= found["vote_p99_ms"]
    assert annotation_load.percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert annotation_load.percentile(list(map(float, range(1, 201))), 0.99) == 198.0


def test_arms_that_differ_are_refused() -> None:
    check_same({"loss": 0.69310}, {"loss": 0.69315}, ["loss"])
    with pytest.raises(SystemExit, match=r"do not compute the same: loss is 0\.7 and 0\.6931"):
        check_same({"loss": 0.7}, {"loss": 0.6931}, ["loss"])


@pytest.mark.slow
def test_the_peer_gets_the_pairs_of_our_steps(tmp_path: Path) -> None:
    """Order and ids are those that the DataModule serves, so that a step is the same step on both sides."""
    import lightning as L

    from benchmarks.harness import MAX_PROMPT, MAX_RESPONSE, Rows
    from lightning_rlhf import DPOModule, PreferenceDataModule
    from lightning_rlhf.generation.base import Decoding
    from lightning_rlhf.labelers import RecordedLabeler
    from lightning_rlhf.samplers import OfflineSampler

    model = model_folder("small")
    expected = ids_in_order(model, "synthetic", 6)
    served = []

    class Served(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, _: int) -> None:
            served.append(sorted(batch.groups()))  # type: ignore[attr-defined]

    module = DPOModule(str(model))
    data = PreferenceDataModule(
        Rows("synthetic", 6, module.tokenizer),
        OfflineSampler(),
        RecordedLabeler(),
        pairs_per_batch=2,
        decoding=Decoding(max_new_tokens=MAX_RESPONSE),
        prompt_options=PromptOptions(max_prompt_tokens=MAX_PROMPT),
        rounds=PreferenceRoundOptions(epochs_per_round=None),
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[Served()],
        default_root_dir=tmp_path,
    )
    trainer.fit(module, datamodule=data)
    steps = [expected[start : start + 2] for start in (0, 2, 4)]
    assert served == [
        sorted((tuple(r["prompt_ids"]), (tuple(r["chosen_ids"]), tuple(r["rejected_ids"]))) for r in step)
        for step in steps
    ]


def test_results_run_a_world_on_demand_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    monkeypatch.setattr(results, "main", lambda arguments: compared.append(arguments[1]))
    monkeypatch.setattr(results, "section", lambda folder, name, out: f"about {name} in {folder.name}")
    results.run([f"--out={tmp_path}"])
    assert "compare/menu" in compared and not {f"compare/{name}" for name in results.ON_DEMAND} & set(compared)
    for name in results.ON_DEMAND:
        compared.clear()
        page = results.run([f"--out={tmp_path}", f"--only={name}"])
        assert compared == [f"compare/{name}"]
        marked = f"<!-- begin {name} -->\n\nabout {name} in {name}\n\n<!-- end {name} -->"
        assert marked in page.read_text()


def test_curves_are_stored_to_six_digits_and_the_same_each_time(tmp_path: Path) -> None:
    points = (CurvePoint(0, 0, 1.0, 0.0, 1.0), CurvePoint(4, 16, 1.23456789, 2e-7, -0.5))
    curves = [Curve("online β=1", "PILAF, tilt 2β", seed, points, None, 3.0) for seed in range(2)]
    write_curves(curves, tmp_path / "curves.csv")
    for name in ("a.csv.gz", "b.csv.gz"):
        results.store_curves(tmp_path / "curves.csv", tmp_path / name)
    assert (tmp_path / "a.csv.gz").read_bytes() == (tmp_path / "b.csv.gz").read_bytes()
    with gzip.open(tmp_path / "a.csv.gz", "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and list(rows[3].values()) == [
        *("online β=1", "PILAF, tilt 2β", "1", "16", "1.23457", "2e-07", "-0.5")
    ]


def test_answers_are_the_first_of_each_arm_and_seed(tmp_path: Path) -> None:
    assert results.answers(tmp_path) == []
    for arm, seed in (("PILAF", 0), ("Best-of-8", 11), ("Best-of-8", 2), ("Vanilla", 0)):
        folder = tmp_path / "cells" / "online" / arm / str(seed)
        folder.mkdir(parents=True)
        rows = [f"| one | {arm} {seed} |", "| two | no |"]
        (folder / "completions.md").write_text("\n".join(["| prompt | before |", "| --- | --- |", *rows]))
        # a run that has not ended has no cell
        if arm != "Vanilla":
            write_cell(folder / "cell.json", [], {"setting": "online", "arm": arm, "seed": seed})
    heading, table = results.answers(tmp_path)
    assert heading == "#### Answers"
    assert table.splitlines() == [
        "| setting | arm | prompt | before |",
        "| --- | --- | --- | --- |",
        "| online | Best-of-8 | one | Best-of-8 2 |",
        "| online | PILAF | one | PILAF 0 |",
    ]


@pytest.mark.slow
def test_costs_by_the_number_of_rows_are_printed(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.data_scale", "--rows=20,40", "--length=short", "--batch=2"),
            *("--set=rounds.ledger_pairs=rows", "--set=prompt_options.rows=disk", f"--out={tmp_path / 'out.jsonl'}"),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    line = json.loads((tmp_path / "out.jsonl").read_text())
    for arm in ("ours, cold", "ours, warm"):
        assert all(run["cpu"] > 0 and run["rss_mb"] > 0 for run in line[arm].values())
    # two arms with two numbers of rows each, below two lines of header
    assert sum(row.startswith("| ") for row in done.stdout.splitlines()) == 6
