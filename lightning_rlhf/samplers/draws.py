"""What the samplers share: names of random streams, pools of draws, and implicit rewards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_rlhf.generation.base import Request
from lightning_rlhf.randomness import Key
from lightning_rlhf.types import Prompt, Response


FIRST, SECOND, COIN = 0, 1, 2
"""Last step of a key's path, after the prompt index: the stream of y^a, of y^b, and of the sampler's own choice."""


def coin(prompt: Prompt, key: Key) -> float:
    """The uniform number on [0, 1) by which a sampler decides how to treat a prompt."""
    return float(key.fold(prompt.index, COIN).uniforms(1))


def policy_pair(prompt: Prompt, key: Key) -> tuple[Request, Request]:
    """Requests for two independent draws from pi_theta."""
    return Request(prompt, key.fold(prompt.index, FIRST)), Request(prompt, key.fold(prompt.index, SECOND))


def pool_requests(prompts: Sequence[Prompt], count: int, key: Key) -> list[Request]:
    """Requests for a pool of ``count`` independent draws from pi_theta per prompt, prompt by prompt."""
    # streams from COIN + 1 on: FIRST and SECOND are left to two-draw samplers
    return [Request(prompt, key.fold(prompt.index, COIN + 1 + i)) for prompt in prompts for i in range(count)]


def implicit_rewards(drawn: Sequence[Response], beta: float) -> Tensor:
    """Implicit rewards, beta * log(pi_theta / pi_ref), of responses with both log-probabilities; float64, [drawn]."""
    return torch.tensor([beta * response.log_ratio() for response in drawn], dtype=torch.float64)


def implicit_reward_gap(a: Response, b: Response, beta: float) -> float:
    """Delta = r_theta(a) - r_theta(b), with the implicit reward r_theta = beta * log(pi_theta / pi_ref).

    Args:
        a: first response, with log-probabilities under policy and reference.
        b: second response, likewise.
        beta: the DPO beta, > 0.
    """
    return beta * (a.log_ratio() - b.log_ratio())
