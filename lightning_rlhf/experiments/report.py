"""The report of a comparison, in Markdown and as plain data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from lightning_rlhf.experiments.curves import Curve
from lightning_rlhf.experiments.statistics import (
    Interval,
    j_at,
    label_share,
    mean_cosines,
    mean_interval,
    paired,
    paired_at,
)


FIGURES = (("reward", "reward ↑"), ("kl", "KL ↓"), ("j", "J ↑"))
BETTER = {"reward": 1.0, "kl": -1.0, "j": 1.0, "agreement": 1.0}
VERDICTS = ("reproduced", "partly", "not shown", "contradicted")
SAVING = 0.6
"""Share of Vanilla's labels that PILAF claims to need at most: it saves over 40 %."""

Grid = Mapping[str, Mapping[str, Sequence[Curve]]]
"""Runs by setting and arm."""

ArmFigures = Mapping[str, Any]
"""All numbers of an arm in one setting, by name."""


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


def figures_of(grid: Grid, baseline: str, at_labels: Sequence[int] = ()) -> dict[str, Any]:
    """All numbers of the tables as plain data: by setting and arm; intervals are [value, low, high].

    Args:
        grid: runs by setting and arm.
        baseline: the arm that others are compared with.
        at_labels: numbers of labels at which J of each arm is compared with J of the baseline at its end.
    """
    report: dict[str, Any] = {}
    for setting, arms in grid.items():
        report[setting] = {}
        for arm, curves in arms.items():
            found: dict[str, Any] = {"seeds": len(curves), "labels": max(c.last.labels for c in curves)}
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
            if at_labels:
                found["j_at"] = {str(n): mean_interval(j_at(curves, n)) for n in at_labels}
            if at_labels and baseline in arms:
                found["j_at_difference"] = {str(n): paired_at(curves, arms[baseline], n) for n in at_labels}
            report[setting][arm] = {**found, **costs_of(curves)}
    return report


def costs_of(curves: Sequence[Curve]) -> dict[str, float]:
    """Costs of an arm, means over its runs; NaN where they were not counted."""

    def mean(values: Sequence[float | None]) -> float:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else math.nan

    silver = [None if c.silver_pairs is None else c.silver_pairs / max(c.last.labels, 1) for c in curves]
    return {
        "passes": mean([curve.passes for curve in curves]),
        "planned_passes": curves[0].planned_passes,
        "annotations": curves[0].annotations,
        "seconds": mean([curve.seconds for curve in curves]),
        "cpu_seconds": mean([curve.cpu_seconds for curve in curves]),
        "silver_pairs_per_label": mean(silver),
    }


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
    figures: Mapping[str, Mapping[str, ArmFigures]],
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
        labels = "" if any("calls" in found for found in arms.values()) else f"{budget_of(arms)} labels per run, "
        head = f"#### {setting}\n\n{regime(setting)}; {labels}{counted}."
        parts.append(f"{head}\n\n{table(arms, baseline)}")
        if baseline in arms and "j_at_difference" in arms[baseline]:
            parts.append(efficiency_table(arms, baseline))
    if claims:
        parts.append("#### Claims\n\n" + claims_table(claims))
        rows = [[v.claim, v.setting, v.verdict, v.figures] for v in claims]
        parts.append("#### Verdicts\n\n" + rows_table(["claim", "setting", "verdict", "values"], rows))
    if not any("calls" in found for found in chain.from_iterable(arms.values() for arms in figures.values())):
        parts.append("#### Costs\n\n" + cost_table(figures))
    return "\n\n".join(parts) + "\n"


def table(arms: Mapping[str, ArmFigures], baseline: str) -> str:
    """The layout of Tables 2 and 3, with paired differences and label efficiency."""
    cosines = any("cosine" in found for found in arms.values())
    asked, ranked = any("calls" in found for found in arms.values()), any("agreement" in f for f in arms.values())
    # where calls are counted, labels of a score and of a pair are not the same
    budgets = not asked and len({found["labels"] for found in arms.values()}) > 1
    header = ["arm", *(["judge calls"] if asked else []), *(["labels"] if budgets else [])]
    header += [title for _, title in FIGURES]
    header += ["ΔJ to " + baseline, "labels to reach its J"] if baseline in arms else []
    header += ["reward ranks as the oracle"] if ranked else []
    header += ["cosine with ∇J, batch / expected", "std of r_θ"] if cosines else []
    rows = []
    # BETTER turns the sign of KL, so that the largest is the best
    best = {name: max(arms, key=lambda arm: BETTER[name] * arms[arm][name].value) for name, _ in FIGURES}
    for arm, found in arms.items():
        row = [arm]
        row += [f"{found['calls']:.0f}" if "calls" in found else "–"] if asked else []
        row += [str(found["labels"])] if budgets else []
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


def budget_of(arms: Mapping[str, ArmFigures]) -> str:
    """Labels per run of the arms of a setting: ``1920``, or ``960 to 1920`` where arms differ."""
    budgets = sorted({found["labels"] for found in arms.values()})
    return str(budgets[0]) if len(budgets) == 1 else f"{budgets[0]} to {budgets[-1]}"


def efficiency_table(arms: Mapping[str, ArmFigures], baseline: str) -> str:
    """Labels to reach the baseline's final J and half of its gain, and J at fixed labels with paired differences.

    Args:
        arms: result of `figures_of` for a setting, with ``j_at``.
        baseline: the arm that others are compared with; its own row gives differences to its end.
    """
    end, counts = arms[baseline]["labels"], list(arms[baseline]["j_at"])
    header = ["arm", f"labels to J of {baseline} at {end}", "labels to half of its gain"]
    header += [f"J at {n}, Δ to {end}" for n in counts]
    rows = []
    for arm, found in arms.items():
        own = arm == baseline
        row = [arm, *("100 %" if own else shares(found[name]) for name in ("label_share", "label_share_half"))]
        for n in counts:
            j, difference = found["j_at"][n], found["j_at_difference"][n]
            # an arm may spend fewer labels
            row.append("–" if math.isnan(j.value) else f"{plus_minus(j, 2)}, {signed(difference, 2)}")
        rows.append(row)
    return rows_table(header, rows)


def cost_table(figures: Mapping[str, Mapping[str, ArmFigures]]) -> str:
    """Passes and annotations per pair, as planned (Table 1 of PILAF) and as counted over all settings; times."""
    arms = list(dict.fromkeys(chain.from_iterable(figures.values())))
    header = ["arm", "passes per pair, planned", "counted", "annotations per pair", "time per run"]
    # measured by newer runs alone, and counted by runs with a preference model
    further = {
        "cpu_seconds": ("CPU time per run", "{:.1f} s"),
        "silver_pairs_per_label": ("silver pairs a label", "{:.1f}"),
    }
    everywhere = list(chain.from_iterable(setting.values() for setting in figures.values()))
    shown = [name for name in further if not all(math.isnan(found[name]) for found in everywhere)]
    rows = []
    for arm in arms:
        found = [setting[arm] for setting in figures.values() if arm in setting]

        def mean(name: str, form: str, found: Sequence[ArmFigures] = found) -> str:
            # NaN in a setting whose runs do not count them
            known = [figure[name] for figure in found if not math.isnan(figure[name])]
            return form.format(sum(known) / len(known)) if known else "–"

        row = [arm, f"{found[0]['planned_passes']:g}", mean("passes", "{:.2f}"), f"{found[0]['annotations']:g}"]
        rows.append([*row, mean("seconds", "{:.0f} s"), *(mean(name, further[name][1]) for name in shown)])
    return rows_table([*header, *(further[name][0] for name in shown)], rows)


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
