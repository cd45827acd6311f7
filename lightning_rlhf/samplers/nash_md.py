"""Nash-MD's pairs: the policy against a geometric mixture of policy and reference."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_rlhf.generation.base import AbstractEngine, Request
from lightning_rlhf.randomness import Key
from lightning_rlhf.samplers.base import AbstractPairSampler
from lightning_rlhf.samplers.draws import FIRST, SECOND
from lightning_rlhf.types import Comparison, Prompt


class NashMDSampler(AbstractPairSampler):
    """Samples the first response from the policy, the second from a mixture of policy and reference.

    The pairs of Nash-MD (Munos et al. 2023, arXiv 2312.00886, section 7)::

        y^a ~ pi_theta
        y^b ~ pi_mix,  next token ~ softmax((1 - m) h_theta + m h_ref)

    h are the next-token logits, so pi_mix is proportional to pi_theta^(1 - m) pi_ref^m token by token, as in the
    paper's experiments. Here the pairs train a preference loss; Nash-MD's own update is a policy gradient.

    Args:
        mixture: weight m of the reference, in (0, 1).

    Raises:
        ValueError: if mixture is not between 0 and 1.
    """

    method = "Nash-MD (Munos 2023)"
    first_distribution, second_distribution = "π_θ", "π_θ^(1−m) π_ref^m"
    passes_per_pair = 3.0

    def __init__(self, mixture: float = 0.5) -> None:
        # 0 is Vanilla and 1 Hybrid, which cost a pass less
        if not 0.0 < mixture < 1.0:
            raise ValueError(
                f"mixture must be between 0 and 1; got {mixture}: use VanillaSampler for 0, HybridSampler for 1"
            )
        self.mixture = mixture

    def sample(self, prompts: Sequence[Prompt], engine: AbstractEngine, key: Key) -> list[Comparison]:
        """Sample one pair per prompt, y^a from pi_theta and y^b from pi_mix; branch ``"nash_md"``."""
        requests = []
        for prompt in prompts:
            requests.append(Request(prompt, key.fold(prompt.index, FIRST)))
            # (1 + mix) h_theta - mix h_ref with mix = -m
            requests.append(Request(prompt, key.fold(prompt.index, SECOND), mix=-self.mixture))
        responses = engine.generate(requests)
        return [
            Comparison(prompt, a, b, branch="nash_md", passes=self.passes_per_pair)
            for prompt, a, b in zip(prompts, responses[::2], responses[1::2], strict=True)
        ]
