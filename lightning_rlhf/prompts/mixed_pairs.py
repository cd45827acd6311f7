"""Several sources of recorded pairs as one data set: labels of people and of a language model together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from lightning_rlhf.estimators.temperature import fit_temperature, tempered
from lightning_rlhf.prompts.base import AbstractPromptSource
from lightning_rlhf.runtime.plugins import check_plugin
from lightning_rlhf.types import PromptRow, RecordedPair


LEAST_OVERLAP = 10
"""Pairs that two sources must share so that a temperature can be fitted."""


class MixedPairs(AbstractPromptSource):
    """The rows of several sources, one after another, each with a weight and a temperature.

    For labels of people and of a language model in one data set, an ablation of RLAIF vs. RLHF (arXiv 2309.00267). A
    row that two sources share is there twice, once with each label.

    Args:
        sources: the sources, at least one.
        weights: factor on the weight of the pairs of each source in the loss, >= 0; default: 1.
        temperatures: temperature of the probabilities of each source, > 0, see `tempered`; default: 1. ``fit`` fits
            those of all sources but the first to the first one, on the pairs that they share with it.

    Raises:
        ValueError: if a setting is out of range, or there is not one per source.
    """

    def __init__(
        self,
        sources: list[AbstractPromptSource],
        weights: list[float] | None = None,
        temperatures: list[float] | Literal["fit"] | None = None,
    ) -> None:
        if not sources:
            raise ValueError("MixedPairs needs at least one source; got none")
        for place, source in enumerate(sources):
            check_plugin(f"MixedPairs.sources[{place}]", source, AbstractPromptSource)
        for name, values, least in (("weights", weights, 0.0), ("temperatures", temperatures, 1e-6)):
            if values is None or isinstance(values, str):
                continue
            if len(values) != len(sources):
                raise ValueError(f"{name} needs one number per source, {len(sources)}; got {len(values)}")
            if not all(least <= value < math.inf for value in values):
                raise ValueError(f"{name} must be finite and >= {least:g}; got {values}")
        if isinstance(temperatures, str) and temperatures != "fit":
            raise ValueError(f"temperatures must be a list, or 'fit'; got {temperatures!r}")
        self.sources, self.weights, self.temperatures = sources, weights, temperatures

    def load(self) -> list[PromptRow]:
        """Read the rows of all sources.

        Raises:
            ValueError: if temperatures are to be fitted, and a source shares fewer than `LEAST_OVERLAP` pairs with the
                first one.
        """
        self.report.clear()
        parts = []
        for source in self.sources:
            parts.append(source.load())
            self.report.update(source.report)
        rows: list[PromptRow] = []
        for place, part in enumerate(parts):
            weight = 1.0 if self.weights is None else self.weights[place]
            temperature = self._temperature(place, parts)
            rows += [_adjusted(row, weight, temperature) for row in part]
        return rows

    def _temperature(self, place: int, parts: Sequence[Sequence[PromptRow]]) -> float:
        if self.temperatures is None or (self.temperatures == "fit" and place == 0):
            return 1.0
        if not isinstance(self.temperatures, str):
            return self.temperatures[place]
        known = _probabilities(parts[0])
        own = _probabilities(parts[place])
        shared = [key for key in own if key in known]
        if len(shared) < LEAST_OVERLAP:
            raise ValueError(
                f"temperatures=fit needs at least {LEAST_OVERLAP} pairs that source {place + 1} and the first one both "
                f"label, the same prompt with the same two responses; there are {len(shared)}: have more labeled by "
                f"both, or give temperatures as a list"
            )
        columns = [(own[key], known[key]) for key in shared]
        probability, target = torch.tensor(columns, dtype=torch.float64).unbind(1)
        return fit_temperature(probability, target)


def _adjusted(row: PromptRow, weight: float, temperature: float) -> PromptRow:
    if row.pair is None or (weight == 1.0 and temperature == 1.0):
        return row
    pair = row.pair
    if temperature != 1.0:
        probability = tempered(torch.tensor(pair.probability, dtype=torch.float64), temperature).item()
        pair = replace(pair, probability=probability)
    return replace(row, pair=replace(pair, weight=pair.weight * weight))


def _probabilities(rows: Sequence[PromptRow]) -> dict[tuple[str, str, str], float]:
    """P(the response that is first in the alphabet) of each pair, by prompt and responses in that order."""
    found = {}
    for row in rows:
        if row.pair is not None:
            found[_key(row, row.pair)] = _of_first(row.pair)
    return found


def _key(row: PromptRow, pair: RecordedPair) -> tuple[str, str, str]:
    prompt = row.text if row.messages is None else repr([sorted(turn.items()) for turn in row.messages])
    first, second = sorted((pair.chosen, pair.rejected))
    return str(prompt), first, second


def _of_first(pair: RecordedPair) -> float:
    return pair.probability if pair.chosen <= pair.rejected else 1 - pair.probability
