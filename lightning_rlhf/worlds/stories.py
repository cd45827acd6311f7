"""The world "stories": a pretrained language model that is fast on a CPU, and the beginnings that it continues.

The policy is stories15M of llama2.c, a Llama of 15 million parameters trained on TinyStories (Eldan and Li 2023, arXiv
2305.07759), which comes inside an npm package (MIT). Prompts are openings of stories; whether a story goes well is for
`LexiconReward` to say; `StorySizeReward` prefers the big and loud:

    lightning-rlhf fit --config worlds/stories
    lightning-rlhf fit --config worlds/stories --data.labeler.reward=StorySizeReward --data.labeler.reward.scale=2
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product

from torch import nn
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.logprobs.prefix_tree import next_token_logps
from lightning_rlhf.models.load import load_policy, load_tokenizer
from lightning_rlhf.prompts.encode import encode_all
from lightning_rlhf.prompts.tokenize import leading_special_ids
from lightning_rlhf.rewards.base import AbstractReward, RewardOutput
from lightning_rlhf.types import Prompt, Response
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


class StorySizeReward(AbstractReward):
    """A second oracle of the stories: does the frozen start policy expect something big and loud, or small and quiet?

    A classifier without training data, by a pattern and words that stand for the classes (Schick and Schuetze 2020,
    arXiv 2001.07676)::

        text      = prompt + response up to its last whole sentence + " It was very"
        r*(x, y)  = scale / UNIT * (log sum_(w in BIG) pi_0(w | text) - log sum_(w in SMALL) pi_0(w | text))

    UNIT is the std of these log odds within prompts on samples of the start policy pi_0, so that ``scale`` is the std
    of rewards there. At scale 2 Bradley-Terry labels are certain at 83 % on average: the mean of max(p, 1 - p) over
    pairs.

    Nothing on the surface says how a story goes on: on 352 samples of pi_0 a regression within prompts on the number of
    repeated words and log pi_0, with squares and products, explains 0.2 % of the variance (all responses have 32
    tokens). The correlation with VADER's sentiment of the response (`LexiconReward`) is -0.04.

    Always computed on the CPU in float32, from text alone. The model is loaded at the first call.

    Args:
        scale: std of the rewards of the start policy within prompts, > 0.
    """

    PATTERN = " It was very"
    BIG = ("big", "loud", "fast", "high")
    SMALL = ("small", "quiet", "soft", "slow", "little")
    UNIT = 2.05

    def __init__(self, scale: float = 1.0) -> None:
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"StorySizeReward needs a finite scale > 0; got {scale}")
        self.scale = scale
        self._loaded: tuple[nn.Module, PreTrainedTokenizerBase, list[int]] | None = None

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> RewardOutput:
        """Score each story by what the model expects next; [B], float64."""
        model, tokenizer, words = self._load()
        pairs = zip(prompts, responses, strict=True)
        # a response has its leading space in its tokens, and not in its text
        stories = [f"{p.text} {whole_sentences(r.text).lstrip()}{self.PATTERN}" for p, r in pairs]
        leading = leading_special_ids(tokenizer)
        texts = [leading + ids for ids in encode_all(tokenizer, stories)]
        logps = next_token_logps(model, texts, words).double()
        big, small = logps[:, : len(self.BIG)], logps[:, len(self.BIG) :]
        # log odds = logsumexp(log pi_0(big)) - logsumexp(log pi_0(small))
        return RewardOutput(self.scale / self.UNIT * (big.logsumexp(-1) - small.logsumexp(-1)))

    def _load(self) -> tuple[nn.Module, PreTrainedTokenizerBase, list[int]]:
        # at first use: a run that reads its labels from the ledger loads nothing
        if self._loaded is None:
            tokenizer = load_tokenizer("world:stories")
            # the token behind a space is that of the whole word
            words = [ids[0] for ids in encode_all(tokenizer, [*self.BIG, *self.SMALL])]
            model = load_policy("world:stories").requires_grad_(False)
            self._loaded = model, tokenizer, words
        return self._loaded


def whole_sentences(text: str) -> str:
    """A response up to the end of its last whole sentence, with a full stop where it has none."""
    end = max(text.rfind(mark) for mark in ".!?")
    return text[: end + 1] if end >= 0 else f"{text.rstrip()}."
