"""PILAF: half of the pairs from the policy, half from two distributions tilted away from and towards the reference."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_rlhf.generation.base import AbstractEngine, Request
from lightning_rlhf.randomness import Key
from lightning_rlhf.samplers.base import AbstractPairSampler
from lightning_rlhf.samplers.draws import FIRST, SECOND, coin, policy_pair
from lightning_rlhf.types import Comparison, Prompt


BASE_PASSES, TILT_PASSES = 2.0, 4.0
"""Forward passes per token position and pair: two responses under the policy, or under both policy and reference."""


class PILAFSampler(AbstractPairSampler):
    """Samples pairs by PILAF, policy-interpolated learning for aligned feedback.

    PILAF (arXiv 2502.04270), section 5 and Algorithm 1. For each prompt, with probability 1/2::

        branch "base":  y^a, y^b ~ pi_theta
        branch "tilt":  y^a ~ pi+,  next token ~ softmax((1 + t) h_theta - t h_ref)
                        y^b ~ pi-,  next token ~ softmax((1 - t) h_theta + t h_ref)

    h are the next-token logits; `lightning_rlhf.generation.engine` mixes them. The theory assumes temperature 1 and
    top_p 1.

    Args:
        tilt: strength t of the tilt, > 0. Default: the DPO beta of the policy, as in the paper.

    Raises:
        ValueError: if the tilt is not positive and finite.
    """

    method = "PILAF"
    first_distribution, second_distribution = "π_θ^+ / π_θ", "π_θ^− / π_θ"
    passes_per_pair = 3.0

    def __init__(self, tilt: float | None = None) -> None:
        self.tilt = checked_tilt(tilt)

    def sample(self, prompts: Sequence[Prompt], engine: AbstractEngine, key: Key) -> list[Comparison]:
        """Sample one pair per prompt, all of them in one batch."""
        tilt = engine.beta if self.tilt is None else self.tilt
        # p = 1/2, the limit of T-PILAF's p(x) = Z+ Z- / (1 + Z+ Z-) as Z+ Z- -> 1
        tilted = [coin(prompt, key) < 0.5 for prompt in prompts]
        responses = engine.generate(pair_requests(prompts, tilted, tilt, key))
        return [
            Comparison(
                prompt,
                a,
                b,
                branch="tilt" if is_tilted else "base",
                passes=TILT_PASSES if is_tilted else BASE_PASSES,
            )
            for prompt, is_tilted, a, b in zip(prompts, tilted, responses[::2], responses[1::2], strict=True)
        ]


def pair_requests(prompts: Sequence[Prompt], tilted: Sequence[bool], tilt: float, key: Key) -> list[Request]:
    """Requests for one pair per prompt, y^a before y^b.

    Args:
        prompts: the prompts.
        tilted: whether the pair of each prompt comes from (pi+, pi-) instead of (pi_theta, pi_theta).
        tilt: strength t of the tilt, > 0.
        key: key of the round.
    """
    requests: list[Request] = []
    for prompt, is_tilted in zip(prompts, tilted, strict=True):
        if is_tilted:
            # pi+ has mix = +t, pi- has mix = -t; pi+ is always paired with pi-
            requests.append(Request(prompt, key.fold(prompt.index, FIRST), mix=tilt, source="plus"))
            requests.append(Request(prompt, key.fold(prompt.index, SECOND), mix=-tilt, source="minus"))
        else:
            requests.extend(policy_pair(prompt, key))
    return requests


def checked_tilt(tilt: float | None) -> float | None:
    """Return the tilt unchanged if it is None, or positive and finite.

    Raises:
        ValueError: otherwise.
    """
    # a tilt of 0 would sample both branches from pi_theta, a negative one would swap pi+ and pi-;
    # NaN fails the comparison, too
    if tilt is not None and not 0.0 < tilt < float("inf"):
        raise ValueError(f"tilt must be a positive number; got {tilt}: omit it to tilt by the DPO beta")
    return tilt
