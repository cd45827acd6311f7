"""Accuracy by subset on labeled pairs, and the sections of RewardBench."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lightning_rlhf.evaluation.rates import wilson_interval


CODE = tuple(f"hep-{language}" for language in ("cpp", "go", "java", "js", "python", "rust"))
SECTIONS: dict[str, tuple[str, ...]] = {
    "Chat": ("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"),
    "Chat Hard": (
        "mt-bench-hard",
        "llmbar-natural",
        "llmbar-adver-neighbor",
        "llmbar-adver-GPTInst",
        "llmbar-adver-GPTOut",
        "llmbar-adver-manual",
    ),
    "Safety": (
        "refusals-dangerous",
        "refusals-offensive",
        "xstest-should-refuse",
        "xstest-should-respond",
        "donotanswer",
    ),
    "Reasoning": ("math-prm", *CODE),
}
"""Subsets of the sections of RewardBench (arXiv 2403.13787, table 1), without its prior test sets."""


def subset_accuracies(agreements: Sequence[float], subsets: Sequence[str]) -> dict[str, dict[str, float]]:
    """Accuracy by subset, with Wilson's interval of 95 % and the number of pairs.

    Args:
        agreements: 1 where the better response of a pair won, 0 where it lost, 1/2 for a tie.
        subsets: subset of each pair; pairs with an empty name are left out.
    """
    found: dict[str, dict[str, float]] = {}
    for subset in sorted(set(subsets) - {""}):
        values = [value for value, name in zip(agreements, subsets, strict=True) if name == subset]
        low, high = wilson_interval(sum(values), len(values))
        share = sum(values) / len(values)
        found[subset] = {"accuracy": share, "accuracy_low": low, "accuracy_high": high, "pairs": float(len(values))}
    return found


def rewardbench_sections(accuracies: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Accuracies of the sections of RewardBench, and their mean as ``score``; only those whose subsets are all there.

    A section is the mean over its subsets, weighted by their pairs. In Reasoning, ``math-prm`` weighs as much as all
    code together, as in the benchmark.

    Args:
        accuracies: result of `subset_accuracies`.
    """
    scores = {}
    for section, subsets in SECTIONS.items():
        if not accuracies.keys() >= set(subsets):
            continue
        weights = {subset: accuracies[subset]["pairs"] for subset in subsets}
        if section == "Reasoning":
            weights["math-prm"] = math.fsum(weights[subset] for subset in CODE)
        # sum_s n_s acc_s / sum_s n_s
        weighted = math.fsum(weight * accuracies[subset]["accuracy"] for subset, weight in weights.items())
        scores[section] = weighted / math.fsum(weights.values())
    if len(scores) == len(SECTIONS):
        scores["score"] = math.fsum(scores.values()) / len(scores)
    return scores
