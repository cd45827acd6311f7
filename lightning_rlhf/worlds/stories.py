"""The world "stories": a pretrained language model that is fast on a CPU, and the beginnings that it continues.

The policy is stories15M of llama2.c, a Llama of 15 million parameters trained on TinyStories (Eldan and Li 2023, arXiv
2305.07759), which comes inside an npm package (MIT). Prompts are openings of stories; whether a story goes well is for
`LexiconReward` to say:

    lightning-rlhf fit --config worlds/stories
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from lightning_rlhf.worlds.prompts import AbstractWorldPrompts


HEROES = (
    *(("girl", "Lily", "she"), ("boy", "Tim", "he"), ("girl", "Mia", "she"), ("boy", "Ben", "he")),
    *(("girl", "Sue", "she"), ("boy", "Max", "he"), ("girl", "Amy", "she"), ("boy", "Tom", "he")),
)
MOODS = ("happy", "sad", "brave", "shy", "angry", "curious")
PLACES = ("park", "beach", "forest", "store", "farm", "lake")


class StoryPrompts(AbstractWorldPrompts):
    """Openings of stories: a hero, a mood and a place; 288, of which every fourth is held out.

    Args:
        split: ``train`` or ``heldout``.
        repeats: times that each prompt is listed, >= 1: held-out answers are then averaged over as many samples.
    """

    NAME = "story opening"

    def texts(self) -> Iterator[tuple[str, bool]]:
        """Give each prompt, and whether it is held out."""
        for i, ((kind, name, they), mood, place) in enumerate(product(HEROES, MOODS, PLACES)):
            text = (
                f"Once upon a time, there was a little {kind} named {name}. {they.capitalize()} was very {mood}. "
                f"One day, {they} went to the {place}."
            )
            # moods move along from one row of six places to the next, so that each is held out with each place
            yield text, (i + i // 6) % 4 == 3
