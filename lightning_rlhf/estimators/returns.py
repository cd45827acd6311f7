"""From rewards of whole responses to returns and advantages of tokens, as pure functions.

Tensors have shape [responses, tokens], one row per response, and are 0 behind its end. State X_t is the prompt with the
tokens before t, action A_t is token t, and gamma is 1 unless said otherwise: the reward of a response arrives at its
last token, which is EOS unless the token limit cut it.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor


Objective: TypeAlias = Literal["convex", "penalty"]


def objective_weights(objective: Objective, beta: float) -> tuple[float, float]:
    """Weights of reward and KL in the objective.

    ``convex`` is J = (1 - beta) E[r] - beta KL (RLAIF vs. RLHF, arXiv 2309.00267v2, section 2.2), ``penalty`` is
    J = E[r] - beta KL (its v1, and most of the literature).

    Args:
        objective: name of the objective.
        beta: strength of the pull towards the reference; in [0, 1] for ``convex``, >= 0 for ``penalty``.

    Raises:
        ValueError: if beta is out of range.
    """
    if not 0 <= beta < float("inf") or (objective == "convex" and beta > 1):
        raise ValueError(f"beta must lie in {'[0, 1]' if objective == 'convex' else '[0, inf)'}; got {beta}")
    return (1.0 - beta if objective == "convex" else 1.0), beta


def kl_price(objective: Objective, beta: float) -> float:
    """What a nat of KL costs in units of the reward: J is proportional to E[r] - price * KL; infinite if r is free."""
    reward_weight, kl_weight = objective_weights(objective, beta)
    return kl_weight / reward_weight if reward_weight > 0 else float("inf")


def token_mask(lengths: Tensor, tokens: int) -> Tensor:
    """Which places hold a token; bool, [responses, tokens]."""
    return torch.arange(tokens, device=lengths.device) < lengths[:, None]


def token_rewards(
    rewards: Tensor, log_ratios: Tensor, lengths: Tensor, reward_weight: float, kl_weight: float
) -> Tensor:
    """Reward of each token: the KL penalty of its own, and at the last token the reward of the response.

    ``rho_t = reward_weight * R [t = T] - kl_weight * (log pi(A_t|X_t) - log pi_ref(A_t|X_t))``; detached. Its sum over
    a sampled response is an unbiased estimate of J, so its gradient by REINFORCE is that of J (Jaques et al. 2017,
    arXiv 1611.02796; Stiennon et al. 2020, arXiv 2009.01325).

    Args:
        rewards: reward R of each response, [responses].
        log_ratios: log pi - log pi_ref of each token under the law it was drawn from, nats, [responses, tokens]; what
            stands behind the end of a response is not read.
        lengths: tokens of each response, >= 1, [responses].
        reward_weight: factor on the reward.
        kl_weight: factor on the penalty; 0 where the KL is in the loss.
    """
    mask = token_mask(lengths, log_ratios.shape[1])
    penalties = (-kl_weight * log_ratios.detach()).masked_fill(~mask, 0.0)
    return penalties.scatter_add(1, (lengths - 1)[:, None], reward_weight * rewards.detach().to(penalties)[:, None])


def returns_to_go(rewards: Tensor) -> Tensor:
    """Sum of the rewards of a token and of all later ones, ``Z_t = sum_{s >= t} rho_s``; [responses, tokens]."""
    return rewards.flip(1).cumsum(1).flip(1)


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float = 1.0, lam: float = 0.95) -> Tensor:
    """Generalised advantage estimates, Schulman et al. 2016 (arXiv 1506.02438, eq. 16); [responses, tokens].

    ``A_t = sum_l (gamma lam)^l delta_{t+l}`` with ``delta_t = rho_t + gamma V(X_{t+1}) - V(X_t)``, and V = 0 behind the
    end. At lam = 1 and gamma = 1 it is the return minus the value, at lam = 0 the temporal difference.

    Args:
        rewards: reward of each token, 0 behind the end.
        values: V(X_t) of each token; what stands behind the end is not read.
        lengths: tokens of each response.
        gamma: discount per token, in [0, 1].
        lam: weight of later temporal differences, in [0, 1].
    """
    mask = token_mask(lengths, rewards.shape[1])
    values = values.masked_fill(~mask, 0.0)
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    deltas = rewards + gamma * following - values
    advantages = torch.zeros_like(deltas)
    running = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        running = deltas[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages.masked_fill(~mask, 0.0)


def group_sums(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the values of each response's group, and its size; both [responses]."""
    totals = values.new_zeros(int(groups.max()) + 1)
    sums, sizes = totals.index_add(0, groups, values), totals.index_add(0, groups, torch.ones_like(values))
    return sums[groups], sizes[groups]


def leave_one_out(scores: Tensor, groups: Tensor) -> Tensor:
    """Score of each response minus the mean of the others of its prompt; [responses].

    RLOO, Ahmadian et al. 2024 (arXiv 2402.14740, eq. 7): ``k/(k-1) (R_i - mean)``. The baseline does not depend on the
    response itself, so that the gradient stays unbiased; with the mean of all k it would shrink to (k-1)/k.

    Args:
        scores: return of each whole response, [responses].
        groups: number of the prompt of each response, [responses].

    Raises:
        ValueError: if a prompt has a single response.
    """
    sums, sizes = group_sums(scores, groups)
    if bool((sizes < 2).any()):
        raise ValueError(
            "a leave-one-out baseline needs at least two responses per prompt; raise data.responses_per_prompt"
        )
    return scores - (sums - scores) / (sizes - 1)


def group_relative(scores: Tensor, groups: Tensor, divide_by_std: bool = True, epsilon: float = 1e-4) -> Tensor:
    """Score of each response relative to its prompt's others, ``(R_i - mean) / (std + epsilon)``; [responses].

    GRPO, Shao et al. 2024 (arXiv 2402.03300, section 4.1.2), and without the division Dr. GRPO, Liu et al. 2025 (arXiv
    2503.20783). The std has k - 1 in its denominator. The mean holds the response itself, which shrinks the gradient by
    (k-1)/k; dividing weighs prompts by the inverse of their spread, which changes its direction. Groups whose scores
    are all equal get 0.

    Args:
        scores: return of each whole response, [responses].
        groups: number of the prompt of each response, [responses].
        divide_by_std: whether to divide.
        epsilon: keeps small spreads from blowing up, > 0.

    Raises:
        ValueError: if a prompt has a single response.
    """
    sums, sizes = group_sums(scores, groups)
    if bool((sizes < 2).any()):
        raise ValueError(
            "group-relative advantages need at least two responses per prompt; raise data.responses_per_prompt"
        )
    centred = scores - sums / sizes
    if not divide_by_std:
        return centred
    squares, _ = group_sums(centred.square(), groups)
    return centred / ((squares / (sizes - 1)).sqrt() + epsilon)


def whiten(advantages: Tensor, lengths: Tensor) -> Tensor:
    """Shift and scale so that real tokens have mean 0 and standard deviation 1; [responses, tokens].

    This changes the balance between reward and KL, so that beta no longer means what the objective says.
    """
    mask = token_mask(lengths, advantages.shape[1])
    real = advantages[mask]
    std = real.std(correction=0) if len(real) > 1 else torch.ones_like(real).sum()
    return ((advantages - real.mean()) / (std + 1e-8)).masked_fill(~mask, 0.0)
