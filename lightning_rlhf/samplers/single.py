"""Single responses of the policy, which are judged one by one, as KTO and BCO have them."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_rlhf.generation.base import AbstractEngine, Request
from lightning_rlhf.randomness import Key
from lightning_rlhf.samplers.base import AbstractPairSampler
from lightning_rlhf.samplers.draws import FIRST
from lightning_rlhf.types import NO_RESPONSE, Comparison, Prompt


class SingleSampler(AbstractPairSampler):
    """Samples one response of the policy per prompt: online KTO or BCO.

    The comparisons hold no second response, and the label says whether the first one is desirable: `ThumbsLabeler`.
    """

    method = "Single responses (KTO)"
    first_distribution, second_distribution = "π_θ", "none"
    passes_per_pair = 1.0
    annotations_per_pair = 1.0
    makes_singles = True

    def sample(self, prompts: Sequence[Prompt], engine: AbstractEngine, key: Key) -> list[Comparison]:
        """Sample one response per prompt; branch ``"single"``."""
        responses = engine.generate([Request(prompt, key.fold(prompt.index, FIRST)) for prompt in prompts])
        return [
            Comparison(prompt, response, NO_RESPONSE, branch="single", passes=self.passes_per_pair)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
