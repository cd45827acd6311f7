"""What GPT-4 and ChatGPT said about LLMBar's natural pairs in both orders, replayed through the judge metrics.

The records are LLMBar's (Zeng et al. 2023, arXiv 2310.07641). The expected figures are counted here, straight from the
records, without the code under test.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from lightning_rlhf.commands.label import LabelRun
from lightning_rlhf.labelers import AbstractLabeler
from lightning_rlhf.prompts import AbstractPromptSource
from lightning_rlhf.randomness import Key
from lightning_rlhf.types import Comparison, Label, PromptRow, RecordedPair


RECORDS = Path(__file__).parents[3] / "shared" / "data" / "llmbar" / "judge-records"
RECORDS = Path(os.environ.get("LIGHTNING_RLHF_LLMBAR", RECORDS))
pytestmark = pytest.mark.skipif(not RECORDS.is_dir(), reason=f"needs LLMBar's judge records in {RECORDS}")

JUDGES = ["GPT-4.Vanilla", "GPT-4.Rating", "GPT-4.CoT", "ChatGPT.Vanilla", "ChatGPT.Rating", "ChatGPT.CoT"]


class Records(AbstractPromptSource):
    """The pairs of a record; the output that people prefer is the chosen one, whichever number it has."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        self.records = records

    def load(self) -> list[PromptRow]:
        rows = []
        for i, record in enumerate(self.records):
            good, bad = (record["output_1"], record["output_2"])[:: 1 if record["label"] == 1 else -1]
            rows.append(PromptRow(f"row {i}", text=record["input"], pair=RecordedPair(good, bad)))
        return rows


class Replay(AbstractLabeler):
    """Says what a judge said; a verdict that could not be read is a failed label."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        self.records = records

    def label(self, comparisons: Sequence[Comparison], key: Key) -> list[Label]:
        labels = []
        for comparison in comparisons:
            record = self.records[comparison.prompt.index]
            said = [record["results"][0][f"swap = {swap}"]["winner"] for swap in (False, True)]
            if None in said:
                labels.append(Label(None, "invalid"))
                continue
            # P(the position shown first), with output 1 first and with output 2 first; here a may be output 2
            first = [float(said[0] == "1"), float(said[1] == "2")]
            forward, reverse = first if comparison.a.text == record["output_1"] else first[::-1]
            meta = {"first_forward": forward, "first_reverse": reverse}
            labels.append(Label((forward + 1 - reverse) / 2, meta=meta))
        return labels


@pytest.mark.parametrize("judge", JUDGES)
def test_figures_of_a_recorded_judge(tmp_path: Path, judge: str) -> None:
    records = json.loads((RECORDS / f"natural.{judge}.json").read_text(encoding="utf-8"))
    report = LabelRun(Records(records), Replay(records), run_dir=str(tmp_path)).run()
    figures = report["figures"]

    right = same = first = readable = longer = 0.0
    for record in records:
        one, two = (record["results"][0][f"swap = {swap}"]["winner"] for swap in (False, True))
        if one is None or two is None:
            continue
        readable += 1
        right += (int(one == str(record["label"])) + int(two == str(record["label"]))) / 2
        good, bad = (len(record[f"output_{number}"]) for number in (record["label"], 3 - record["label"]))
        longer += 0.5 if good == bad else float(good > bad)
        # output 1 was shown first in the first call and second in the other: another winner is the same position
        if one != two:
            same += 1
            first += one == "1"
    assert figures["human_pairs"] == readable
    assert report["failed"] == ({"invalid": 100 - readable} if readable < 100 else {})
    assert figures["alignment"] == pytest.approx(right / readable)
    assert figures["same_position"] == pytest.approx(same / readable)
    assert figures["first_position"] == pytest.approx(first / same)
    assert figures["first_position_p"] == pytest.approx(binomtest(int(first), int(same)).pvalue)
    assert figures["longer_alignment"] == pytest.approx(longer / readable)


def test_the_stronger_judge_agrees_more_and_looks_less_at_positions(tmp_path: Path) -> None:
    found = {}
    for judge in JUDGES:
        records = json.loads((RECORDS / f"natural.{judge}.json").read_text(encoding="utf-8"))
        found[judge] = LabelRun(Records(records), Replay(records), run_dir=str(tmp_path / judge)).run()["figures"]
    for style in ("Vanilla", "Rating", "CoT"):
        strong, weak = found[f"GPT-4.{style}"], found[f"ChatGPT.{style}"]
        assert strong["alignment_low"] > weak["alignment"]
        assert strong["same_position_high"] < weak["same_position_low"]
