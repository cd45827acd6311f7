"""Offline sampling: the recorded pairs of a preference data set."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_rlhf.generation.base import AbstractEngine
from lightning_rlhf.randomness import Key
from lightning_rlhf.samplers.base import AbstractPairSampler
from lightning_rlhf.samplers.draws import coin
from lightning_rlhf.types import Comparison, Prompt


class OfflineSampler(AbstractPairSampler):
    """Returns the recorded pairs of a preference data set; nothing is decoded.

    Offline DPO (Rafailov et al. 2023, arXiv 2305.18290). The order of the two responses is random, since a labeler may
    have a position bias. ``meta["recorded_first"]`` says whether ``a`` is the recorded chosen response. The recorded
    weight is the weight of the pair. Rows of single responses (`DatasetUnpaired`) give comparisons without a second
    response.
    """

    method = "Offline (recorded pairs)"
    first_distribution, second_distribution = "data", "data"
    passes_per_pair = 0.0
    needs_engine = False

    def sample(self, prompts: Sequence[Prompt], engine: AbstractEngine, key: Key) -> list[Comparison]:
        """Return the recorded pair of each prompt; branch ``"offline"``. The engine is not used.

        Raises:
            ValueError: if a prompt has no recorded pair.
        """
        del engine
        # a fair coin decides the order, against position bias of the labeler
        return [recorded_comparison(prompt, chosen_first=coin(prompt, key) < 0.5) for prompt in prompts]


def recorded_comparison(prompt: Prompt, *, chosen_first: bool) -> Comparison:
    """Make a comparison of the recorded pair of a prompt.

    Args:
        prompt: a prompt with a recorded pair.
        chosen_first: whether ``a`` is the recorded chosen response.

    Raises:
        ValueError: if the prompt has no recorded pair.
    """
    if prompt.pair is None:
        raise ValueError(
            f"prompt {prompt.index} ({prompt.text[-80:]!r}) has no recorded pair; OfflineSampler needs rows with "
            f"'chosen' and 'rejected': use such a data set, or a sampler that decodes, such as VanillaSampler"
        )
    chosen, rejected = prompt.pair
    # a single response comes first: its label is P(desirable), which no order turns round
    chosen_first = chosen_first or prompt.is_single
    a, b = (chosen, rejected) if chosen_first else (rejected, chosen)
    return Comparison(
        prompt,
        a,
        b,
        branch="offline",
        weight=1.0 if prompt.recorded is None else prompt.recorded.weight,
        passes=0.0,
        # `RecordedLabeler` reads it, to turn the recorded label round
        meta={"recorded_first": chosen_first},
    )
