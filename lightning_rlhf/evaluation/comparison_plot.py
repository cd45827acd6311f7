"""Plot of the shares and scores of an evaluation, made without a display."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple


if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Bar(NamedTuple):
    """A value with its interval.

    Args:
        name: label of the value.
        value: the value.
        low: lower bound of its interval of 95 %; NaN if not known.
        high: upper bound.
    """

    name: str
    value: float
    low: float = math.nan
    high: float = math.nan


def plot_evaluation(rates: Sequence[Bar], scores: Sequence[Bar], path: Path, title: str) -> None:
    """Plot shares on an axis from 0 to 100 %, and scores on one of their own below, and save them as a PNG.

    Args:
        rates: shares in [0, 1]; those that are NaN are left out.
        scores: mean scores, in the unit of the reward.
        path: the file to write, ``.png``.
        title: text above the figure.
    """
    evaluation_figure(rates, scores, title).savefig(path, dpi=160)


def evaluation_figure(rates: Sequence[Bar], scores: Sequence[Bar], title: str) -> Figure:
    """Make the figure of `plot_evaluation` without saving it."""
    # imported here: matplotlib takes a second to load, and few runs make figures
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rates = [Bar(bar.name, *(100 * number for number in bar[1:])) for bar in rates if not math.isnan(bar.value)]
    parts = [part for part in (rates, list(scores)) if part]
    heights = [0.7 + 0.42 * len(part) for part in parts]
    # not pyplot, which keeps every figure alive and may need a display
    figure = Figure(figsize=(7.2, 1.0 + sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(max(len(parts), 1), 1, squeeze=False, height_ratios=heights or [1])[:, 0]
    # strict=False: a figure without parts still has one empty panel
    for axes, part in zip(panels, parts, strict=False):
        _draw(axes, part)
        if part is rates:
            # room for the numbers at the right
            axes.set_xlim(0, 128)
            axes.set_xticks(range(0, 101, 25))
            axes.axvline(50, color="0.6", linewidth=1.0, linestyle="--", zorder=0)
            axes.set_xlabel("share [%], bars are 95 % intervals")
        else:
            left, right = axes.get_xlim()
            axes.set_xlim(left, right + 0.35 * (right - left))
            axes.set_xlabel("mean score [unit of the reward], bars are 95 % intervals")
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium")
    return figure


def _draw(axes: Any, bars: Sequence[Bar]) -> None:
    for place, bar in enumerate(bars):
        known = not (math.isnan(bar.low) or math.isnan(bar.high))
        # matplotlib refuses negative error bars, which rounding could produce
        error = [[max(bar.value - bar.low, 0.0)], [max(bar.high - bar.value, 0.0)]] if known else None
        axes.errorbar(bar.value, place, xerr=error, fmt="o", color="tab:purple", ecolor="0.55", capsize=3, markersize=6)
        interval = f" [{bar.low:.3g}, {bar.high:.3g}]" if known else ""
        axes.annotate(
            f"{bar.value:.3g}{interval}",
            (1.0, place),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize="small",
            # no grid line runs through a number
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )
    axes.set_yticks(range(len(bars)), [bar.name for bar in bars])
    # upside down, so that the first bar is at the top
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.grid(axis="x", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
