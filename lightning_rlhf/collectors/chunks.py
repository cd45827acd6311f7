"""Chunks of a round; each is in the ledger before the next one begins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from lightning_rlhf.types import Prompt


def chunks_without_repeats(
    prompts: Sequence[Prompt], positions: Sequence[int], chunk: int
) -> Iterator[tuple[int, list[int]]]:
    """Cut a round into chunks in which no prompt comes twice.

    Samplers fold the prompt into their keys, so that the second pair of a prompt needs another key.

    Args:
        prompts: prompts of the whole round.
        positions: positions of the round that are sampled.
        chunk: most positions per chunk.

    Yields:
        The number of times that the prompts of the chunk came before in the round, and the positions.
    """
    # counted over the whole round, not over the missing positions: a resumed round needs the same keys
    seen: Counter[int] = Counter()
    repeats = []
    for prompt in prompts:
        repeats.append(seen[prompt.index])
        seen[prompt.index] += 1
    for repeat in range(max(repeats, default=-1) + 1):
        places = [position for position in positions if repeats[position] == repeat]
        for start in range(0, len(places), chunk):
            yield repeat, places[start : start + chunk]
