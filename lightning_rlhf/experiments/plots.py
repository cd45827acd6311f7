"""Figures of a comparison, made without a display: reward against KL, J against labels, alignment of gradients."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lightning_rlhf.experiments.curves import Curve
from lightning_rlhf.experiments.efficiency import Arm, reach_of, student_quantile
from lightning_rlhf.experiments.report import Grid
from lightning_rlhf.experiments.statistics import Array, common_grid


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_rlhf.experiments.claims import JudgedClaim


COLORS = (
    *("#4d4d4d", "#e07b00", "#2a7fb8", "#c2185b", "#7b3fa0", "#8c6d31", "#1a9850", "#006d5b", "#00a5b5", "#999933"),
)
PANELS_PER_ROW = 3
VERDICT_COLORS = {"reproduced": "#1a9850", "partly": "#e0a800", "not shown": "#7f7f7f", "contradicted": "#c2185b"}
MANY = 8
"""Arms from which on bands would hide each other."""


@dataclass(frozen=True)
class Style:
    """Style of an arm, the same in all figures: colors first, then dashes."""

    color: str
    line: Literal["-", "--"]
    marker: Literal["o", "s"]


def style_of(index: int) -> Style:
    """The style of an arm by its place."""
    color = COLORS[index % len(COLORS)]
    return Style(color, "--", "s") if index // len(COLORS) % 2 else Style(color, "-", "o")


def plot_frontiers(grid: Grid, path: Path, title: str) -> None:
    """Plot the mean path of each arm through the reward-KL plane (Figures 2 to 5 of PILAF); darker is later.

    Args:
        grid: runs by setting and arm.
        path: the file to write, ``.png``.
        title: text above the figure.
    """
    frontier_figure(grid, title).savefig(path, dpi=140)


def frontier_figure(grid: Grid, title: str) -> Figure:
    """Make the figure of `plot_frontiers` without saving it."""

    def draw(axes: Axes, curves: Sequence[Curve], style: Style) -> None:
        labels, kl = mean_path(curves, "kl")
        _, reward = mean_path(curves, "reward")
        axes.plot(kl, reward, color=style.color, linestyle=style.line, linewidth=1.0, alpha=0.45, zorder=1)
        # at most a dozen dots, the last among them: lines of dots hide each other
        shown = np.unique(np.linspace(0, len(labels) - 1, min(len(labels), 12)).astype(int))
        shade = np.clip(0.2 + 0.8 * labels[shown] / max(labels[-1], 1.0), 0.2, 1.0)
        look: dict[str, Any] = {"color": style.color, "marker": style.marker}
        axes.scatter(kl[shown], reward[shown], s=20, alpha=shade, linewidth=0, zorder=2, **look)
        axes.scatter(kl[-1:], reward[-1:], s=60, edgecolor="black", linewidth=0.8, zorder=3, **look)

    def crop(axes: Axes, arms: Mapping[str, Sequence[Curve]]) -> None:
        if all(curve.points[0].kl > 1e-3 for curve in chain.from_iterable(arms.values())):
            return
        # the way from the reference is long and about the same for all: the panel shows the last nine tenths
        late = [(labels > labels[-1] / 10) for labels, _ in (mean_path(curves, "kl") for curves in arms.values())]
        for figure, limit in (("kl", axes.set_xlim), ("reward", axes.set_ylim)):
            paths = [mean_path(curves, figure)[1] for curves in arms.values()]
            values = np.concatenate([path[kept] for path, kept in zip(paths, late, strict=True)])
            # limits that are equal would give an axis without extent
            room = max(float(np.ptp(values)), 1e-9)
            limit(values.min() - 0.08 * room, values.max() + 0.08 * room)

    figure = panels(grid, title, draw, "KL to the reference [nats per response]", "reward [oracle's unit]", crop)
    figure.text(
        0.99, 0.005, "dots darken with labels; ringed: end of the run", ha="right", fontsize="x-small", color="0.35"
    )
    return figure


def plot_labels(grid: Grid, path: Path, title: str, unit: str = "labels") -> None:
    """Plot mean J against labels, with 95 % intervals over seeds; arguments as for `plot_frontiers`.

    Seeds differ more than arms do, since each has a world or an order of prompts of its own: the final J of a seed,
    mean over arms, is taken out of the intervals. Some of each arm's own noise goes with it; intervals are widened by
    ``sqrt(arms / (arms - 1))``, which corrects for that (Morey 2008). More than `MANY` arms are plotted without
    intervals.
    """
    label_figure(grid, title, unit).savefig(path, dpi=140)


def label_figure(grid: Grid, title: str, unit: str = "labels") -> Figure:
    """Make the figure of `plot_labels` without saving it."""

    ease = {setting: seed_effects(arms) for setting, arms in grid.items()}
    bands = max(map(len, grid.values())) <= MANY

    def draw(axes: Axes, curves: Sequence[Curve], style: Style) -> None:
        labels, j = common_grid(curves)
        effects = ease[curves[0].setting]
        # [runs, points] - [runs, 1]
        j = j - np.array([[effects[curve.seed]] for curve in curves])
        mean = j.mean(0)
        axes.plot(labels, mean, color=style.color, linestyle=style.line, linewidth=1.6, zorder=3)
        # arms may be one run at several budgets
        axes.plot(labels[-1:], mean[-1:], style.marker, color=style.color, markersize=4, zorder=4)
        if bands and len(j) > 1:
            half = shared_noise(len(grid[curves[0].setting])) * half_width(j)
            axes.fill_between(labels, mean - half, mean + half, color=style.color, alpha=0.1, linewidth=0, zorder=1)

    def crop(axes: Axes, arms: Mapping[str, Sequence[Curve]]) -> None:
        # the first third of the climb is steep and the same for all arms: leave it out of the axis
        grids = [common_grid(curves)[1].mean(0) for curves in arms.values()]
        top = max(float(j.max()) for j in grids)
        floor = min(float(j[len(j) // 3 :].min()) for j in grids)
        room = max(top - floor, 1e-9)
        axes.set_ylim(floor - 0.35 * room, top + 0.1 * room)

    figure = panels(grid, title, draw, unit, "J = reward − β KL", crop)
    note = "bands: 95 % intervals over seeds, without the part shared by a seed" if bands else "means over seeds"
    figure.text(0.99, 0.005, note, ha="right", fontsize="x-small", color="0.35")
    return figure


def plot_efficiency(grid: Grid, path: Path, title: str, baseline: str, unit: str = "labels") -> None:
    """Plot mean J against labels on a logarithmic axis; an arrow says with how many labels the best arm does as well.

    Bands are Student's 95 % intervals over seeds. The arrow lies at the final J of the baseline, from the labels at
    which it is reached to those of the arm that needs fewest (`share_of_labels`); no arrow where none needs fewer.

    Args:
        grid: runs by setting and arm.
        path: the file to write, ``.png``.
        title: text above the figure.
        baseline: the arm that others are compared with.
        unit: quantity on the horizontal axis.
    """
    efficiency_figure(grid, title, baseline, unit).savefig(path, dpi=140)


def efficiency_figure(grid: Grid, title: str, baseline: str, unit: str = "labels") -> Figure:
    """Make the figure of `plot_efficiency` without saving it."""

    def draw(axes: Axes, curves: Sequence[Curve], style: Style) -> None:
        labels, j = common_grid(curves)
        # a logarithmic axis has no place for the start
        labels, j = labels[labels > 0], j[:, labels > 0]
        mean = j.mean(0)
        axes.plot(labels, mean, color=style.color, linestyle=style.line, linewidth=2.0, zorder=3)
        axes.plot(labels[-1:], mean[-1:], style.marker, color=style.color, markersize=5, zorder=4)
        if len(j) > 1:
            half = half_width(j)
            axes.fill_between(labels, mean - half, mean + half, color=style.color, alpha=0.15, linewidth=0, zorder=1)

    def finish(axes: Axes, arms: Mapping[str, Sequence[Curve]]) -> None:
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
        last = max(curve.last.labels for curve in chain.from_iterable(arms.values()))
        first = min(float(labels[labels > 0].min()) for labels, _ in map(common_grid, arms.values()))
        # a tick at every halving of the largest budget, so that shares can be read off
        ticks = [last / 2**k for k in range(20) if last / 2**k >= 0.99 * first]
        axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
        axes.set_xlim(0.93 * first, 1.12 * last)
        if baseline in arms:
            mark_saving(axes, arms, baseline)

    figure = panels(grid, title, draw, f"{unit}, logarithmic", "J = reward − β KL", finish)
    note = f"bands: 95 % intervals over seeds; dotted: final J of {baseline}"
    figure.text(0.99, 0.005, note, ha="right", fontsize="x-small", color="0.35")
    return figure


def mark_saving(axes: Axes, arms: Mapping[str, Sequence[Curve]], baseline: str) -> None:
    """Draw the arrow of `plot_efficiency` at the final J of the baseline, from its labels to those of the best arm."""
    from matplotlib.patheffects import withStroke

    other = Arm(*common_grid(arms[baseline]))
    found = [reach_of(Arm(*common_grid(curves)), other) for arm, curves in arms.items() if arm != baseline]
    j = float(other.j.mean(0)[-1]) if not found else found[0].j
    axes.axhline(j, color="0.4", linewidth=1.0, linestyle=":", zorder=2)
    best = min(found, key=lambda reach: reach.arm, default=None)
    if best is None or not 0 < best.arm < best.baseline:
        return
    axes.annotate(
        "",
        xy=(best.arm, j),
        xytext=(best.baseline, j),
        arrowprops={"arrowstyle": "-|>", "color": "black", "linewidth": 1.8, "shrinkA": 0, "shrinkB": 0},
        zorder=5,
    )
    # the middle of the arrow on a logarithmic axis
    middle = (best.arm * best.baseline) ** 0.5
    saving = f"{best.baseline / best.arm:.1f}".removesuffix(".0")
    axes.annotate(
        f"same J at 1/{saving} of the labels",
        xy=(middle, j),
        xytext=(0, 5),
        textcoords="offset points",
        ha="center",
        fontsize="small",
        fontweight="bold",
        # legible over curves without hiding them
        path_effects=[withStroke(linewidth=3.0, foreground="white")],
        zorder=6,
    )


def plot_alignment(grid: Grid, path: Path, title: str) -> None:
    """Plot one minus the cosine of expected gradients with that of J along training, on a logarithmic axis.

    Arguments as for `plot_frontiers`. Arms without a pair distribution in closed form are left out, as are those that
    are aligned exactly.
    """
    alignment_figure(grid, title).savefig(path, dpi=140)


def alignment_figure(grid: Grid, title: str) -> Figure:
    """Make the figure of `plot_alignment` without saving it."""
    kept = restricted(grid, misaligned)

    def draw(axes: Axes, curves: Sequence[Curve], style: Style) -> None:
        labels = np.array([point.labels for point in curves[0].points], dtype=float)
        # [runs, points]
        cosines = np.array([[point.population_cosine for point in curve.points] for curve in curves], dtype=float)
        axes.plot(labels, 1 - np.median(cosines, 0), color=style.color, linestyle=style.line, linewidth=1.6)
        axes.set_yscale("log")

    return panels(kept, title, draw, "labels", "1 − cosine with ∇J, median over seeds", places=places_of(grid))


def restricted(grid: Grid, keep: Callable[[Sequence[Curve]], bool]) -> Grid:
    """The part of a grid whose arms fulfil a condition; settings without such an arm are left out."""
    result: dict[str, Mapping[str, Sequence[Curve]]] = {}
    for setting, arms in grid.items():
        kept = {arm: curves for arm, curves in arms.items() if keep(curves)}
        if kept:
            result[setting] = kept
    return result


def misaligned(curves: Sequence[Curve]) -> bool:
    """Whether the expected gradients of an arm are known, and are not all that of J exactly."""
    points = chain.from_iterable(curve.points for curve in curves)
    cosines = [point.population_cosine for point in points]
    return None not in cosines and any(cosine is not None and cosine < 1 - 1e-9 for cosine in cosines)


def plot_agreement(grid: Grid, path: Path, title: str) -> None:
    """Plot how often the training reward orders the policy's answers as the held-out one does, along the runs.

    Arguments as for `plot_frontiers`; arms that do not know it are left out.
    """
    agreement_figure(grid, title).savefig(path, dpi=140)


def agreement_figure(grid: Grid, title: str) -> Figure:
    """Make the figure of `plot_agreement` without saving it."""
    kept = restricted(grid, lambda curves: all(curve.last.agreement is not None for curve in curves))

    def draw(axes: Axes, curves: Sequence[Curve], style: Style) -> None:
        labels, share = mean_path(curves, "agreement")
        values = [[point.agreement for point in curve.points] for curve in curves]
        axes.axhline(50.0, color="0.6", linewidth=1.0, linestyle=":", zorder=0)
        axes.plot(labels, 100 * share, color=style.color, linestyle=style.line, linewidth=1.6, marker="o", markersize=3)
        # runs that were evaluated at other labels form no array, and get no band
        if len(values) > 1 and len({len(row) for row in values}) == 1 and len(values[0]) == len(labels):
            spread = 100 * np.array(values, dtype=float)
            half = half_width(spread)
            mean = spread.mean(0)
            axes.fill_between(labels, mean - half, mean + half, color=style.color, alpha=0.1, linewidth=0, zorder=1)

    y_label = "pairs ranked as by the oracle [%]"
    return panels(kept, title, draw, "responses learned from", y_label, places=places_of(grid))


def plot_claims(claims: Sequence[JudgedClaim], path: Path, title: str) -> None:
    """Plot each claim's difference in its first metric, with its 95 % interval; a color per verdict.

    Args:
        claims: the claims as they were judged, at least one.
        path: the file to write, ``.png``.
        title: text above the figure.
    """
    claims_figure(claims, title).savefig(path, dpi=140)


def claims_figure(claims: Sequence[JudgedClaim], title: str) -> Figure:
    """Make the figure of `plot_claims` without saving it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    metrics = list(dict.fromkeys(claim.claim.metrics[0] for claim in claims))
    groups = [[claim for claim in claims if claim.claim.metrics[0] == metric] for metric in metrics]
    heights = [len(group) + 1.2 for group in groups]
    figure = Figure(figsize=(9.5, 0.34 * sum(heights) + 1.3), layout="constrained")
    FigureCanvasAgg(figure)
    every = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, metric, group in zip(every, metrics, groups, strict=True):
        for row, claim in enumerate(group):
            found, color = claim.differences[metric], VERDICT_COLORS.get(claim.verdict, "0.6")
            # NaN, unequal to itself, with a single seed: there is no interval to plot
            if found.low == found.low:
                axes.plot([found.low, found.high], [row, row], color=color, linewidth=2.2, solid_capstyle="butt")
            axes.plot([found.value], [row], "o", color=color, markersize=6)
        names = [f"{c.claim.setting}: {c.claim.text}" for c in group]
        axes.set_yticks(range(len(group)), [textwrap.fill(name, 62) for name in names], fontsize="small")
        axes.set_ylim(len(group) - 0.4, -0.6)
        axes.axvline(0.0, color="0.5", linewidth=1.0, zorder=0)
        axes.set_xlabel(
            f"Δ {metric}, as claimed is right of zero" if metric != "kl" else "Δ kl, as claimed is left of zero"
        )
        axes.grid(axis="x", color="0.93", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    shown = [name for name in VERDICT_COLORS if any(claim.verdict == name for claim in claims)]
    handles = [Line2D([], [], color=VERDICT_COLORS[name], linewidth=2.5, marker="o", label=name) for name in shown]
    figure.legend(handles=handles, loc="outside lower right", ncols=len(handles), frameon=False, fontsize="small")
    figure.suptitle(title, x=0.01, ha="left", fontsize="large")
    return figure


def panels(
    grid: Grid,
    title: str,
    draw: Callable[[Axes, Sequence[Curve], Style], None],
    x_label: str,
    y_label: str,
    finish: Callable[[Axes, Mapping[str, Sequence[Curve]]], None] | None = None,
    places: Mapping[str, int] | None = None,
) -> Figure:
    """A panel per setting, a style per arm, one legend below all; many arms, not all in each panel, get legends there.

    Args:
        grid: runs by setting and arm.
        title: text above the figure.
        draw: plots the runs of an arm.
        x_label: quantity on the horizontal axes, with units.
        y_label: quantity on the vertical axes.
        finish: sets the limits of a panel.
        places: number of each arm, which names its style; default: their order in ``grid``.
    """
    # imported here: matplotlib takes a second to load, and few runs make figures
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = min(len(grid), PANELS_PER_ROW)
    rows = -(-len(grid) // columns)
    arms = list(places_of(grid))
    shared = len(arms) <= len(COLORS) or all(len(found) == len(arms) for found in grid.values())
    legend_rows = -(-len(arms) // (2 * columns)) if shared else 0

    def styled(arm: str, known: Mapping[str, int]) -> tuple[Style, Line2D]:
        style = style_of(known[arm])
        return style, Line2D([], [], color=style.color, linestyle=style.line, linewidth=2.2, label=arm)

    height = 3.3 * rows + 0.9 + 0.22 * legend_rows
    figure = Figure(figsize=(max(4.3 * columns, 6.0), height), layout="constrained")
    # room for the note and the legend at the bottom, for the title at the top
    engine: Any = figure.get_layout_engine()
    low = (0.3 + 0.22 * legend_rows) / height
    engine.set(rect=(0.0, low, 1.0, 1.0 - low - 0.35 / height), hspace=0.06, wspace=0.04)
    FigureCanvasAgg(figure)
    every = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (setting, found) in zip(every, grid.items(), strict=False):
        known = (places or places_of(grid)) if shared else places_of({setting: found})
        for arm, curves in found.items():
            draw(axes, curves, styled(arm, known)[0])
        if not shared:
            own = [styled(arm, known)[1] for arm in found]
            axes.legend(handles=own, fontsize="x-small", frameon=False, loc="upper left", bbox_to_anchor=(0.0, 1.0))
        if finish is not None:
            finish(axes, found)
        if not shared:
            # room for the legend above the curves
            low_end, high_end = axes.get_ylim()
            axes.set_ylim(low_end, high_end + (0.08 + 0.09 * len(found)) * (high_end - low_end))
        axes.set_title(setting, fontsize="medium", loc="left")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(color="0.93", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in every[len(grid) :]:
        axes.set_visible(False)
    if shared:
        figure.legend(
            handles=[styled(arm, places or places_of(grid))[1] for arm in arms],
            loc="lower center",
            bbox_to_anchor=(0.5, 0.18 / height),
            ncols=min(len(arms), 2 * columns),
            frameon=False,
            fontsize="small",
        )
    figure.text(0.01, 1 - 0.08 / height, title, ha="left", va="top", fontsize="large")
    return figure


def places_of(grid: Grid) -> dict[str, int]:
    """Number of each arm, in the order in which settings name them."""
    arms = dict.fromkeys(chain.from_iterable(grid.values()))
    return {arm: place for place, arm in enumerate(arms)}


def seed_effects(arms: Mapping[str, Sequence[Curve]]) -> dict[int, float]:
    """How much higher than others the runs of a seed end, mean over arms; zero on average, and with a single arm."""
    if len(arms) == 1:
        # the runs of a single arm share nothing with others: all that tells them apart is its own noise
        return {curve.seed: 0.0 for curve in chain.from_iterable(arms.values())}
    ends: dict[int, list[float]] = {}
    for curves in arms.values():
        for curve in curves:
            ends.setdefault(curve.seed, []).append(curve.last.j)
    means = {seed: sum(values) / len(values) for seed, values in ends.items()}
    # effect of seed s: mean over arms of J_(arm, s), minus its mean over seeds
    overall = sum(means.values()) / len(means)
    return {seed: mean - overall for seed, mean in means.items()}


def shared_noise(arms: int) -> float:
    """Factor by which intervals are too narrow once the mean over arms is taken out of each seed; 1 for one arm."""
    # the arm is 1 / a of the mean taken out, which leaves (a - 1) / a of the variance of its own noise
    return (arms / (arms - 1)) ** 0.5 if arms > 1 else 1.0


def half_width(values: Array) -> Array:
    """Half of Student's 95 % interval of the mean over runs; values have shape [runs, points], two runs at least."""
    # t_(0.975, n - 1) s / sqrt(n)
    half: Array = student_quantile(len(values) - 1) * values.std(0, ddof=1) / len(values) ** 0.5
    return half


def mean_path(curves: Sequence[Curve], figure: str) -> tuple[Array, Array]:
    """Labels of the evaluations of an arm's runs, and the mean of a metric at them; see `common_grid`."""
    labels, values = common_grid(curves, figure)
    return labels, values.mean(0)
