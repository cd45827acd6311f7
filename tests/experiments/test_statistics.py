"""Figures of comparisons, on curves whose figures are known."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import scipy.stats

from lightning_rlhf.experiments.curves import Curve, CurvePoint, read_cell, write_cell
from lightning_rlhf.experiments.efficiency import student_quantile
from lightning_rlhf.experiments.plots import (
    alignment_figure,
    efficiency_figure,
    frontier_figure,
    label_figure,
    seed_effects,
)
from lightning_rlhf.experiments.report import (
    Interval,
    figures_of,
    grid_of,
    judged,
    markdown,
    saving_verdict,
    shares,
    verdicts,
)
from lightning_rlhf.experiments.run import complete
from lightning_rlhf.experiments.statistics import common_grid, j_at, label_share, mean_interval, paired, paired_at


def curve(arm: str, seed: int, j: list[float], kl: float = 1.0, cosine: float | None = None) -> Curve:
    """A run with evaluations every 10 labels; J as given, reward = J + 0.1 KL."""
    points = tuple(
        CurvePoint(i, 10 * i, value + 0.1 * kl, kl, value, cosine, cosine, None) for i, value in enumerate(j)
    )
    return Curve("online", arm, seed, points, passes=2.5, planned_passes=2.0)


@pytest.mark.parametrize("freedom", [1, 2, 9, 39])
def test_student_quantile(freedom: int) -> None:
    assert student_quantile(freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), rel=1e-4)


def test_mean_interval_is_students() -> None:
    values = [1.0, 2.0, 4.0, 4.5]
    expected = scipy.stats.t.interval(0.95, 3, sum(values) / 4, scipy.stats.sem(values))
    found = mean_interval(values)
    assert (found.value, found.low, found.high) == pytest.approx((sum(values) / 4, *expected), rel=1e-4)
    assert math.isnan(mean_interval([1.0]).low)


def test_paired_differences_cancel_what_seeds_share() -> None:
    baseline = [curve("Vanilla", seed, [0.0, 10.0 * seed]) for seed in range(4)]
    better = [curve("PILAF", seed, [0.0, 10.0 * seed + 1.0]) for seed in (3, 1, 2, 0)]
    found = paired(better, baseline, "j")
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0))


def test_label_share_is_over_the_baselines_own_labels() -> None:
    baseline = [curve("Vanilla", seed, [0.0, 1.0, 2.0 + 0.1 * seed, 3.0, 4.0]) for seed in range(5)]
    fast = [curve("PILAF", seed, [0.0, 2.0, 4.0, 4.5, 5.0]) for seed in range(5)]
    assert label_share(fast, baseline) == pytest.approx((0.5, 0.5, 0.5))
    never = label_share([curve("PILAF", s, [0.0, 1.0, 1.0, 1.0, 1.0]) for s in range(5)], baseline)
    assert never.value == math.inf and saving_verdict(never) == "contradicted"
    # a baseline that ends where it began has nothing to reach
    flat = [curve("Vanilla", seed, [2.0, 1.0]) for seed in range(5)]
    assert math.isnan(label_share(fast, flat).value) and saving_verdict(label_share(fast, flat)) == "not measured"
    # one that levels off was there before its budget was spent
    level = [curve("Vanilla", seed, [0.0, 4.0, 4.0, 4.0, 4.0]) for seed in range(5)]
    assert label_share(fast, level).value == pytest.approx(2.0)
    assert label_share(fast[:1], baseline[:1]) == pytest.approx((0.5, math.nan, math.nan), nan_ok=True)
    for wrong in ({"resamples": 0}, {"gain": 0.0}, {"gain": 1.5}):
        with pytest.raises(ValueError, match="resamples >= 1 and gain"):
            label_share(fast, baseline, **wrong)


def test_runs_are_paired_by_seed_whatever_their_order() -> None:
    """Seeds differ by far more than arms do, and by the same for both."""
    ease, small = [0.0, 10.0, -10.0, 30.0, 5.0], [0.01, -0.02, 0.02, -0.01, 0.0]
    baseline = [curve("Vanilla", s, [ease[s] + n for n in (0.0, 1.0, 2.0 + small[s], 3.0, 4.0)]) for s in range(5)]
    fast = [curve("PILAF", s, [ease[s] + n for n in (0.0, 2.0, 4.0 + small[s], 4.5, 5.0)]) for s in (3, 0, 4, 2, 1)]
    found = label_share(fast, baseline)
    assert 0.47 < found.low < found.value < found.high < 0.53
    # runs of a seed that the other arm lacks do not count
    assert label_share([*fast, curve("PILAF", 9, [0.0] * 5)], baseline) == found
    # arms that share no seed are resampled each on its own, and then the seeds' ease is in the way
    others = [curve("Vanilla", c.seed + 100, [point.j for point in c.points]) for c in baseline]
    apart = label_share(fast, others)
    assert apart.value == pytest.approx(found.value) and apart.low < 0.1 and apart.high == math.inf


def test_runs_that_were_evaluated_at_other_labels_are_interpolated() -> None:
    short = Curve("online", "PILAF", 1, curve("PILAF", 1, [0.0, 1.0, 2.0, 3.0]).points[1:3], 2.5, 2.0)
    between = CurvePoint(1, 15, 0.0, 0.0, 9.0)
    odd = Curve("online", "PILAF", 2, (short.points[0], between, short.points[1]), 2.5, 2.0)
    labels, j = common_grid([curve("PILAF", 0, [0.0, 1.0, 2.0, 3.0]), short, odd])
    # runs that ended early keep their last J: one that collapsed counts until the end
    assert labels.tolist() == [10.0, 15.0, 20.0, 30.0]
    assert j.tolist() == [[1.0, 1.5, 2.0, 3.0], [1.0, 1.5, 2.0, 2.0], [1.0, 9.0, 2.0, 2.0]]
    _, kl = common_grid([curve("PILAF", 0, [0.0, 1.0], kl=3.0), short], "kl")
    assert kl.tolist() == [[3.0, 3.0], [1.0, 1.0]]


def test_a_run_that_collapsed_is_not_left_out_of_the_figures() -> None:
    baseline = [curve("Vanilla", s, [0.0, 1.0, 2.0, 3.0, 4.0]) for s in range(4)]
    # one of four has nothing left to label after 20 labels
    ours = [curve("silver", s, [0.0, 4.0, 8.0, 8.0, 8.0]) for s in range(3)] + [curve("silver", 3, [0.0, 1.0, -4.0])]
    assert j_at(ours, 30) == [8.0, 8.0, 8.0, -4.0]
    assert paired_at(ours, baseline, 30).value == pytest.approx(1.0)
    figures = figures_of(grid_of([*baseline, *ours]), "Vanilla", at_labels=[30])
    assert figures["online"]["silver"]["labels"] == 40
    # mean J 5 at 20 labels passes 4 of the baseline at 40
    assert label_share(ours, baseline).value == pytest.approx((10 + 10 * (4 - 3.25) / (5 - 3.25)) / 40)
    drawn = label_figure(grid_of([*baseline, *ours]), "title").axes[0].lines[2]
    assert drawn.get_xdata().tolist() == [0.0, 10.0, 20.0, 30.0, 40.0]


def sparing(arm: str, seed: int, ease: float) -> Curve:
    """A run with half of the budget, evaluated at other labels than `curve`, and three silver pairs per label."""
    points = tuple(CurvePoint(i, n, ease + n / 5, 0.0, ease + n / 5) for i, n in enumerate((0, 8, 16, 20)))
    return Curve("online", arm, seed, points, 2.0, 2.0, seconds=4.0, cpu_seconds=3.0 + seed, silver_pairs=60.0)


def test_j_at_labels_is_paired_with_the_end_of_the_baseline() -> None:
    ease = [0.0, 7.0, -4.0, 30.0]
    baseline = [curve("Vanilla", s, [ease[s] + n for n in (0.0, 1.0, 2.0, 2.5, 3.0 + 0.1 * s)]) for s in range(4)]
    ours = [sparing("silver", s, ease[s]) for s in (2, 0, 1, 3)]
    # by a straight line between 8 and 16 labels
    assert j_at(ours[1:2], 10) == pytest.approx([2.0])
    assert j_at(ours[:2], 20) == pytest.approx([0.0, 4.0])
    assert math.isnan(j_at(ours, 21)[0])
    found = paired_at(ours, baseline, 10)
    expected = scipy.stats.t.interval(0.95, 3, -1.15, scipy.stats.sem([1.0, 1.1, 1.2, 1.3]))
    assert (found.value, found.low, found.high) == pytest.approx((-1.15, *expected), rel=1e-3)
    # an arm of another budget, a seed that the baseline lacks, and the baseline itself
    assert math.isnan(paired_at(ours, baseline, 40).value)
    assert paired_at([*ours, sparing("silver", 9, 99.0)], baseline, 10) == found
    assert paired_at(baseline, baseline, 20).value == pytest.approx(-1.15)


def test_the_report_of_label_efficiency_copes_with_budgets_and_grids_of_their_own() -> None:
    baseline = [curve("Vanilla", s, [s + n for n in (0.0, 1.0, 2.0, 3.0, 4.0)]) for s in range(4)]
    grid = grid_of([*baseline, *(sparing("silver", s, s) for s in range(4))])
    figures = figures_of(grid, "Vanilla", at_labels=[10, 20, 40])
    found = figures["online"]["silver"]
    assert found["label_share"] == pytest.approx((0.5, 0.5, 0.5))
    assert found["label_share_half"] == pytest.approx((0.5, 0.5, 0.5))
    assert found["j_at_difference"]["20"] == pytest.approx((0.0, 0.0, 0.0))
    assert (found["silver_pairs_per_label"], found["cpu_seconds"]) == (3.0, 4.5)
    text = markdown(figures, [], "Vanilla", str)
    assert "20 to 40 labels per run, 4 seeds." in text
    assert "| arm | labels | reward ↑ |" in text
    assert (
        "| arm | labels to J of Vanilla at 40 | labels to half of its gain | J at 10, Δ to 40 | J at 20, Δ to 40 |"
        in text
    )
    (row,) = [line for line in text.splitlines() if line.startswith("| silver | 50 %")]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[:3] == ["silver", "50 % [50, 50]", "50 % [50, 50]"]
    assert cells[3].endswith("-2.00 [-2.00, -2.00]") and cells[5] == "–"
    assert "| silver | 2 | 2.00 | 2 | 4 s | 4.5 s | 3.0 |" in text
    assert "| Vanilla | 2 | 2.50 | 2 | – | – | – |" in text
    # without fixed labels the report is as before
    plain = markdown(figures_of(grid, "Vanilla"), [], "Vanilla", str)
    assert "Δ to 40" not in plain


def test_the_arrow_of_the_figure_spans_the_share() -> None:
    baseline = [curve("Vanilla", s, [0.1 * s + n for n in (0.0, 1.0, 2.0, 3.0, 4.0)]) for s in range(4)]
    grid = grid_of([*baseline, *(sparing("silver", s, 0.1 * s) for s in range(4))])
    axes = efficiency_figure(grid, "title", "Vanilla").axes[0]
    assert [text.get_text() for text in axes.texts] == ["", "same J at 1/2 of the labels"]
    arrow = axes.texts[0]
    assert (arrow.xy, arrow.xyann) == (pytest.approx((20.0, 4.15)), pytest.approx((40.0, 4.15)))
    assert axes.get_xscale() == "log"
    # halvings of the budget, and no evaluation at 0 labels
    assert [label.get_text() for label in axes.get_xticklabels()] == ["40", "20", "10"]
    assert min(float(line.get_xdata()[0]) for line in axes.lines[:2]) > 0
    # an arm that needs more labels, or never gets there, has no arrow
    slow = grid_of([*baseline, *(curve("silver", s, [0.0, 0.5, 1.0, 2.0, 3.0]) for s in range(4))])
    assert not efficiency_figure(slow, "title", "Vanilla").axes[0].texts
    assert not efficiency_figure(grid_of(baseline), "title", "Vanilla").axes[0].texts


def test_verdicts_follow_the_intervals() -> None:
    up, down, none = Interval(1, 0.5, 1.5), Interval(-1, -1.5, -0.5), Interval(0.1, -1, 1)
    assert judged({"reward": up, "kl": down, "j": up}) == "reproduced"
    assert judged({"reward": none, "kl": down, "j": none}) == "partly"
    assert judged({"reward": none, "kl": none, "j": none}) == "not shown"
    assert judged({"reward": up, "kl": up, "j": down}) == "contradicted"
    assert judged({"reward": none, "kl": up, "j": none}) == "not shown"
    assert judged({"reward": up, "kl": down, "j": Interval(1.0)}) == "not measured"
    assert saving_verdict(Interval(0.5, 0.4, 0.7)) == "reproduced"
    assert saving_verdict(Interval(0.8, 0.7, 0.9)) == "partly"
    assert saving_verdict(Interval(0.8, 0.7, math.inf)) == "not shown"
    assert saving_verdict(Interval(math.inf, math.inf, math.inf)) == "contradicted"
    assert saving_verdict(Interval(math.nan, 0.0, math.inf)) == "not measured"
    assert shares(Interval(0.5, 0.4, math.inf)) == "50 % [40, never]"
    assert shares(Interval(math.inf, 0.9, math.inf)) == "not reached [90, never]"


def example() -> list[Curve]:
    noise = [0.0, 0.02, -0.02, 0.01]
    vanilla = [curve("Vanilla", s, [0.0, 1.0 + e, 2.0 + e], kl=2.0, cosine=0.5) for s, e in enumerate(noise)]
    pilaf = [curve("PILAF", s, [0.0, 2.5 - e, 3.0], kl=1.0 + e, cosine=0.6 + e) for s, e in enumerate(noise)]
    return [*vanilla, *pilaf]


def test_report_has_a_table_the_verdicts_and_the_costs() -> None:
    grid = grid_of(example())
    claims = verdicts(grid, "PILAF", "Vanilla")
    found = {claim.claim: claim.verdict for claim in claims}
    assert found == {
        "PILAF over Vanilla in reward, KL and J": "reproduced",
        "PILAF reaches Vanilla's final J with 40 % fewer labels": "reproduced",
        "PILAF's expected gradient is nearer to ∇J than Vanilla's": "reproduced",
        "PILAF's batch gradient is nearer to ∇J than Vanilla's": "reproduced",
    }
    text = markdown(figures_of(grid, "Vanilla"), claims, "Vanilla", lambda setting: f"regime of {setting}")
    assert "regime of online; 20 labels per run, 4 seeds." in text
    assert "| PILAF | **3.100" in text
    assert "| PILAF | 2 | 2.50 | 2 | – |" in text


def test_cells_survive_the_disk(tmp_path: pytest.TempPathFactory) -> None:
    path = tmp_path / "cell.json"  # type: ignore[operator]
    write_cell(path, example(), {"seeds": 4})
    assert read_cell(path) == (example(), {"seeds": 4})


def test_cells_of_earlier_versions_are_read(tmp_path: Path) -> None:
    path = tmp_path / "cell.json"
    write_cell(path, [sparing("silver", 0, 0.0)], None)
    content = json.loads(path.read_text())
    for name in ("cpu_seconds", "silver_pairs"):
        del content["curves"][0][name]
    path.write_text(json.dumps(content))
    (found,), _ = read_cell(path)
    assert (found.seconds, found.cpu_seconds, found.silver_pairs) == (4.0, None, None)


def test_seeds_that_an_arm_lacks_are_left_out_of_all() -> None:
    kept = complete([*example(), curve("Vanilla", 9, [0.0, 1.0])])
    assert {c.seed for c in kept} == {0, 1, 2, 3}


def test_seed_effects_are_what_arms_share_and_add_up_to_zero() -> None:
    arms = {
        name: [curve(name, seed, [0.0, 5.0 * seed + shift]) for seed in (0, 1)] for name, shift in (("a", 0), ("b", 3))
    }
    assert seed_effects(arms) == {0: -2.5, 1: 2.5}


def test_bands_without_what_arms_share_are_as_wide_as_the_noise_of_an_arm() -> None:
    """Seeds differ by 100, runs by noise of their own: the band is that of the noise, with any number of arms."""
    generator = random.Random(0)
    for count in (1, 2, 5):
        ease = {seed: 100.0 * generator.random() if count > 1 else 0.0 for seed in range(400)}
        grid = grid_of(
            [
                curve(f"arm {arm}", seed, [0.0, ease[seed] + generator.gauss(0.0, 1.0)])
                for arm in range(count)
                for seed in ease
            ]
        )
        band = label_figure(grid, "title").axes[0].collections[0].get_paths()[0].vertices
        at_the_end = [y for x, y in band.tolist() if x == 10.0]
        expected = 2 * scipy.stats.t.ppf(0.975, 399) / 400**0.5
        assert max(at_the_end) - min(at_the_end) == pytest.approx(expected, rel=0.12)


def test_figures_have_a_panel_per_setting_and_a_legend_of_arms() -> None:
    grid = grid_of(example())
    for figure in (frontier_figure(grid, "title"), label_figure(grid, "title"), alignment_figure(grid, "title")):
        assert [axes.get_title(loc="left") for axes in figure.axes] == ["online"]
        assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Vanilla", "PILAF"]
