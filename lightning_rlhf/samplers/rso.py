"""RSO: pairs of the optimal policy of a reward model, by rejection sampling from a pool of responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_rlhf.generation.base import AbstractEngine
from lightning_rlhf.randomness import Key
from lightning_rlhf.rewards.base import AbstractReward, checked_score
from lightning_rlhf.runtime.plugins import check_plugin
from lightning_rlhf.samplers.base import AbstractPairSampler
from lightning_rlhf.samplers.draws import COIN, pool_requests, repeated
from lightning_rlhf.types import Comparison, Prompt


Proposal: TypeAlias = Literal["reference", "policy"]


class RSOSampler(AbstractPairSampler):
    """Samples a pool of n responses, and accepts two of them by statistical rejection sampling.

    RSO (Liu et al. 2023, arXiv 2309.06657, algorithm 1). A response of reward r is accepted with probability
    ``exp((r - r_max) / temperature)``, where r_max is the largest reward of the pool. Accepted responses of a large
    pool follow ``proposal * exp(r / temperature)``: from the reference, that is the optimal policy of the reward under
    a KL penalty of strength ``temperature``. While fewer than two are accepted, the others are tried again, with r_max
    their own largest reward. In a small pool the target's responses may be missing, and accepted rewards are lower than
    the target's.

    The paper samples 64 responses, accepts 8 and makes several pairs of them; here a prompt has one pair per round.
    Two equal responses may be accepted. The reward is a model that chooses pairs, and the labeler labels them.

    Args:
        reward: scores the responses, on the scale of ``temperature``.
        n: responses per prompt, >= 2; each is decoded, and two are labeled.
        temperature: > 0, called beta in the paper, which uses 0.5; ``.inf`` accepts the first two responses.
        proposal: the model that the pool is sampled from. ``policy`` is RSO with the policy in the place of the
            reference: the target is the policy, tilted by the reward.

    Raises:
        ValueError: if n or temperature is out of range, or ``proposal`` is unknown.
    """

    def __init__(
        self, reward: AbstractReward, n: int = 64, temperature: float = 0.5, proposal: Proposal = "reference"
    ) -> None:
        check_plugin("RSOSampler.reward", reward, AbstractReward)
        if n < 2 or not temperature > 0:
            raise ValueError(f"RSOSampler needs n >= 2 and temperature > 0; got {n} and {temperature}")
        if proposal not in get_args(Proposal):
            raise ValueError(f"RSOSampler.proposal must be one of {', '.join(get_args(Proposal))}; got {proposal!r}")
        self.reward, self.n, self.temperature, self.proposal = reward, n, temperature, proposal
        self.passes_per_pair = float(n)
        self.method = f"RSO (Liu 2023), N={n}"
        symbol = "π_ref" if proposal == "reference" else "π_θ"
        self.first_distribution = self.second_distribution = f"{symbol} exp(r/T), by rejection"

    def sample(self, prompts: Sequence[Prompt], engine: AbstractEngine, key: Key) -> list[Comparison]:
        """Sample a pool per prompt in one batch and accept two responses; branch ``"rso"``.

        ``meta`` holds the two rewards, ``"score_a"`` and ``"score_b"``.
        """
        # mix = -1: (1 + mix) h_theta - mix h_ref = h_ref
        mix = -1.0 if self.proposal == "reference" else 0.0
        pool = engine.generate(pool_requests(prompts, self.n, key, mix))
        scores = checked_score(self.reward, repeated(prompts, self.n), pool).reshape(len(prompts), self.n)
        comparisons = []
        for i, prompt in enumerate(prompts):
            # each pass accepts at least one response, so that two passes are enough
            uniforms = key.fold(prompt.index, COIN).uniforms(2 * self.n).reshape(2, self.n)
            first, second = accepted(scores[i], 2, self.temperature, uniforms)
            a, b = pool[i * self.n + first], pool[i * self.n + second]
            meta = {"score_a": float(scores[i, first]), "score_b": float(scores[i, second])}
            comparisons.append(Comparison(prompt, a, b, branch="rso", passes=self.passes_per_pair, meta=meta))
        return comparisons


def accepted(rewards: Tensor, count: int, temperature: float, uniforms: Tensor) -> list[int]:
    """Positions of the responses that rejection sampling accepts, in order of acceptance; ``count`` different ones.

    Liu et al. 2023 (arXiv 2309.06657, algorithm 1).

    Args:
        rewards: reward of each response; shape [n], n >= count.
        count: responses to accept, >= 1.
        temperature: > 0, may be infinite.
        uniforms: random numbers in [0, 1) of each pass over the responses; shape [count, n].
    """
    found: list[int] = []
    remaining = torch.ones(len(rewards), dtype=torch.bool)
    for numbers in uniforms:
        # P(accept) = exp((r - r_max) / T) with r_max over the remainder, whose best response is always accepted
        probabilities = torch.exp((rewards - rewards[remaining].max()) / temperature)
        passed = (remaining & (numbers < probabilities)).nonzero()[:, 0].tolist()
        found += passed[: count - len(found)]
        if len(found) == count:
            break
        remaining[passed] = False
    return found
