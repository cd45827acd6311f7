"""The benchmarks run, and refuse to time two sides that do not compute the same."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks import annotation_load, decode_profile, gallery, head, ledger, results, silver_labels
from benchmarks.harness import check_same, ids_in_order, model_folder
from lightning_rlhf.datamodules.options import PreferenceRoundOptions, PromptOptions
from lightning_rlhf.experiments.curves import Curve, CurvePoint, write_cell, write_curves
from lightning_rlhf.ledger.schema import silver_meta
from lightning_rlhf.ledger.silver import UNLABELED, SilverTable
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.rewards import FunctionReward
from lightning_rlhf.types import Comparison, Label, Prompt, Response


ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dpo_step", ["--peer", "trl"]),
        ("reward_step", ["--peer", "trl"]),
        ("online_round", []),
        ("generation", []),
        ("engines", []),
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


def test_a_ledger_is_timed_at_each_size(tmp_path: Path) -> None:
    path, prompts = tmp_path / "ledger.sqlite", ledger.make_prompts(50, 3)
    columns = {}
    for size, held in ((100, 0), (300, 108)):
        assert ledger.fill(path, size, prompts)[1] == size - held
        # two rounds of four pairs, which are in the ledger afterwards
        columns[str(size)] = ledger.timed(path, prompts, Namespace(pairs=4, repeats=2))
    assert all(value >= 0 for figures in columns.values() for value in figures.values())
    lines = ledger.table(columns).splitlines()
    assert lines[0] == "| labels in the ledger | 100 | 300 |"
    assert sum(line.startswith("| a round of 4 pairs, CPU ms |") for line in lines) == 1


def test_silver_labels_are_compared_with_the_annotator_by_fit(tmp_path: Path) -> None:
    def pair(place: int, a: float, b: float, mean: float, fitted: int) -> tuple[Comparison, Label]:
        first, second = (Response((1,), str(reward), "eos") for reward in (a, b))
        probability = torch.tensor(mean, dtype=torch.float64).sigmoid().item()
        return Comparison(Prompt(place, (2,), "p"), first, second), Label(
            probability, cost=0.0, meta=silver_meta(mean, 1.0, fitted)
        )

    def as_numbers(prompts: list[str], completions: list[str]) -> list[float]:
        return list(map(float, completions))

    with PreferenceStore(tmp_path / "ledger.sqlite") as store:
        table = SilverTable(store)
        table.add(UNLABELED, [(pair(9, 0.0, 1.0, 0.0, 0)[0], None)])
        # epoch 0 has none: there was no fit yet
        table.add(1, [pair(0, 2.0, 0.0, 1.0, 32), pair(1, 0.0, 1.0, 0.5, 32)])
        table.add(2, [pair(2, 1.0, 1.0, 0.0, 32)])
        table.add(3, [pair(3, 3.0, 0.0, -1.0, 48), pair(4, 0.0, 0.0, 1.0, 48)])
        found = silver_labels.fits(silver_labels.silver_pairs(store), FunctionReward(as_numbers))
    assert [(fit.labels, fit.pairs) for fit in found] == [(32, 3), (48, 2)]
    gap, mean = torch.tensor([2.0, -1.0, 0.0]).double(), torch.tensor([1.0, 0.5, 0.0]).double()
    assert found[0].correlation == pytest.approx(float(torch.corrcoef(torch.stack([gap, mean]))[0, 1]))
    assert found[0].silver == pytest.approx(float(mean.sigmoid().mean()))
    assert found[0].annotator == pytest.approx(float(gap.sigmoid().mean()))
    # -(q log p + (1 - q) log(1 - p)), q = sigma(gap), p = sigma(mean)
    expected = -(gap.sigmoid() * mean.sigmoid().log() + (-gap).sigmoid() * (-mean).sigmoid().log()).mean()
    assert found[0].cross_entropy == pytest.approx(float(expected))
    # the slope of the cross-entropy in kappa is 0, up to the grid
    slope = mean @ (gap.sigmoid() - (found[0].kappa * mean).sigmoid())
    assert float(slope) == pytest.approx(0.0, abs=0.005)
    assert found[1].correlation == pytest.approx(-1.0)


def test_both_arms_of_the_head_find_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    # put back afterwards: one arm changes them
    for name in ("_take_buffer", "SCRATCH_BYTES"):
        monkeypatch.setattr(head.head, name, getattr(head.head, name))
    sizes = {"device": "cpu", "tokens": 30, "width": 8, "vocabulary": 500, "batches": 2}
    for kind in head.KINDS:
        results = [head.work(Namespace(**sizes, worker=arm), kind) for arm in head.ARMS]
        assert results[0]["sum"] == results[1]["sum"] < 0


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
        link = f"[All tables and figures](results/{name}.md). about {name} in {name}"
        assert f"<!-- begin {name} -->\n\n{link}\n\n<!-- end {name} -->" in page.read_text()
        assert (tmp_path / "results" / f"{name}.md").read_text().endswith(f"\n\nabout {name} in {name}\n")


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


def test_the_gallery_shows_the_result_and_the_first_answers(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"starts": [{"time": "2026-11-30T12:00:00+0000"}]}))
    summary = {
        f"{name}_{when}": value for when, value in (("before", 1.0), ("after", 2.5)) for name in ("reward", "kl", "j")
    }
    summary |= {"reward_before_stderr": 0.25, "reward_after_stderr": 0.5, "step_before": 0, "step_after": 9}
    summary |= {"reward_difference": 1.5, "reward_difference_stderr": 0.5, "labels": 144, "passes_per_pair": 3.0}
    (tmp_path / "summary.json").write_text(json.dumps({**summary, "seconds": 60.0}))
    rows = ["| prompt | before |", "| --- | --- |", *(f"| q{i} | a{i} |" for i in range(9))]
    (tmp_path / "completions.md").write_text("\n".join(rows))
    content = gallery.excerpt(tmp_path)
    assert "held-out reward 1.00 ± 0.25 -> 2.50 ± 0.50 (+1.50 ± 0.50 paired)" in content
    assert content.endswith("\n".join(rows[: 2 + gallery.ANSWERS]))
    assert results.spliced(gallery.PAGE.read_text(encoding="utf-8"), "gallery", content).count("144 labels") == 1


def test_pictures_of_the_gallery_are_smaller_and_look_alike(tmp_path: Path) -> None:
    from matplotlib import image

    picture = torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(0)).numpy()
    image.imsave(tmp_path / "large.png", picture)
    gallery.store_smaller(tmp_path / "large.png", tmp_path / "small.png")
    assert (tmp_path / "small.png").stat().st_size < 0.8 * (tmp_path / "large.png").stat().st_size
    # half a level of 16, and the rounding to 8 bits
    assert abs(image.imread(tmp_path / "small.png")[..., :3] - picture).max() < 0.5 / 15 + 0.5 / 255 + 1e-3


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


def test_the_profile_of_a_decoding_step(capsys: pytest.CaptureFixture[str]) -> None:
    times = {
        "aten::addmm": 6.0,
        "aten::mm": 1.0,
        "aten::_scaled_dot_product_flash_attention_for_cpu": 1.0,
        "aten::add": 2,
    }
    assert decode_profile.shares(times) == pytest.approx((0.7, 0.1))
    (figures,) = decode_profile.run(["--rows=2", "--prompt-tokens=4", "--new-tokens=4", "--repeats=1"])
    assert figures["cpu_ms"] > 0 and 0 < figures["products"] < 1 and 0 < figures["attention"] < 1
    # more than an operation in each of the layers
    assert figures["operations"] > 100
    assert capsys.readouterr().out.splitlines()[-1].startswith("| 2 | ")
