"""Helpers shared by the samplers: random streams, requests for pairs and pools, and implicit rewards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_rlhf.generation.base import Request
from lightning_rlhf.randomness import Key
from lightning_rlhf.types import Prompt, Response


FIRST, SECOND, COIN = 0, 1, 2
"""Random streams of a prompt, folded into the key after the prompt index: y^a, y^b, and the choice of the sampler."""


def coin(prompt: Prompt, key: Key) -> float:
    """Uniform random number on [0, 1) with which a sampler chooses the branch of a prompt."""
    return float(key.fold(prompt.index, COIN).uniforms(1))


def policy_pair(prompt: Prompt, key: Key) -> tuple[Request, Request]:
    """Requests for two independent samples of pi_theta."""
    return Request(prompt, key.fold(prompt.index, FIRST)), Request(prompt, key.fold(prompt.index, SECOND))


def policy_pairs(prompts: Sequence[Prompt], key: Key) -> list[Request]:
    """Requests for two independent samples of pi_theta per prompt, y^a before y^b, prompt by prompt."""
    requests: list[Request] = []
    for prompt in prompts:
        requests.extend(policy_pair(prompt, key))
    return requests


def pool_requests(
    prompts: Sequence[Prompt], count: int, key: Key, mix: float = 0.0, temperatures: Sequence[float] = ()
) -> list[Request]:
    """Requests for a pool of ``count`` independent samples per prompt, prompt by prompt; of pi_theta by default.

    Args:
        prompts: the prompts.
        count: samples per prompt.
        key: random numbers of the round.
        mix: as in `Request`.
        temperatures: sample i has ``temperatures[i % len(temperatures)]``. Default: that of the decoding settings.
    """
    requests: list[Request] = []
    for prompt in prompts:
        for i in range(count):
            temperature = temperatures[i % len(temperatures)] if temperatures else None
            # streams from COIN + 1 on, since FIRST and SECOND belong to samplers of two responses
            requests.append(Request(prompt, key.fold(prompt.index, COIN + 1 + i), mix, temperature=temperature))
    return requests


def repeated(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Each prompt ``count`` times in a row: the prompt of each response of `pool_requests`."""
    result: list[Prompt] = []
    for prompt in prompts:
        result.extend([prompt] * count)
    return result


def implicit_rewards(responses: Sequence[Response], beta: float) -> Tensor:
    """Implicit rewards of responses with log-probabilities under both models; nats, float64, [responses]."""
    # r_theta(y) = beta log(pi_theta(y|x) / pi_ref(y|x))
    return torch.tensor([beta * response.log_ratio() for response in responses], dtype=torch.float64)


def implicit_reward_gap(a: Response, b: Response, beta: float) -> float:
    """Implicit-reward gap of a pair, nats.

    Args:
        a: first response, with log-probabilities under policy and reference.
        b: second response, likewise.
        beta: the DPO beta, > 0.
    """
    # delta = r_theta(a) - r_theta(b) with r_theta = beta log(pi_theta / pi_ref)
    return beta * (a.log_ratio() - b.log_ratio())
