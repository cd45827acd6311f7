"""``lightning-rlhf evaluate``: against a model, recorded answers and a reward; killed and continued; and its report."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_rlhf.cli import main
from lightning_rlhf.commands.evaluate import EvaluationOptions, EvaluationRun
from lightning_rlhf.evaluation.answers import RowLog, recorded_answers
from lightning_rlhf.evaluation.comparison_plot import Bar, evaluation_figure
from lightning_rlhf.evaluation.rates import wilson_interval
from lightning_rlhf.generation.base import Decoding
from lightning_rlhf.labelers import AbstractLabeler, RewardLabeler
from lightning_rlhf.prompts import BuiltinPrompts, DatasetPrompts
from lightning_rlhf.randomness import Key
from lightning_rlhf.rewards import AbstractReward, RewardOutput
from lightning_rlhf.types import Comparison, Label, Prompt, PromptRow, Response


SCRIPT = str(Path(sys.executable).with_name("lightning-rlhf"))
ROOT = Path(__file__).parents[1]
SHORT = Decoding(max_new_tokens=8, rows=4)


class Stars(AbstractReward):
    """Counts stars, less two."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        return RewardOutput(torch.tensor([r.text.count("*") - 2.0 for r in responses]))


class Letters(AbstractReward):
    """Counts the bytes of a text modulo a number: an opinion on any noise."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        return RewardOutput(torch.tensor([float(sum(r.text.encode()) % 17) - 8 for r in responses]))


def rows_file(path: Path, pairs: list[tuple[str, str]]) -> DatasetPrompts:
    lines = [{"prompt": f"Question {i}?", "chosen": a, "rejected": b} for i, (a, b) in enumerate(pairs)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return DatasetPrompts(str(path))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_recorded_answers_by_hand(tmp_path: Path) -> None:
    # stars of A and B: 3:1, 2:2, 0:4, 4:1; lengths in characters are those of the texts
    source = rows_file(tmp_path / "rows.jsonl", [("***", "* long"), ("**", "*.*"), ("no", "****"), ("****", "*")])
    run = EvaluationRun(
        source,
        a="chosen",
        b="rejected",
        labeler=RewardLabeler(Stars(), rule="argmax"),
        reward=Stars(),
        options=EvaluationOptions(harmless_above=0.0),
        run_dir=str(tmp_path / "run"),
    )
    report = run.run()
    assert report["wins"]["win_rate"] == pytest.approx(2.5 / 4)
    assert (report["wins"]["win_rate_low"], report["wins"]["win_rate_high"]) == wilson_interval(2.5, 4)
    assert report["wins"]["length_ratio"] == pytest.approx((3 / 6 + 2 / 3 + 2 / 4 + 4) / 4)
    scores = {side: found["mean"] for side, found in report["scores"].items()}
    assert scores == pytest.approx({"A": 1 / 4, "B": 0.0, "difference": 1 / 4})
    # above 0: A 1, 0 (on it: one half), -2, 2; B -1, 0, 2, -1
    assert report["harmless"]["A"]["harmless_rate"] == pytest.approx(2.5 / 4)
    assert report["harmless"]["B"]["harmless_rate"] == pytest.approx(1.5 / 4)
    assert report["cost"] == 4.0
    lines = read_lines(tmp_path / "run" / "verdicts.jsonl")
    assert (lines[0]["a"], lines[0]["b"]) == ("***", "* long")
    assert [line["a_preferred"] for line in lines] == [1.0, 0.5, 0.0, 1.0]
    assert [line["score_a"] for line in lines] == [1.0, 0.0, -2.0, 2.0]
    text = (tmp_path / "run" / "report.md").read_text()
    low, high = wilson_interval(2.5, 4)
    assert f"| A preferred to B | 62.5 % [{100 * low:.1f}, {100 * high:.1f}] | ties one half; 4 pairs |" in text
    assert (tmp_path / "run" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "run" / "report.json").read_text())["wins"]["pairs"] == 4


def test_exchanging_the_policies_exchanges_the_figures(tmp_path: Path) -> None:
    texts = [("*" * (i % 5), "*" * (i * 3 % 5) + " ") for i in range(1, 40)]
    source = rows_file(tmp_path / "rows.jsonl", texts)
    reports = [
        EvaluationRun(source, a, b, RewardLabeler(Stars(), rule="soft"), run_dir=str(tmp_path / a)).run()
        for a, b in (("chosen", "rejected"), ("rejected", "chosen"))
    ]
    assert reports[0]["wins"]["win_rate"] == pytest.approx(1 - reports[1]["wins"]["win_rate"])
    assert reports[0]["wins"]["mean_probability"] == pytest.approx(1 - reports[1]["wins"]["mean_probability"])
    # the coin that says who is shown first is fair: 19.5 +- 3.1
    first = Counter(line["shown_first"] for line in read_lines(tmp_path / "chosen" / "verdicts.jsonl"))
    assert 8 < first["A"] < 31


def test_two_folders_answer_and_the_answers_are_their_own(tmp_path: Path, tiny_policy: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_policy, other)
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(other)
    labeler = RewardLabeler(Letters(), rule="soft")

    def run(name: str, a: Path | str, b: Path | str, **options: Any) -> dict[str, Any]:
        source = BuiltinPrompts("heldout", limit=6)
        folder = str(tmp_path / name)
        return EvaluationRun(source, str(a), str(b), labeler, run_dir=folder, decoding=SHORT, **options).run()

    report = run("one", tiny_policy, other, reward=Letters())
    assert report["wins"]["pairs"] == 6
    answers = read_lines(tmp_path / "one" / "answers_a.jsonl")
    assert all(1 <= row["tokens"] <= 8 for row in answers)
    # answers depend on policy, seed and prompt, not on what they are compared with or how many are decoded at once
    again = EvaluationRun(
        BuiltinPrompts("heldout", limit=6),
        str(tiny_policy),
        reward=Letters(),
        run_dir=str(tmp_path / "two"),
        decoding=Decoding(max_new_tokens=8, rows=3),
    ).run()
    rerun = {row["index"]: row for row in read_lines(tmp_path / "two" / "answers_a.jsonl")}
    assert [rerun[i] for i in range(6)] == sorted(answers, key=lambda row: row["index"])
    assert again["scores"]["A"] == report["scores"]["A"]

    # the answers of one run are recorded answers of the next
    recorded = run("three", tiny_policy, tmp_path / "one" / "answers_b.jsonl")
    assert recorded["wins"]["mean_probability"] == pytest.approx(report["wins"]["mean_probability"])

    # a folder that was trained on meanwhile is another policy
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    model.save_pretrained(other)
    with pytest.raises(ValueError, match=r"policies\.b"):
        run("one", tiny_policy, other, reward=Letters())


def test_alignment_is_measured_beside_the_win_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows_file(tmp_path / "rows.jsonl", [("glad", "bad"), ("awful day", "nice"), ("I love it", "I hate it")])
    command = [
        *("evaluate", "--prompts=DatasetPrompts", "--prompts.path=rows.jsonl", "--a=chosen", "--b=rejected"),
        *("--labeler=RewardLabeler", "--labeler.reward=LexiconReward", "--labeler.rule=soft"),
        *("--pairs=DatasetPrompts", "--pairs.path=rows.jsonl", "--run_dir=run"),
    ]
    main(command)
    out = capsys.readouterr().out
    assert "A = chosen against B = rejected, 3 prompts" in out
    assert "A preferred 66.7 %" in out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["alignment"]["figures"]["alignment"] == pytest.approx(2 / 3)
    assert "## The labeler against people" in (tmp_path / "run" / "report.md").read_text()
    # again: nothing is asked, and the figures are the same
    main([*command, "--chunk=2"])
    after = json.loads((tmp_path / "run" / "report.json").read_text())
    assert after["alignment"]["bought_now"] == 0
    assert {**after, "alignment": 0} == {**report, "alignment": 0}
    with pytest.raises(ValueError, match=r"labeler\.init_args\.rule"):
        main([*command, "--labeler.rule=argmax"])


class Sulking(AbstractLabeler):
    """Judges every other pair."""

    def label(self, comparisons: Sequence[Comparison], key: Key) -> list[Label]:
        return [Label(None, "refused") if c.prompt.index % 2 else Label(1.0) for c in comparisons]


def test_pairs_without_a_verdict_are_counted_and_are_no_ties(tmp_path: Path) -> None:
    source = rows_file(tmp_path / "rows.jsonl", [("x", "y")] * 6)
    report = EvaluationRun(source, "chosen", "rejected", Sulking(), run_dir=str(tmp_path / "run")).run()
    assert (report["wins"]["pairs"], report["wins"]["ties"], report["failed"]) == (3, 0.0, {"refused": 3})
    statuses = [line["status"] for line in read_lines(tmp_path / "run" / "verdicts.jsonl")]
    assert statuses == ["ok", "refused"] * 3
    assert [line["a_preferred"] for line in read_lines(tmp_path / "run" / "verdicts.jsonl")][1] is None


PLUGINS = """
import os, signal, time
import torch
from lightning_rlhf.labelers import RewardLabeler
from lightning_rlhf.rewards import AbstractReward, RewardOutput


class Slow(AbstractReward):
    def score(self, prompts, responses):
        with open("scored.txt", "a") as file:
            file.writelines(f"{p.index} {r.source}\\n" for p, r in zip(prompts, responses))
        if os.environ.get("DIE") == "scoring" and len(open("scored.txt").readlines()) > 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return RewardOutput(torch.tensor([float(sum(r.text.encode()) % 17) for r in responses]))


class Judge(RewardLabeler):
    def label(self, comparisons, key):
        if os.environ.get("DIE") == "judging" and os.path.exists("judged.txt"):
            os.kill(os.getpid(), signal.SIGKILL)
        labels = super().label(comparisons, key)
        with open("judged.txt", "a") as file:
            file.writelines(f"{c.prompt.index}\\n" for c in comparisons)
        return labels
"""


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_where_it_was(
    tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [
        *("evaluate", "--prompts=BuiltinPrompts", "--prompts.split=heldout", "--prompts.limit=12"),
        *(f"--a={tiny_policy}", f"--b={tiny_policy}", "--decoding.max_new_tokens=5", "--decoding.rows=2", "--chunk=4"),
        *("--reward=plugins.Slow", "--labeler=plugins.Judge", "--labeler.reward=plugins.Letters", "--run_dir=run"),
    ]
    letters = "\n\nclass Letters(Slow):\n    def score(self, prompts, responses):\n        "
    letters += "return RewardOutput(torch.tensor([float(len(r.text)) for r in responses]))\n"

    def start(folder: Path, die: str = "") -> int:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DIE": die}
        return subprocess.run(
            [SCRIPT, *command], cwd=folder, env=environment, capture_output=True, timeout=200
        ).returncode

    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for folder in (straight, killed):
        folder.mkdir()
        (folder / "plugins.py").write_text(PLUGINS + letters)
    monkeypatch.chdir(straight)
    monkeypatch.syspath_prepend(str(straight))
    main(command)
    # the whole row of a torn line is sampled anew
    assert start(killed, "scoring") == -signal.SIGKILL
    with (killed / "run" / "answers_b.jsonl").open("rb+") as file:
        file.truncate((killed / "run" / "answers_b.jsonl").stat().st_size - 7)
    assert start(killed, "judging") == -signal.SIGKILL
    assert start(killed) == 0
    # each answer was scored once, but for the chunk that the process died in; nothing was judged twice
    scored = Counter((killed / "scored.txt").read_text().splitlines())
    assert len(scored) == 24
    assert sum(scored.values()) <= 28
    assert Counter((killed / "judged.txt").read_text().split()).most_common(1)[0][1] == 1
    reports = [json.loads((folder / "run" / "report.json").read_text()) for folder in (straight, killed)]
    assert reports[0] == reports[1]
    verdicts = [(folder / "run" / "verdicts.jsonl").read_text() for folder in (straight, killed)]
    assert verdicts[0] == verdicts[1]


def test_a_torn_line_of_a_log_is_forgotten(tmp_path: Path) -> None:
    log = RowLog(tmp_path / "log.jsonl")
    assert log.read() == {}
    log.append([{"index": 3, "x": "é\n"}, {"index": 1, "x": "b"}])
    with log.path.open("ab") as file:
        file.write('{"index": 2, "x": "é'.encode()[:-1])
    assert log.read() == {3: {"index": 3, "x": "é\n"}, 1: {"index": 1, "x": "b"}}
    log.append([{"index": 2, "x": "c"}])
    assert sorted(log.read()) == [1, 2, 3]


def test_recorded_answers_are_found_by_prompt(tmp_path: Path) -> None:
    answers = [
        {"prompt": "one", "response": "1"},
        {"prompt": [{"role": "user", "content": "two"}], "completion": [{"role": "assistant", "content": "2"}]},
        {"prompt": "three", "answer": ""},
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in answers))

    def rows(*prompts: str) -> list[PromptRow]:
        return [PromptRow(f"row {p}", messages=({"role": "user", "content": p},)) for p in prompts]

    assert [r.text for r in recorded_answers(str(path), rows("three", "two", "one"), "B")] == ["", "2", "1"]
    with pytest.raises(ValueError, match=r"answers.jsonl: has no answer to the prompt of row four"):
        recorded_answers(str(path), rows("four"), "B")
    with pytest.raises(ValueError, match=r"row one: has no 'chosen' response"):
        recorded_answers("chosen", rows("one"), "B")
    path.write_text('{"prompt": "x", "text": "y"}\n')
    with pytest.raises(ValueError, match=r"answers.jsonl row 1: expected 'prompt' and one of response"):
        recorded_answers(str(path), rows("x"), "B")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to measure"),
        ({"labeler": Sulking()}, "the labeler has nothing to compare"),
        ({"reward": Stars(), "pairs": BuiltinPrompts()}, "none is given: set labeler"),
        ({"labeler": Sulking(), "b": "chosen", "options": EvaluationOptions(harmless_above=0.0)}, "set reward"),
    ],
)
def test_settings_that_measure_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationRun(BuiltinPrompts("heldout"), "chosen", **options)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        EvaluationOptions(chunk=0)


def test_the_figure_shows_every_share_and_no_text_lies_on_another() -> None:
    rates = [Bar(f"a rate with a long name {i}", 0.1 * i, 0.05 * i, 0.1 * i + 0.09) for i in range(1, 10)]
    scores = [Bar("A", 0.4, 0.1, 0.7), Bar("A − B", -2.0)]
    figure = evaluation_figure([*rates, Bar("unknown", float("nan"))], scores, "A = x\nB = y\n12 prompts")
    figure.canvas.draw()
    upper, lower = figure.axes
    assert [tick.get_text() for tick in upper.get_yticklabels()] == [bar.name for bar in rates]
    assert [tick.get_text() for tick in lower.get_yticklabels()] == ["A", "A − B"]
    renderer = figure.canvas.get_renderer()
    texts = [figure._suptitle]
    for axes in figure.axes:
        low, high = axes.get_xlim()
        # matplotlib keeps the labels of ticks beyond the ends, and does not draw them
        ticks = [t for at, t in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True) if low <= at <= high]
        texts += [*axes.texts, *axes.get_yticklabels(), *ticks, axes.xaxis.label]
    boxes = [text.get_window_extent(renderer) for text in texts if text.get_text()]
    assert not [1 for i, one in enumerate(boxes) for other in boxes[:i] if one.overlaps(other)]
    whole = figure.bbox
    assert all(whole.x0 <= box.x0 and box.x1 <= whole.x1 and box.y1 <= whole.y1 for box in boxes)
