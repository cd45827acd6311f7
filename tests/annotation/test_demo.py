"""``make demo-human``: a person judges the pairs that PILAF chose, the model learns, and a page shows the result."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_rlhf.callbacks import RunPage
from lightning_rlhf.cli import main
from lightning_rlhf.evaluation.run_page import run_page
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.types import Comparison, Label, Prompt, Response


ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_demo_asks_24_times_and_shows_what_was_learned(
    tiny_policy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    start_server: Callable[..., Any],
    start_robot: Callable[..., Any],
) -> None:
    monkeypatch.chdir(tmp_path)
    # a browser on the machine of the test would be a surprise
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    robot = start_robot(start_server(tmp_path / "runs" / "demo_human"), "me")
    options = ["--trainer.precision=32-true", "--trainer.enable_progress_bar=false", "--data.heldout.limit=3"]
    options += ["--data.decoding.max_new_tokens=6", f"--model.policy={tiny_policy}"]
    main(["fit", "--config=demo_human", *options])
    run = tmp_path / "runs" / "demo_human"
    with PreferenceStore(run / "ledger.sqlite", read_only=True) as store:
        assert len(store.votes()) == store.num_labels == robot.votes == 24
        branches = {comparison.branch for _, _, comparison, _ in store.walk()}
        assert "tilt" in branches
    summary = json.loads((run / "summary.json").read_text())
    assert summary["labels"] == 24 and summary["steps"] == 27 and summary["people"]["people"]["me"]["votes"] == 24
    page = (run / "report.html").read_text()
    assert page.count("<td class=chosen>") == 24
    assert "24 votes of 1 person on 24 pairs" in page
    assert "report: file://" in capsys.readouterr().out
    assert re.search(r"fit --config demo_human", (ROOT / "Makefile").read_text())


def test_the_page_escapes_texts_and_marks_the_better_response(tmp_path: Path) -> None:
    assert "What the model learned" in run_page(tmp_path)
    with PreferenceStore(tmp_path / "ledger.sqlite") as store:
        texts = [("<script>alert(1)</script>", "fine"), ("x", "y"), ("u", "v")]
        comparisons = [
            Comparison(Prompt(n, (1,), f"q{n} & co"), Response((1, n), a, "eos"), Response((2, n), b, "eos"))
            for n, (a, b) in enumerate(texts)
        ]
        ids = store.add_comparisons(0, comparisons, [0, 1, 2])
        store.add_labels(ids, [Label(0.0), Label(1.0), Label(0.5)])
    (tmp_path / "summary.json").write_text(json.dumps({"labels": 3, "kl_after": None, "cost": 1.5}))
    (tmp_path / "completions.csv").write_text('prompt,before,after,reward before,reward after\n"<b>","one","two",,\n')
    page = run_page(tmp_path)
    assert "<script>" not in page and "&lt;script&gt;" in page and "q0 &amp; co" in page
    assert "<td class=chosen>fine</td>" in page and "<td class=chosen>x</td>" in page
    assert page.count("<td class=chosen>") == 2
    assert "<td>&lt;b&gt;</td><td>one</td><td>two</td>" in page
    assert "<dt>Cost of the labels</dt><dd>1.5</dd>" in page and "KL to" not in page


def test_a_browser_opens_only_on_a_machine_with_a_display(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from types import SimpleNamespace

    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    trainer: Any = SimpleNamespace(is_global_zero=True, fast_dev_run=False, default_root_dir=str(tmp_path))
    module: Any = None
    for display in (False, True):
        monkeypatch.delenv("DISPLAY", raising=False)
        if display:
            monkeypatch.setenv("DISPLAY", ":0")
        RunPage(open_browser=True).on_fit_end(trainer, module)
        RunPage().on_fit_end(trainer, module)
    assert opened == [(tmp_path / "report.html").as_uri()]
    assert capsys.readouterr().out.count("report: file://") == 4
