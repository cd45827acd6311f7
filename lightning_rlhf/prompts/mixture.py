"""Several sources of prompts as one, with weights."""

from __future__ import annotations

import math
from dataclasses import replace

from lightning_rlhf.prompts.base import AbstractPromptSource
from lightning_rlhf.randomness import Key
from lightning_rlhf.runtime.plugins import check_plugin
from lightning_rlhf.types import PromptRow


SOURCE_COLUMN = "dataset"
"""Column with the name of the source of a row."""


class MixedPrompts(AbstractPromptSource):
    """The rows of several sources, each with the name of its source in the column ``dataset``.

    Held-out pairs have metrics by source, too, unless the rows name a ``source`` themselves.

    With weights w_k, source k of n_k rows gives the share s_k = w_k / sum w: of N = min_k n_k / s_k rows in all, the
    nearest number to N s_k, sampled without replacement. No row comes twice, and the rows of one source, the scarcest
    by its weight, are all there. Without weights all rows of all sources are taken.

    Args:
        sources: sources by name.
        weights: weight of each source, > 0, by the same names.
        seed: decides which rows are taken.

    Raises:
        ValueError: if there is no source, or the weights are not those of the sources.
    """

    def __init__(
        self, sources: dict[str, AbstractPromptSource], weights: dict[str, float] | None = None, seed: int = 0
    ) -> None:
        if not sources:
            raise ValueError("MixedPrompts needs at least one source; got none")
        for name, source in sources.items():
            check_plugin(f"MixedPrompts.sources.{name}", source, AbstractPromptSource)
        if weights is not None and set(weights) != set(sources):
            given = ", ".join(weights) or "none"
            raise ValueError(f"MixedPrompts.weights needs a weight for each of {', '.join(sources)}; got {given}")
        if weights is not None and not all(0 < weight < math.inf for weight in weights.values()):
            raise ValueError(f"MixedPrompts.weights must be finite and > 0; got {weights}")
        self.sources, self.weights, self.seed = dict(sources), weights, seed

    def load(self) -> list[PromptRow]:
        """Read the rows, source after source."""
        self.report.clear()
        found = {name: source.load() for name, source in self.sources.items()}
        for name, source in self.sources.items():
            self.report.update({f"{name}: {reason}": count for reason, count in source.report.items()})
        sizes = {name: len(rows) for name, rows in found.items()}
        taken = sizes if self.weights is None else mixture_sizes(sizes, self.weights)
        mixed: list[PromptRow] = []
        for number, (name, rows) in enumerate(found.items()):
            # a key per source: the rows of one do not depend on the size of another
            order = Key((self.seed, number)).uniforms(len(rows)).argsort().tolist()
            chosen = sorted(order[: taken[name]])
            for i in chosen:
                row, named = rows[i], {**rows[i].columns, SOURCE_COLUMN: name}
                mixed.append(replace(row, subset=row.subset or name, columns=named))
        return mixed


def mixture_sizes(sizes: dict[str, int], weights: dict[str, float]) -> dict[str, int]:
    """Rows to take of each source, in proportion to the weights, so that the scarcest source is used up.

    Args:
        sizes: rows of each source, n_k >= 1.
        weights: weights w_k > 0 by the same names.
    """
    total = sum(weights.values())
    # N = min_k n_k / s_k with s_k = w_k / sum w
    size = min(sizes[name] * total / weights[name] for name in sizes)
    return {name: min(max(round(size * weights[name] / total), 1), sizes[name]) for name in sizes}
