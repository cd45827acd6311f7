"""Hybrid sampling: one response from the policy, the other from the reference."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_rlhf.generation.base import AbstractEngine, Request
from lightning_rlhf.randomness import Key
from lightning_rlhf.samplers.base import AbstractPairSampler
from lightning_rlhf.samplers.draws import FIRST, SECOND
from lightning_rlhf.types import Comparison, Prompt


class HybridSampler(AbstractPairSampler):
    """Draws the first response from the policy and the second from the reference.

    The sampler of XPO (Xie et al. 2024, arXiv 2405.21046), "Hybrid" in Table 1 of PILAF (arXiv 2502.04270). XPO's
    exploration bonus alpha belongs to the loss.
    """

    method = "Hybrid (Xie 2024)"
    first_law, second_law = "π_θ", "π_ref"

    def sample(self, prompts: Sequence[Prompt], engine: AbstractEngine, key: Key) -> list[Comparison]:
        """Draw one pair per prompt, y^a from pi_theta and y^b from pi_ref; branch ``"hybrid"``."""
        requests = []
        for prompt in prompts:
            requests.append(Request(prompt, key.fold(prompt.index, FIRST)))
            requests.append(Request(prompt, key.fold(prompt.index, SECOND), mix=-1.0, source="reference"))
        drawn = engine.generate(requests)
        return [
            Comparison(prompt, a, b, branch="hybrid", passes=2.0)
            for prompt, a, b in zip(prompts, drawn[::2], drawn[1::2], strict=True)
        ]
