"""PILAF: half of the pairs from the policy, half from two laws tilted away from and towards the reference."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_rlhf.generation.base import AbstractEngine, Request
from lightning_rlhf.randomness import Key
from lightning_rlhf.samplers.base import AbstractPairSampler
from lightning_rlhf.samplers.draws import FIRST, SECOND, coin, policy_pair
from lightning_rlhf.types import Comparison, Prompt


BASE_PASSES, TILT_PASSES = 2.0, 4.0
"""Forward passes per token position and pair: two responses under one model, or under policy and reference both."""


class PILAFSampler(AbstractPairSampler):
    """Draws pairs for policy-interpolated learning.

    PILAF (arXiv 2502.04270), section 5 and Algorithm 1. A fair coin per prompt: heads, both responses from pi_theta
    (branch ``"base"``); tails, y^a from pi+ and y^b from pi- (branch ``"tilt"``), whose next-token laws are
    ``softmax((1 + t) h_theta - t h_ref)`` and ``softmax((1 - t) h_theta + t h_ref)``. pi+ is always paired with pi-.
    The theory assumes temperature 1 and top_p 1.

    Args:
        tilt: strength t of the tilt, > 0; omit it to use the DPO beta of the policy, as the paper does.

    Raises:
        ValueError: if the tilt is not positive and finite.
    """

    method = "PILAF"
    first_law, second_law = "π_θ^+ / π_θ", "π_θ^− / π_θ"
    passes_per_pair = 3.0

    def __init__(self, tilt: float | None = None) -> None:
        self.tilt = checked_tilt(tilt)

    def sample(self, prompts: Sequence[Prompt], engine: AbstractEngine, key: Key) -> list[Comparison]:
        """Draw one pair per prompt, all of them in one batch."""
        tilt = engine.beta if self.tilt is None else self.tilt
        tilted = [coin(prompt, key) < 0.5 for prompt in prompts]
        drawn = engine.generate(pair_requests(prompts, tilted, tilt, key))
        return [
            Comparison(
                prompt,
                a,
                b,
                branch="tilt" if is_tilted else "base",
                passes=TILT_PASSES if is_tilted else BASE_PASSES,
            )
            for prompt, is_tilted, a, b in zip(prompts, tilted, drawn[::2], drawn[1::2], strict=True)
        ]


def pair_requests(prompts: Sequence[Prompt], tilted: Sequence[bool], tilt: float, key: Key) -> list[Request]:
    """Requests for one pair per prompt, y^a before y^b.

    Args:
        prompts: the prompts.
        tilted: whether the pair of each prompt comes from (pi+, pi-) instead of (pi_theta, pi_theta).
        tilt: strength of the tilt.
        key: key of the round.
    """
    requests: list[Request] = []
    for prompt, is_tilted in zip(prompts, tilted, strict=True):
        if is_tilted:
            requests.append(Request(prompt, key.fold(prompt.index, FIRST), mix=tilt, source="plus"))
            requests.append(Request(prompt, key.fold(prompt.index, SECOND), mix=-tilt, source="minus"))
        else:
            requests.extend(policy_pair(prompt, key))
    return requests


def checked_tilt(tilt: float | None) -> float | None:
    """The tilt, if it is one."""
    if tilt is not None and not 0.0 < tilt < float("inf"):
        raise ValueError(f"tilt must be a positive number; got {tilt}: omit it to tilt by the DPO beta")
    return tilt
