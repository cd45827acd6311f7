"""Rounds in chunks, each durable before the next begins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from lightning_rlhf.types import Prompt


def chunks_without_repeats(
    prompts: Sequence[Prompt], positions: Sequence[int], chunk: int
) -> Iterator[tuple[int, list[int]]]:
    """Cut a round into chunks in which no prompt comes twice.

    Samplers name random numbers by the prompt, so that a prompt's second pair needs a key of its own.

    Args:
        prompts: prompts of the whole round.
        positions: places of the round that are to be drawn.
        chunk: places per chunk at most.

    Yields:
        How often the prompts of the chunk came before in the round, and the places.
    """
    seen: Counter[int] = Counter()
    repeats = []
    for prompt in prompts:
        repeats.append(seen[prompt.index])
        seen[prompt.index] += 1
    for repeat in range(max(repeats, default=-1) + 1):
        places = [position for position in positions if repeats[position] == repeat]
        for start in range(0, len(places), chunk):
            yield repeat, places[start : start + chunk]
