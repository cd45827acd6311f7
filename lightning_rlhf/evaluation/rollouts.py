"""Metrics of a round of rollouts: rewards, KL, lengths, repetition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from lightning_rlhf.estimators.kl import k1, k3
from lightning_rlhf.evaluation.metrics import mean_with_error
from lightning_rlhf.types import Rollout


def repetition(ids: Sequence[int], n: int = 3) -> float:
    """Share of the n-grams of a response that came before in it, in [0, 1); 0 for responses shorter than n + 1."""
    # 1 - distinct n-grams / n-grams
    count = len(ids) - n + 1
    return 1.0 - len({tuple(ids[i : i + n]) for i in range(count)}) / count if count > 1 else 0.0


def round_metrics(groups: Sequence[Sequence[Rollout]], earned: Sequence[float]) -> dict[str, float]:
    """Metrics of a round, by name; NaN where they are undefined.

    ``reward``, ``reward_stderr`` and ``reward_std``: mean, standard error and std of the reward over all responses;
    ``earned``: its mean after normalization and penalties; ``uncertainty``: the mean std that the reward reports, if
    any. ``kl/k1`` (unbiased) and ``kl/k3`` (never negative, unbiased): nats per response, at the temperature of
    sampling. ``length``: tokens; ``eos_rate``: share that ended with EOS; ``repetition``: share of repeated trigrams;
    ``length_reward_correlation``: Pearson correlation. ``flat_groups``: share of prompts whose responses
    all earn the same, from which RLOO and GRPO learn nothing; ``nats_per_token``: mean -log pi, an estimate of the
    entropy.

    Args:
        groups: scored rollouts, prompt by prompt.
        earned: reward of each in training, group after group.
    """
    rollouts = list(chain.from_iterable(groups))
    rewards = torch.tensor([r.reward for r in rollouts], dtype=torch.float64)
    lengths = torch.tensor([float(len(r.response.ids)) for r in rollouts], dtype=torch.float64)
    mean, error = mean_with_error(rewards)
    policy_logps = chain.from_iterable(rollout.response.policy_logps or () for rollout in rollouts)
    reference_logps = chain.from_iterable(rollout.response.reference_logps or () for rollout in rollouts)
    policy = torch.tensor(list(policy_logps), dtype=torch.float64)
    reference = torch.tensor(list(reference_logps), dtype=torch.float64)
    metrics = {
        "reward": mean,
        "reward_stderr": error,
        "reward_std": rewards.std().item() if len(rollouts) > 1 else math.nan,
        "earned": sum(earned) / len(earned),
        # sums over the tokens of all responses, divided by the number of responses: nats per response
        "kl/k1": k1(policy, reference).sum().item() / len(rollouts),
        "kl/k3": k3(policy, reference).sum().item() / len(rollouts),
        "length": lengths.mean().item(),
        "eos_rate": sum(r.response.finish_reason == "eos" for r in rollouts) / len(rollouts),
        "repetition": sum(repetition(r.response.ids) for r in rollouts) / len(rollouts),
        "nats_per_token": -policy.mean().item(),
        "length_reward_correlation": correlation(lengths, rewards),
    }
    # `earned` is flat: the rewards of a group are at [start, start + len(group))
    start, flat = 0, 0
    for group in groups:
        flat += len(group) > 1 and len(set(earned[start : start + len(group)])) == 1
        start += len(group)
    metrics["flat_groups"] = flat / len(groups)
    stds = [r.std for r in rollouts if r.std is not None]
    if stds:
        metrics["uncertainty"] = sum(stds) / len(stds)
    return metrics


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson correlation; NaN where either does not vary."""
    x, y = x - x.mean(), y - y.mean()
    # r = x . y / (|x| |y|) of the centered values
    scale = (x.square().sum() * y.square().sum()).sqrt().item()
    return (x @ y).item() / scale if scale > 0 else math.nan
