"""Hybrid sampling: one response from the policy, the other from the reference."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_rlhf.generation.base import AbstractEngine, Request
from lightning_rlhf.randomness import Key
from lightning_rlhf.samplers.base import AbstractPairSampler
from lightning_rlhf.samplers.draws import FIRST, SECOND
from lightning_rlhf.types import Comparison, Prompt


class HybridSampler(AbstractPairSampler):
    """Samples the first response from the policy and the second from the reference.

    The sampler of XPO (Xie et al. 2024, arXiv 2405.21046), "Hybrid" in Table 1 of PILAF (arXiv 2502.04270). The
    exploration bonus of XPO is part of the loss: `lightning_rlhf.losses.XPOLoss`.
    """

    method = "Hybrid (Xie 2024)"
    first_distribution, second_distribution = "π_θ", "π_ref"

    def sample(self, prompts: Sequence[Prompt], engine: AbstractEngine, key: Key) -> list[Comparison]:
        """Sample one pair per prompt, y^a from pi_theta and y^b from pi_ref; branch ``"hybrid"``."""
        requests = []
        for prompt in prompts:
            requests.append(Request(prompt, key.fold(prompt.index, FIRST)))
            # mix = -1: (1 + mix) h_theta - mix h_ref = h_ref
            requests.append(Request(prompt, key.fold(prompt.index, SECOND), mix=-1.0, source="reference"))
        responses = engine.generate(requests)
        return [
            Comparison(prompt, a, b, branch="hybrid", passes=2.0)
            for prompt, a, b in zip(prompts, responses[::2], responses[1::2], strict=True)
        ]
