"""Figures as JSON, as Markdown and in words."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path


Figures = Mapping[str, float]


def write_whole(path: Path, text: str) -> None:
    """Write a text file that is there in full or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def to_json(report: Mapping[str, object]) -> str:
    """Write a report as JSON; what is not known, NaN, becomes null."""
    return json.dumps(_plain(report), indent=2, ensure_ascii=False) + "\n"


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def percent(figures: Figures, name: str) -> str:
    """A share in per cent, with its interval if there is one: ``62.5 % [51.0, 72.8]``."""
    value, low, high = (figures.get(key, math.nan) for key in (name, f"{name}_low", f"{name}_high"))
    if math.isnan(value):
        return "not known"
    interval = "" if math.isnan(low) else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{100 * value:.1f} %{interval}"


def p_value(p: float) -> str:
    """A p-value: ``p = 0.031``, or ``p < 0.001``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def counted(counts: Mapping[str, int]) -> str:
    """Counts in words: ``3 truncated, 1 timeout``."""
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def markdown_table(rows: Sequence[tuple[str, str, str]]) -> str:
    """A table of figure, value and meaning; rows whose value is not known are left out."""
    lines = ["| figure | value | meaning |", "|---|---|---|"]
    lines += [f"| {name} | {value} | {meaning} |" for name, value, meaning in rows if value != "not known"]
    return "\n".join(lines) + "\n"


def judge_rows(figures: Figures) -> list[tuple[str, str, str]]:
    """The figures of `JudgeMetrics`, put into words; those about nothing are left out."""
    rows = []
    if figures["human_pairs"]:
        pairs = f"{figures['human_pairs']:.0f} pairs"
        rows += [
            ("alignment", percent(figures, "alignment"), f"agrees with the recorded label, ties one half; {pairs}"),
            (
                "in one order only",
                percent(figures, "one_order_alignment"),
                "the same without the other order, either one",
            ),
            ("the longer response", percent(figures, "longer_alignment"), "what preferring the longer one would get"),
            ("ECE", f"{figures['ece']:.3f}", "expected calibration error, ten bins of the confidence; 0 is best"),
            ("Brier score", f"{figures['brier']:.3f}", "mean squared error of the probability; a coin has 0.25"),
        ]
    rows.append(("prefers the longer", percent(figures, "prefers_longer"), "of the labelled pairs, ties one half"))
    if figures["position_pairs"]:
        rows.append(
            (
                "same position",
                percent(figures, "same_position"),
                f"prefers one position in both orders; {figures['position_pairs']:.0f} pairs",
            )
        )
    if figures["same_position"] > 0:
        first = f"{percent(figures, 'first_position')}, {p_value(figures['first_position_p'])}"
        rows.append(("of those, the first", first, "two-sided binomial test against a fair coin"))
    if figures["mass_pairs"]:
        low = f"lowest {figures['mass_min']:.3g}, {percent(figures, 'mass_low')} of pairs below 0.05"
        rows.append(
            ("label mass", f"{figures['mass']:.3f}", f"probability of any label, smaller of both orders; {low}")
        )
    return rows


def judge_lines(figures: Figures) -> list[str]:
    """The figures of `JudgeMetrics` as a few lines for the terminal."""
    lines = []
    if figures["human_pairs"]:
        lines.append(
            f"alignment with the recorded labels {percent(figures, 'alignment')} on "
            f"{figures['human_pairs']:.0f} pairs; the longer response {percent(figures, 'longer_alignment')}; "
            f"ECE {figures['ece']:.3f}, Brier {figures['brier']:.3f}"
        )
    if figures["position_pairs"]:
        first = ""
        if figures["same_position"] > 0:
            first = (
                f", of those the first {percent(figures, 'first_position')} ({p_value(figures['first_position_p'])})"
            )
        lines.append(f"same position in both orders {percent(figures, 'same_position')}{first}")
    if figures["mass_pairs"]:
        lines.append(f"label mass {figures['mass']:.3f}, lowest {figures['mass_min']:.3g}")
    return lines
