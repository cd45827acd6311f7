"""Vanilla sampling: both responses from the policy."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_rlhf.generation.base import AbstractEngine
from lightning_rlhf.randomness import Key
from lightning_rlhf.samplers.base import AbstractPairSampler
from lightning_rlhf.samplers.draws import policy_pairs
from lightning_rlhf.types import Comparison, Prompt


class VanillaSampler(AbstractPairSampler):
    """Samples both responses independently from the policy.

    The baseline of online and iterative DPO (Rafailov et al. 2023, arXiv 2305.18290; Guo et al. 2024, arXiv
    2402.04792), "Vanilla" in Table 1 of PILAF (arXiv 2502.04270).
    """

    method = "Vanilla (Rafailov 2023)"
    first_distribution, second_distribution = "π_θ", "π_θ"

    def sample(self, prompts: Sequence[Prompt], engine: AbstractEngine, key: Key) -> list[Comparison]:
        """Sample one pair per prompt; branch ``"base"``."""
        # y^a, y^b ~ pi_theta, in turn
        responses = engine.generate(policy_pairs(prompts, key))
        return [
            Comparison(prompt, a, b, branch="base", passes=2.0)
            for prompt, a, b in zip(prompts, responses[::2], responses[1::2], strict=True)
        ]
