"""Figures of a run, made without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_rlhf.evaluation.frontier import FrontierPoint


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_frontier(points: Sequence[FrontierPoint], path: Path, title: str = "Reward-KL frontier") -> None:
    """Plot the path of a run through the reward-KL plane, and save it as a PNG.

    Up is better, left is closer to the reference. Points are colored by optimizer step, bars are one standard error,
    and the first and last points are marked and put into words below the axes.

    Args:
        points: the points in the order of the run, at least one.
        path: the file to write, ``.png``.
        title: text above the figure.

    Raises:
        ValueError: if there is no point.
    """
    figure = frontier_figure(points, title)
    figure.savefig(path, dpi=160)


def frontier_figure(points: Sequence[FrontierPoint], title: str = "Reward-KL frontier") -> Figure:
    """Make the figure of `plot_frontier` without saving it."""
    if not points:
        raise ValueError(
            "a frontier needs at least one point; run a validation that decodes and scores held-out prompts"
        )
    # imported here: matplotlib takes a second to load, and few runs make figures
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # not pyplot, which keeps every figure alive and may need a display
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    kls, rewards = [point.kl for point in points], [point.reward for point in points]
    axes.plot(kls, rewards, color="0.75", linewidth=1.2, zorder=1)
    axes.errorbar(
        kls,
        rewards,
        xerr=[point.kl_stderr or 0.0 for point in points],
        yerr=[point.reward_stderr or 0.0 for point in points],
        fmt="none",
        ecolor="0.6",
        elinewidth=1.0,
        capsize=2.0,
        zorder=2,
    )
    steps = [point.step for point in points]
    dots = axes.scatter(
        kls,
        rewards,
        c=steps,
        cmap="viridis",
        vmin=0,
        # at least 1: a run with step 0 alone would have an empty color range
        vmax=max(*steps, 1),
        s=42,
        edgecolor="white",
        linewidth=0.7,
        zorder=3,
    )
    figure.colorbar(dots, ax=axes, label="optimizer step", pad=0.02, ticks=MaxNLocator(integer=True))
    # The ends are told apart by shape and named outside the axes, where no path can run through their names.
    # one point alone is marked as the start
    ends = [("start", "s", points[0]), ("end", "*", points[-1])][: len(points)]
    for name, marker, point in ends:
        axes.plot(
            point.kl,
            point.reward,
            marker=marker,
            markersize=15 if marker == "*" else 9,
            color="tab:red",
            markeredgecolor="white",
            linestyle="none",
            label=f"{name}: {describe(point)}",
            zorder=4,
        )
    figure.legend(loc="outside lower left", frameon=False, fontsize="small")
    axes.set_xlabel("KL(policy ‖ reference) [nats per sequence]")
    axes.set_ylabel("mean held-out reward")
    axes.set_title(title, loc="left")
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def describe(point: FrontierPoint) -> str:
    """Put a point into words."""
    error = "" if point.reward_stderr is None else f" ± {point.reward_stderr:.2g}"
    spent = f"step {point.step}, {point.labels} labels"
    return f"{spent}: reward {point.reward:.3g}{error}, KL {point.kl:.3g}, J {point.j:.3g}"
