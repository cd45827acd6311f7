"""The report of a comparison, in Markdown and as plain data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from lightning_rlhf.experiments.curves import Curve
from lightning_rlhf.experiments.statistics import Interval, label_share, mean_cosines, mean_interval, paired


FIGURES = (("reward", "reward ↑"), ("kl", "KL ↓"), ("j", "J ↑"))
BETTER = {"reward": 1.0, "kl": -1.0, "j": 1.0, "agreement": 1.0}
VERDICTS = ("reproduced", "partly", "not shown", "contradicted")
SAVING = 0.6
"""Share of Vanilla's labels that PILAF claims to need at most: it saves over 40 %."""

Grid = Mapping[str, Mapping[str, Sequence[Curve]]]
"""Runs by setting and arm."""


@dataclass(frozen=True)
class Verdict:
    """The verdict on a claim.

    Args:
        claim: the claim in words.
        setting: where.
        verdict: ``reproduced``, ``partly``, ``not shown`` (within error), ``contradicted``, or ``not measured``.
        figures: the numbers behind it, in words.
    """

    claim: str
    setting: str
    verdict: str
    figures: str


def grid_of(curves: Sequence[Curve]) -> dict[str, dict[str, list[Curve]]]:
    """Sort runs by setting and arm, in the order they come in."""
    grid: dict[str, dict[str, list[Curve]]] = {}
    for curve in curves:
        grid.setdefault(curve.setting, {}).setdefault(curve.arm, []).append(curve)
    return grid


def figures_of(grid: Grid, baseline: str) -> dict[str, Any]:
    """All numbers of the tables as plain data: by setting and arm; intervals are [value, low, high]."""
    report: dict[str, Any] = {}
    for setting, arms in grid.items():
        report[setting] = {}
        for arm, curves in arms.items():
            found: dict[str, Any] = {"seeds": len(curves), "labels": curves[0].last.labels}
            for name, _ in FIGURES:
                found[name] = mean_interval([getattr(c.last, name) for c in curves])
                if baseline in arms and arm != baseline:
                    found[f"{name}_difference"] = paired(curves, arms[baseline], name)
            for name, gain in (("label_share", 1.0), ("label_share_half", 0.5)):
                found[name] = Interval(1.0, 1.0, 1.0) if arm == baseline else Interval(math.nan)
                if baseline in arms and arm != baseline:
                    found[name] = label_share(curves, arms[baseline], gain=gain)
            agreements = [c.last.agreement for c in curves if c.last.agreement is not None]
            if agreements:
                found["agreement"] = mean_interval(agreements)
            calls = [curve.calls for curve in curves if curve.calls is not None]
            if calls:
                found["calls"] = sum(calls) / len(calls)
            for name in ("cosine", "population_cosine"):
                cosines = list(mean_cosines(curves, name).values())
                if cosines:
                    found[name] = mean_interval(cosines)
            spreads = [c.last.spread for c in curves if c.last.spread is not None]
            if spreads:
                found["spread"] = mean_interval(spreads)
            passes = [curve.passes for curve in curves if curve.passes is not None]
            found["passes"] = sum(passes) / len(passes) if passes else math.nan
            found["planned_passes"] = curves[0].planned_passes
            found["annotations"] = curves[0].annotations
            seconds = [curve.seconds for curve in curves if curve.seconds is not None]
            found["seconds"] = sum(seconds) / len(seconds) if seconds else math.nan
            report[setting][arm] = found
    return report


def verdicts(grid: Grid, claimant: str, baseline: str, overfitted: Sequence[str] = ()) -> list[Verdict]:
    """The claims of PILAF (arXiv 2502.04270), held against the runs.

    A difference counts if its 95 % interval leaves out zero. ``reproduced`` needs all metrics as claimed, ``partly``
    one of them and J not against it, ``contradicted`` J against it; else nothing is shown.

    Args:
        grid: runs by setting and arm.
        claimant: the arm that claims to be better, e.g. ``PILAF``.
        baseline: the arm whose labels it claims to save.
        overfitted: settings that start from an overfitted policy.
    """
    found = []
    for setting, arms in grid.items():
        if claimant not in arms:
            continue
        rivals = [arm for arm in arms if arm == baseline or arm.startswith(("Best-of", "Hybrid"))]
        for rival in rivals:
            differences = {name: paired(arms[claimant], arms[rival], name) for name, _ in FIGURES}
            figures = ", ".join(f"Δ{name} {signed(differences[name])}" for name, _ in FIGURES)
            what = "from an overfitted start, " if setting in overfitted else ""
            claim = f"{what}{claimant} over {rival} in reward, KL and J"
            found.append(Verdict(claim, setting, judged(differences), figures))
        if baseline in arms and setting not in overfitted:
            share = label_share(arms[claimant], arms[baseline])
            found.append(
                Verdict(
                    f"{claimant} reaches {baseline}'s final J with 40 % fewer labels",
                    setting,
                    saving_verdict(share),
                    f"share of the labels {shares(share)}",
                )
            )
        for name, what in (("population_cosine", "expected gradient"), ("cosine", "batch gradient")):
            if baseline in arms and (ours := mean_cosines(arms[claimant], name)):
                theirs = mean_cosines(arms[baseline], name)
                difference = mean_interval([value - theirs[seed] for seed, value in ours.items() if seed in theirs])
                verdict = "reproduced" if difference.low > 0 else "contradicted" if difference.high < 0 else "not shown"
                # one seed has no interval
                verdict = "not measured" if math.isnan(difference.low) else verdict
                means = [sum(cosines.values()) / len(cosines) for cosines in (ours, theirs)]
                figures = f"cosine {means[0]:.3f} against {means[1]:.3f}, Δ {signed(difference, 4)}"
                found.append(
                    Verdict(f"{claimant}'s {what} is nearer to ∇J than {baseline}'s", setting, verdict, figures)
                )
    return found


def claims_table(found: Sequence[Verdict]) -> str:
    """Each claim once, with the settings by verdict."""
    claims = dict.fromkeys(verdict.claim for verdict in found)
    rows = []
    for claim in claims:
        own = [verdict for verdict in found if verdict.claim == claim]
        cells = [", ".join(v.setting for v in own if v.verdict == kind) or "–" for kind in VERDICTS]
        rows.append([claim, *cells])
    return rows_table(["claim", *VERDICTS], rows)


def judged(differences: Mapping[str, Interval], decisive: str | None = None) -> str:
    """The verdict on paired differences.

    Args:
        differences: differences by metric, at least one.
        decisive: the metric that alone can contradict a claim; default: the last one.
    """
    if any(math.isnan(difference.low) for difference in differences.values()):
        return "not measured"
    signs = {}
    for name, difference in differences.items():
        better = BETTER[name]
        # for KL lower is better: the difference changes its sign, and its bounds change places
        low, high = sorted((better * difference.low, better * difference.high))
        signs[name] = 1 if low > 0 else -1 if high < 0 else 0
    if all(sign == 1 for sign in signs.values()):
        return "reproduced"
    if signs[decisive or list(signs)[-1]] == -1:
        return "contradicted"
    return "partly" if any(sign == 1 for sign in signs.values()) else "not shown"


def saving_verdict(share: Interval) -> str:
    """The verdict on a share of labels: ``reproduced`` if it is at most `SAVING` and its interval is below 1.

    ``partly`` if the interval alone is, ``contradicted`` if it is above 1, ``not shown`` else, ``not measured`` where
    the baseline gains nothing or there is a single seed.
    """
    if math.isnan(share.value) or math.isnan(share.low):
        return "not measured"
    if share.low > 1:
        return "contradicted"
    if share.high >= 1:
        return "not shown"
    return "reproduced" if share.value <= SAVING else "partly"


def markdown(
    figures: Mapping[str, Mapping[str, Mapping[str, Any]]],
    claims: Sequence[Verdict],
    baseline: str,
    regime: Callable[[str], str],
) -> str:
    """Tables of every setting, the verdicts and the costs.

    Args:
        figures: result of `figures_of`.
        claims: result of `verdicts`.
        baseline: the arm that others are compared with.
        regime: description of a setting.
    """
    parts = []
    for setting, arms in figures.items():
        seeds = sorted({found["seeds"] for found in arms.values()})
        counted = f"{seeds[0]} seeds" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
        most = max(found["labels"] for found in arms.values())
        labels = "" if any("calls" in found for found in arms.values()) else f"{most} labels per run, "
        head = f"#### {setting}\n\n{regime(setting)}; {labels}{counted}."
        parts.append(f"{head}\n\n{table(arms, baseline)}")
    if claims:
        parts.append("#### Claims\n\n" + claims_table(claims))
        rows = [[v.claim, v.setting, v.verdict, v.figures] for v in claims]
        parts.append("#### Verdicts\n\n" + rows_table(["claim", "setting", "verdict", "values"], rows))
    if not any("calls" in found for found in chain.from_iterable(arms.values() for arms in figures.values())):
        parts.append("#### Costs\n\n" + cost_table(figures))
    return "\n\n".join(parts) + "\n"


def table(arms: Mapping[str, Mapping[str, Any]], baseline: str) -> str:
    """The layout of Tables 2 and 3, with paired differences and label efficiency."""
    cosines = any("cosine" in found for found in arms.values())
    asked, ranked = any("calls" in found for found in arms.values()), any("agreement" in f for f in arms.values())
    header = ["arm", *(["judge calls"] if asked else []), *(title for _, title in FIGURES)]
    header += ["ΔJ to " + baseline, "labels to reach its J"] if baseline in arms else []
    header += ["reward ranks as the oracle"] if ranked else []
    header += ["cosine with ∇J, batch / expected", "std of r_θ"] if cosines else []
    rows = []
    # BETTER turns the sign of KL, so that the largest is the best
    best = {name: max(arms, key=lambda arm: BETTER[name] * arms[arm][name].value) for name, _ in FIGURES}
    for arm, found in arms.items():
        row = [arm]
        row += [f"{found['calls']:.0f}" if "calls" in found else "–"] if asked else []
        row += [f"**{plus_minus(found[n])}**" if best[n] == arm else plus_minus(found[n]) for n, _ in FIGURES]
        if baseline in arms:
            row.append(signed(found["j_difference"]) if "j_difference" in found else "–")
            row.append("100 %" if arm == baseline else shares(found["label_share"]))
        row += [plus_minus(found["agreement"]) if "agreement" in found else "–"] if ranked else []
        if cosines:
            expected = f"{found['population_cosine'].value:.3f}" if "population_cosine" in found else "–"
            row += [f"{found['cosine'].value:.3f} / {expected}" if "cosine" in found else "–"]
            row += [f"{found['spread'].value:.2f}" if "spread" in found else "–"]
        rows.append(row)
    return rows_table(header, rows)


def cost_table(figures: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Passes and annotations per pair, as planned (Table 1 of PILAF) and as counted over all settings."""
    arms = list(dict.fromkeys(chain.from_iterable(figures.values())))
    rows = []
    for arm in arms:
        found = [setting[arm] for setting in figures.values() if arm in setting]
        # NaN in a setting whose runs do not count them
        passes = [f["passes"] for f in found if not math.isnan(f["passes"])]
        seconds = [f["seconds"] for f in found if not math.isnan(f["seconds"])]
        rows.append(
            [
                arm,
                f"{found[0]['planned_passes']:g}",
                f"{sum(passes) / len(passes):.2f}" if passes else "–",
                f"{found[0]['annotations']:g}",
                f"{sum(seconds) / len(seconds):.0f} s" if seconds else "–",
            ]
        )
    return rows_table(["arm", "passes per pair, planned", "counted", "annotations per pair", "time per run"], rows)


def rows_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plus_minus(interval: Interval, digits: int = 3) -> str:
    """A mean and half its interval: ``1.234 ± 0.056``."""
    if math.isnan(interval.low):
        return f"{interval.value:.{digits}f}"
    return f"{interval.value:.{digits}f} ± {interval.half:.{digits}f}"


def signed(interval: Interval, digits: int = 3) -> str:
    """A difference and its interval: ``+0.123 [+0.045, +0.201]``."""
    if math.isnan(interval.low):
        return f"{interval.value:+.{digits}f}"
    return f"{interval.value:+.{digits}f} [{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"


def shares(interval: Interval) -> str:
    """A share of labels: ``52 % [40, 71]``; where it is infinite ``not reached``, and ``never`` as a bound."""

    def words(value: float) -> str:
        return "never" if math.isinf(value) else f"{100 * value:.0f}"

    if math.isnan(interval.value):
        return "–"
    value = "not reached" if math.isinf(interval.value) else f"{100 * interval.value:.0f} %"
    return value if math.isnan(interval.low) else f"{value} [{words(interval.low)}, {words(interval.high)}]"
