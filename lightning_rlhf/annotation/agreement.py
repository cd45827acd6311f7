"""How far people agree: Krippendorff's alpha, kappas, pairwise agreement, and accuracies by EM; without torch."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from typing import Literal, TypeVar


Unit = TypeVar("Unit", bound=Hashable)
Name = TypeVar("Name", bound=Hashable)
Level = Literal["nominal", "ordinal", "interval"]
PRIOR = (4.0, 1.0)
"""Beta prior of an accuracy: people mostly know better than a coin."""
LEAST_ACCURACY, MOST_ACCURACY = 0.5, 0.99
"""A person is never turned round, and never believed without any doubt."""


def krippendorff_alpha(units: Sequence[Sequence[float]], level: Level = "nominal") -> float:
    """Krippendorff's alpha: 1 - observed disagreement / disagreement by chance.

    Krippendorff 2011, "Computing Krippendorff's alpha-reliability", equations of section D with the difference
    functions of section E. Units with fewer than two values say nothing about agreement and are left out.

    Args:
        units: values of each unit, by whoever judged it; any number per unit.
        level: ``nominal``: values are equal or not; ``ordinal``: ranks count; ``interval``: differences count.

    Returns:
        Alpha, at most 1; NaN where fewer than two values occur, since chance then leaves no disagreement.
    """
    # coincidences o_ck = sum_u (number of c-k pairs in u) / (m_u - 1)
    coincidences: defaultdict[tuple[float, float], float] = defaultdict(float)
    for values in units:
        if len(values) < 2:
            continue
        counts = Counter(values)
        for first, n_first in counts.items():
            for second, n_second in counts.items():
                ordered = n_first * (n_second - (first == second))
                coincidences[first, second] += ordered / (len(values) - 1)
    margins: defaultdict[float, float] = defaultdict(float)
    for (first, _), weight in coincidences.items():
        margins[first] += weight
    if len(margins) < 2:
        return math.nan
    total = sum(margins.values())
    distance = _squared_distances(margins, level)
    observed = sum(weight * distance[pair] for pair, weight in coincidences.items())
    expected = sum(margins[c] * margins[k] * distance[c, k] for c in margins for k in margins)
    # alpha = 1 - (n - 1) sum o_ck d_ck / sum n_c n_k d_ck
    return 1.0 - (total - 1) * observed / expected


def _squared_distances(margins: Mapping[float, float], level: Level) -> dict[tuple[float, float], float]:
    order = sorted(margins)
    distances = {(c, c): 0.0 for c in order}
    for (i, c), (j, k) in combinations(enumerate(order), 2):
        if level == "nominal":
            squared = 1.0
        elif level == "interval":
            squared = (c - k) ** 2
        else:
            # (sum_{g = c..k} n_g - (n_c + n_k) / 2)^2
            squared = (sum(margins[g] for g in order[i : j + 1]) - (margins[c] + margins[k]) / 2) ** 2
        distances[c, k] = distances[k, c] = squared
    return distances


def alpha_interval(
    units: Sequence[Sequence[float]], level: Level = "nominal", samples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Interval of 95 % of Krippendorff's alpha by bootstrap over units; NaN where alpha is.

    Args:
        units: as in `krippendorff_alpha`.
        level: as there.
        samples: bootstrap samples, >= 40.
        seed: of the bootstrap.
    """
    judged = [values for values in units if len(values) >= 2]
    generator = random.Random(seed)
    found = []
    for _ in range(samples):
        alpha = krippendorff_alpha(generator.choices(judged, k=len(judged)), level) if judged else math.nan
        # a sample with one value only has no alpha
        if not math.isnan(alpha):
            found.append(alpha)
    if not found:
        return math.nan, math.nan
    found.sort()
    return found[int(0.025 * (len(found) - 1))], found[math.ceil(0.975 * (len(found) - 1))]


def cohen_kappa(pairs: Sequence[tuple[Hashable, Hashable]]) -> float:
    """Cohen's kappa of two people, (p_o - p_e) / (1 - p_e), Cohen 1960; NaN where both always say one thing."""
    if not pairs:
        return math.nan
    first, second = Counter(pair[0] for pair in pairs), Counter(pair[1] for pair in pairs)
    observed = sum(a == b for a, b in pairs) / len(pairs)
    by_chance = sum(first[value] * second[value] for value in first) / len(pairs) ** 2
    return math.nan if by_chance == 1.0 else (observed - by_chance) / (1 - by_chance)


def fleiss_kappa(units: Sequence[Sequence[Hashable]]) -> float:
    """Fleiss' kappa, Fleiss 1971; NaN where only one value occurs.

    Args:
        units: values of each unit.

    Raises:
        ValueError: if units have different numbers of values, or fewer than two.
    """
    sizes = {len(values) for values in units}
    if len(sizes) != 1 or min(sizes) < 2:
        raise ValueError(f"Fleiss' kappa needs the same number of votes, >= 2, on every pair; got {sorted(sizes)}")
    n = sizes.pop()
    # P_i = (sum_j n_ij^2 - n) / (n (n - 1)); P_e = sum_j p_j^2
    counts = [Counter(values) for values in units]
    observed = sum(sum(c * c for c in count.values()) - n for count in counts) / (len(units) * n * (n - 1))
    totals = sum(counts, Counter())
    by_chance = sum((c / (n * len(units))) ** 2 for c in totals.values())
    return math.nan if by_chance == 1.0 else (observed - by_chance) / (1 - by_chance)


def pairwise_agreement(units: Sequence[Sequence[Hashable]]) -> tuple[int, int]:
    """Number of pairs of votes on the same unit that are equal, and of all such pairs."""
    equal = total = 0
    for values in units:
        for first, second in combinations(values, 2):
            equal, total = equal + (first == second), total + 1
    return equal, total


def one_coin_accuracies(
    votes: Sequence[tuple[Unit, Name, float]],
    known: Mapping[Unit, float] | None = None,
    iterations: int = 100,
) -> tuple[dict[Unit, float], dict[Name, float]]:
    """Accuracies of people and truths of pairs, by EM in the one-coin model of Dawid and Skene.

    Dawid and Skene 1979 with one parameter per person: a vote is right with probability acc_w, whichever side is right.
    Both sides have the same prior. With the prior Beta(4, 1) on accuracies, clipped to [0.5, 0.99].

    Args:
        votes: unit, person, and 1 for a, 0 for b, 1/2 for a tie, which says nothing here.
        known: P(a is better) of units that are known, such as gold questions.
        iterations: most iterations; the loop ends sooner when nothing changes.

    Returns:
        P(a is better) of each unit, and the accuracy of each person.
    """
    known = known or {}
    by_unit: defaultdict[Unit, list[tuple[Name, float]]] = defaultdict(list)
    for unit, person, value in votes:
        by_unit[unit].append((person, value))
    accuracies: dict[Name, float] = {person: PRIOR[0] / sum(PRIOR) for _, person, _ in votes}
    truths: dict[Unit, float] = {}
    for _ in range(iterations):
        # E step: P(a) = sigma(sum_w (2 v - 1) logit acc_w)
        for unit, given in by_unit.items():
            truths[unit] = known[unit] if unit in known else weighted_probability(given, accuracies)
        right, count = dict.fromkeys(accuracies, 0.0), dict.fromkeys(accuracies, 0)
        for unit, person, value in votes:
            if value != 0.5:
                right[person] += truths[unit] if value > 0.5 else 1 - truths[unit]
                count[person] += 1
        # M step: the mode of the posterior, (a - 1 + right) / (a + b - 2 + n)
        fresh = {
            person: min(
                max((PRIOR[0] - 1 + right[person]) / (sum(PRIOR) - 2 + count[person]), LEAST_ACCURACY), MOST_ACCURACY
            )
            for person in accuracies
        }
        change = max((abs(fresh[person] - accuracies[person]) for person in fresh), default=0.0)
        accuracies = fresh
        if change < 1e-10:
            break
    return truths, accuracies


def weighted_probability(votes: Sequence[tuple[Name, float]], accuracies: Mapping[Name, float]) -> float:
    """P(a is better) given votes of people with known accuracies: sigma(sum_w (2 v - 1) logit acc_w)."""
    logit = sum((2 * value - 1) * math.log(accuracies[who] / (1 - accuracies[who])) for who, value in votes)
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else 1 - 1 / (1 + math.exp(logit))
