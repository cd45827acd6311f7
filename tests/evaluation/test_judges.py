"""Judge, win, harmless and concordance metrics against tables worked out by hand, in pieces and on two processes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from torchmetrics import Metric

from lightning_rlhf.evaluation import HarmlessRate, JudgeMetrics, KendallsW, WinRate, kendalls_w, wilson_interval
from lightning_rlhf.evaluation.judges import same_position
from lightning_rlhf.judging.verdicts import preference


NAN = math.nan

# probability, human, length of a, length of b, first in both orders, mass; the last two pairs lack what NaN says
TABLE = [
    (0.9, 1.0, 10, 20, 0.8, 0.0, 0.50),  # right; the content decided; the shorter one is better
    (0.3, 1.0, 30, 20, 0.7, 0.9, 0.04),  # wrong; first position twice; the longer one is better
    (0.5, 0.0, 10, 10, 0.6, 0.6, 0.90),  # tie; first position twice; equally long
    (0.2, 0.0, 50, 20, 0.2, 0.4, 0.70),  # right; second position twice; the shorter one is better
    (0.6, 0.5, 20, 10, 0.5, 0.3, NAN),  # people are undecided; the judge in one order
    (0.7, NAN, 20, 10, NAN, NAN, NAN),  # nobody asked people, or the labeler is no judge
]


def columns(rows: list[tuple[float, ...]]) -> tuple[torch.Tensor, ...]:
    table = torch.tensor(rows, dtype=torch.float64)
    return table[:, 0], table[:, 1], table[:, 2:4], table[:, 4], table[:, 5], table[:, 6]


def figures(metric: Metric) -> dict[str, float]:
    return {name: value.item() for name, value in metric.compute().items()}


def test_figures_of_six_pairs_by_hand() -> None:
    metric = JudgeMetrics()
    metric.update(*columns(TABLE))
    found = figures(metric)
    assert found["alignment"] == pytest.approx((1 + 0 + 0.5 + 1 + 0.5) / 5)
    assert (found["alignment_low"], found["alignment_high"]) == pytest.approx(wilson_interval(3, 5))
    # with a first: right, right, wrong, right, tie; with b first, the label names b: right, wrong, right, wrong, tie
    assert found["one_order_alignment"] == pytest.approx(((1 + 1 + 0 + 1 + 0.5) + (1 + 0 + 1 + 0 + 0.5)) / 2 / 5)
    assert found["longer_alignment"] == pytest.approx((0 + 1 + 0.5 + 0 + 0.5) / 5)
    # the shorter, the shorter, tie, the shorter, the longer, the longer
    assert found["prefers_longer"] == pytest.approx((0 + 0 + 0.5 + 0 + 1 + 1) / 6)
    assert found["brier"] == pytest.approx((0.01 + 0.49 + 0.25 + 0.04 + 0.01) / 5)
    # confidences 0.9, 0.7, 0.5, 0.8, 0.6 lie in five bins
    assert found["ece"] == pytest.approx((abs(0.9 - 1) + 0.7 + 0 + abs(0.8 - 1) + abs(0.6 - 0.5)) / 5)
    assert found["same_position"] == pytest.approx(3 / 5)
    assert found["first_position"] == pytest.approx(2 / 3)
    assert found["first_position_p"] == pytest.approx(1.0)  # 2 of 3 is as near to 1.5 as it gets
    assert found["mass"] == pytest.approx((0.5 + 0.04 + 0.9 + 0.7) / 4)
    assert found["mass_min"] == pytest.approx(0.04)
    assert found["mass_low"] == pytest.approx(1 / 4)
    counts = [found[name] for name in ("pairs", "human_pairs", "position_pairs", "mass_pairs")]
    assert counts == [6, 5, 5, 4]


def test_labelers_that_are_no_judges_and_pairs_without_human_labels_leave_those_figures_out() -> None:
    metric = JudgeMetrics()
    metric.update(torch.tensor([0.9, 0.2]), torch.full((2,), NAN), torch.ones(2, 2))
    found = figures(metric)
    for name in ("alignment", "ece", "brier", "same_position", "first_position", "first_position_p", "mass_min"):
        assert math.isnan(found[name]), name
    assert (found["pairs"], found["human_pairs"]) == (2, 0)


def test_pairs_without_a_verdict_count_for_position_and_mass_alone() -> None:
    metric, more = JudgeMetrics(), JudgeMetrics()
    metric.update(*columns(TABLE))
    more.update(*columns([*TABLE, (NAN, 1.0, 90, 1, 0.9, 0.8, 0.01)]))
    expected, found = figures(metric), figures(more)
    assert found["mass_min"] == 0.01
    assert found["mass_low"] == pytest.approx(2 / 5)
    assert found["same_position"] == pytest.approx(4 / 6)
    for name in ("alignment", "brier", "ece", "prefers_longer", "longer_alignment", "pairs", "human_pairs"):
        assert found[name] == expected[name]


def test_a_judge_of_positions_is_all_bias_and_a_judge_of_contents_has_none() -> None:
    quality = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, -1.0]])
    lengths, human = torch.ones(3, 2), torch.tensor([1.0, 0.0, 1.0])
    first_place = torch.tensor([[1.5, 0.0]]).expand(3, 2)
    for forward, reverse, share, alignment in (
        (first_place, first_place, 1.0, 0.5),
        (quality, quality.flip(1), 0.0, 1.0),
    ):
        metric = JudgeMetrics()
        firsts = forward.softmax(-1)[:, 0], reverse.softmax(-1)[:, 0]
        metric.update(preference(forward, reverse), human, lengths, *firsts)
        found = figures(metric)
        assert (found["same_position"], found["alignment"]) == (share, alignment)
        # nobody is longer: the baseline is a coin
        assert found["longer_alignment"] == 0.5


def test_a_task_that_asks_for_the_worse_has_the_same_positions() -> None:
    forward, reverse = torch.tensor([0.9, 0.9, 0.1]), torch.tensor([0.8, 0.2, 0.1])
    assert same_position(forward, reverse).tolist() == [1, 0, -1]


@pytest.mark.parametrize("prefers", ["better", "worse"])
def test_one_order_is_read_by_what_the_task_asks_for(prefers: Literal["better", "worse"]) -> None:
    logits = torch.randn(2, 50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[:, :, 0] += 1.0  # a taste for the first place
    human = (torch.rand(50, generator=torch.Generator().manual_seed(1)) < 0.7).double()
    firsts = logits.softmax(-1)[..., 0]
    metric = JudgeMetrics()
    metric.update(preference(logits[0], logits[1], prefers), human, torch.ones(50, 2), *firsts)
    says_a = torch.stack([firsts[0] > 0.5, firsts[1] < 0.5]).double()
    says_a = says_a if prefers == "better" else 1 - says_a
    assert figures(metric)["one_order_alignment"] == pytest.approx((says_a == human).double().mean().item())


def test_exchanged_pairs_give_the_same() -> None:
    metric, turned = JudgeMetrics(), JudgeMetrics()
    p, human, lengths, forward, reverse, mass = columns(TABLE)
    metric.update(p, human, lengths, forward, reverse, mass)
    turned.update(1 - p, 1 - human, lengths.flip(1), reverse, forward, mass)
    for name, value in figures(metric).items():
        assert figures(turned)[name] == pytest.approx(value), name


WINS = (torch.tensor([0.9, 0.5, 0.2, 0.6]), torch.tensor([[20, 10], [10, 10], [5, 10], [0, 4]]))


def test_win_rate_of_four_pairs_by_hand() -> None:
    metric = WinRate()
    metric.update(*WINS)
    found = figures(metric)
    assert found["win_rate"] == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert (found["win_rate_low"], found["win_rate_high"]) == pytest.approx(wilson_interval(2.5, 4))
    assert found["ties"] == 0.25
    assert found["mean_probability"] == pytest.approx(2.2 / 4)
    assert found["length_ratio"] == pytest.approx((2 + 1 + 0.5 + 0.25) / 4)  # an empty response counts as one
    assert found["length_controlled_low"] < found["length_controlled"] < found["length_controlled_high"]
    other = WinRate()
    other.update(1 - WINS[0], WINS[1].flip(1))
    assert figures(other)["win_rate"] == pytest.approx(1 - found["win_rate"])


@pytest.mark.filterwarnings("ignore:.*was called before the ``update`` method")
def test_nothing_seen_is_nan() -> None:
    assert math.isnan(figures(WinRate())["win_rate"])
    assert math.isnan(figures(HarmlessRate())["harmless_rate"])
    assert math.isnan(figures(JudgeMetrics())["alignment"])


def test_harmless_rate_of_five_responses_by_hand() -> None:
    metric = HarmlessRate(threshold=0.5, reference_length=10.0)
    metric.update(torch.tensor([0.9, 0.5, 0.1, 0.8, 0.7]), torch.tensor([10, 10, 10, 10, 10]))
    found = figures(metric)
    assert found["harmless_rate"] == pytest.approx(3.5 / 5)
    assert (found["harmless_rate_low"], found["harmless_rate_high"]) == pytest.approx(wilson_interval(3.5, 5))
    assert found["length_controlled"] == pytest.approx(3.5 / 5)
    assert found["responses"] == 5
    with pytest.raises(ValueError, match="reference_length must be > 0"):
        HarmlessRate(reference_length=0.0)


def test_harmless_rate_at_the_length_of_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = 50 + 300 * torch.rand(30_000, generator=generator, dtype=torch.float64)
    harmless = torch.rand(30_000, generator=generator, dtype=torch.float64) < torch.sigmoid(1 - 2 * (lengths / 100 - 1))
    metric = HarmlessRate(reference_length=100.0)
    metric.update(harmless.double() * 2 - 1, lengths)
    assert figures(metric)["length_controlled"] == pytest.approx(1 / (1 + math.exp(-1)), abs=0.02)
    assert figures(metric)["harmless_rate"] < 0.5


def test_kendalls_w_by_hand() -> None:
    # three raters of three responses: rank sums 4, 5, 9 deviate by -2, -1, 3 from 6, so S = 14 and W = 168 / (9 * 24)
    ranks = torch.tensor([[1, 2, 3], [2, 1, 3], [1, 2, 3]])
    assert kendalls_w(ranks).item() == pytest.approx(168 / 216)
    assert kendalls_w(torch.tensor([[1, 2, 3, 4]] * 4)).item() == pytest.approx(1.0)
    assert kendalls_w(torch.tensor([[1, 2, 3], [3, 2, 1]])).item() == pytest.approx(0.0)
    # ratings are ranked, and raters who agree in their ties agree
    assert kendalls_w(torch.tensor([[0.1, 0.1, 7.0], [3.0, 3.0, 4.0]])).item() == pytest.approx(1.0)
    assert math.isnan(kendalls_w(torch.ones(2, 3)).item())
    metric = KendallsW()
    metric.update(torch.stack([ranks, torch.tensor([[1, 2, 3]] * 3), torch.ones(3, 3)]))
    assert metric.compute()[0].item() == pytest.approx((168 / 216 + 1) / 2)


SCRIPT = """
import json, sys
import torch
import torch.distributed as dist
from lightning_rlhf.evaluation import HarmlessRate, JudgeMetrics, KendallsW, WinRate

rank, file, world = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
generator = torch.Generator().manual_seed(0)
p, human, forward, reverse, mass = torch.rand(5, 11, generator=generator, dtype=torch.float64)
lengths = torch.randint(1, 50, (11, 2), generator=generator)
human[3], mass[5] = torch.nan, torch.nan
# unequal shares; only rank 1 sees responses to be judged for harm, in two batches
mine = torch.arange(11) if world == 1 else torch.arange(7) if rank == 0 else torch.arange(7, 11)
judges, wins, harmless, concordance = JudgeMetrics(), WinRate(), HarmlessRate(0.5, 20.0), KendallsW()
judges.update(p[mine], human[mine].round(), lengths[mine], forward[mine], reverse[mine], mass[mine])
wins.update(p[mine], lengths[mine])
concordance.update(torch.stack([p, human.nan_to_num(0.5), mass.nan_to_num(0.5)])[:, :4].repeat(len(mine), 1, 1))
if rank == world - 1:
    for part in (slice(0, 5), slice(5, 11)):
        harmless.update(p[part], lengths[part, 0])
found = {}
for metric in (judges, wins, harmless):
    found |= {name: value.item() for name, value in metric.compute().items()}
found["w"] = concordance.compute()[0].item()
print(json.dumps(found))
if world > 1:
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_report_what_one_does(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    outputs = []
    for world in (1, 2):
        arguments = [[str(rank), str(tmp_path / "store"), str(world)] for rank in range(world)]
        processes = [
            subprocess.Popen(
                [sys.executable, str(tmp_path / "script.py"), *line],
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
            )
            for line in arguments
        ]
        outputs += [process.communicate(timeout=120)[0] for process in processes]
        assert all(process.returncode == 0 for process in processes)
    one, first, second = map(json.loads, outputs)
    assert first.keys() == one.keys()
    for name, value in one.items():
        assert first[name] == pytest.approx(value, rel=1e-12, nan_ok=True), name
        assert second[name] == pytest.approx(value, rel=1e-12, nan_ok=True), name
