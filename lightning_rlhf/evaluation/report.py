"""Metrics as JSON, as Markdown and in words."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path


Metrics = Mapping[str, float]


def write_whole(path: Path, text: str) -> None:
    """Write a text file that is there in full or not at all."""
    # the pid keeps processes that write the same file apart
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def to_json(report: Mapping[str, object]) -> str:
    """Write a report as JSON; unknown values, NaN, become null."""
    return json.dumps(_plain(report), indent=2, ensure_ascii=False) + "\n"


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    # JSON has no NaN
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def percent(metrics: Metrics, name: str) -> str:
    """A share in per cent, with its interval if there is one: ``62.5 % [51.0, 72.8]``."""
    value, low, high = (metrics.get(key, math.nan) for key in (name, f"{name}_low", f"{name}_high"))
    # no pairs to take a share of
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
    """A table of metric, value and meaning; rows whose value is not known are left out."""
    lines = ["| metric | value | meaning |", "|---|---|---|"]
    lines += [f"| {name} | {value} | {meaning} |" for name, value, meaning in rows if value != "not known"]
    return "\n".join(lines) + "\n"


def judge_rows(metrics: Metrics) -> list[tuple[str, str, str]]:
    """The metrics of `JudgeMetrics` in words; those without pairs are left out."""
    rows = []
    # without human labels there is no agreement to report
    if metrics["human_pairs"]:
        pairs = f"{metrics['human_pairs']:.0f} pairs"
        rows += [
            ("alignment", percent(metrics, "alignment"), f"agrees with the recorded label, ties one half; {pairs}"),
            (
                "in one order only",
                percent(metrics, "one_order_alignment"),
                "the same without the other order, either one",
            ),
            (
                "the longer response",
                percent(metrics, "longer_alignment"),
                "alignment of always preferring the longer one",
            ),
            ("ECE", f"{metrics['ece']:.3f}", "expected calibration error, ten bins of the confidence; 0 is best"),
            ("Brier score", f"{metrics['brier']:.3f}", "mean squared error of the probability; a coin has 0.25"),
        ]
    rows.append(("prefers the longer", percent(metrics, "prefers_longer"), "of the labeled pairs, ties one half"))
    # judges without log-probabilities of both orders have none
    if metrics["position_pairs"]:
        rows.append(
            (
                "same position",
                percent(metrics, "same_position"),
                f"prefers one position in both orders; {metrics['position_pairs']:.0f} pairs",
            )
        )
    # a binomial test needs a case
    if metrics["same_position"] > 0:
        first = f"{percent(metrics, 'first_position')}, {p_value(metrics['first_position_p'])}"
        rows.append(("of those, the first", first, "two-sided binomial test against a fair coin"))
    if metrics["mass_pairs"]:
        low = f"lowest {metrics['mass_min']:.3g}, {percent(metrics, 'mass_low')} of pairs below 0.05"
        rows.append(
            ("label mass", f"{metrics['mass']:.3f}", f"probability of any label, smaller of both orders; {low}")
        )
    return rows


def judge_lines(metrics: Metrics) -> list[str]:
    """The metrics of `JudgeMetrics` as a few lines for the terminal."""
    lines = []
    if metrics["human_pairs"]:
        lines.append(
            f"alignment with the recorded labels {percent(metrics, 'alignment')} on "
            f"{metrics['human_pairs']:.0f} pairs; the longer response {percent(metrics, 'longer_alignment')}; "
            f"ECE {metrics['ece']:.3f}, Brier {metrics['brier']:.3f}"
        )
    if metrics["position_pairs"]:
        first = ""
        if metrics["same_position"] > 0:
            first = (
                f", of those the first {percent(metrics, 'first_position')} ({p_value(metrics['first_position_p'])})"
            )
        lines.append(f"same position in both orders {percent(metrics, 'same_position')}{first}")
    if metrics["mass_pairs"]:
        lines.append(f"label mass {metrics['mass']:.3f}, lowest {metrics['mass_min']:.3g}")
    return lines
