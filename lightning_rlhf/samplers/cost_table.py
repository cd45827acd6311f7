"""Table 1 of PILAF (arXiv 2502.04270): sampling distributions and costs of the samplers."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_rlhf.samplers.base import AbstractPairSampler


HEADER = "| method | y^a | y^b | sampling | annotation |\n|---|---|---|---|---|"
FOOTNOTE = "\\*: the reward scores every candidate instead of a labeler comparing one pair."


def cost_table(samplers: Sequence[AbstractPairSampler]) -> str:
    """Make Table 1 of PILAF (arXiv 2502.04270) for the given samplers, in Markdown.

    The unit of sampling is model forward passes per token position and pair, the unit of annotation is responses shown
    to the annotator per pair.

    Args:
        samplers: one row each, in order.
    """
    rows = [cost_row(sampler) for sampler in samplers]
    footnote = f"\n\n{FOOTNOTE}" if any(scores_candidates(sampler) for sampler in samplers) else ""
    return "\n".join([HEADER, *rows]) + footnote


def cost_row(sampler: AbstractPairSampler) -> str:
    """One row of the table."""
    cells = [
        sampler.method or type(sampler).__name__,
        sampler.first_distribution,
        sampler.second_distribution,
        f"{sampler.passes_per_pair:g}",
        f"{sampler.annotations_per_pair:g}" + ("*" if scores_candidates(sampler) else ""),
    ]
    return "| " + " | ".join(cells) + " |"


def scores_candidates(sampler: AbstractPairSampler) -> bool:
    """Whether the annotator scores more than the two responses of a pair."""
    # a labeled pair shows two responses; Best-of-N with an oracle reward scores all N
    return sampler.annotations_per_pair > 2
