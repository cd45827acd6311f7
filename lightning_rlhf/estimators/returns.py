"""Per-token returns and advantages from rewards of whole responses, as pure functions.

Tensors have shape [responses, tokens], one row per response, and are 0 in the padding. State X_t is the prompt with the
tokens before t, action A_t is token t, and gamma is 1 unless stated otherwise. The reward of a response arrives at its
last token, which is EOS unless the response reached the token limit.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor


Objective: TypeAlias = Literal["convex", "penalty"]


def objective_weights(objective: Objective, beta: float) -> tuple[float, float]:
    """Weights of reward and KL in the objective J.

    ``convex`` is ``J = (1 - beta) E[r] - beta KL`` (RLAIF vs. RLHF, arXiv 2309.00267v2, section 2.2). ``penalty`` is
    ``J = E[r] - beta KL`` (version 1 of that paper, and most of the literature).

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
    """Price of one nat of KL in units of the reward; infinite where the reward has no weight.

    Arguments and errors as in `objective_weights`.
    """
    # J ∝ E[r] - price * KL
    reward_weight, kl_weight = objective_weights(objective, beta)
    return kl_weight / reward_weight if reward_weight > 0 else float("inf")


def token_mask(lengths: Tensor, tokens: int) -> Tensor:
    """True at response tokens, False in the padding; bool, [responses, tokens]."""
    return torch.arange(tokens, device=lengths.device) < lengths[:, None]


def token_rewards(
    rewards: Tensor, log_ratios: Tensor, lengths: Tensor, reward_weight: float, kl_weight: float
) -> Tensor:
    """Reward of each token: its KL penalty, plus the reward of the response at the last token; detached.

    The sum over a sampled response is an unbiased estimate of J. REINFORCE on it therefore follows the gradient of J
    (Jaques et al. 2017, arXiv 1611.02796; Stiennon et al. 2020, arXiv 2009.01325).

    Args:
        rewards: reward R of each response, [responses].
        log_ratios: log pi - log pi_ref of each token under the distribution it was sampled from, nats, [responses,
            tokens]; the padding is not read.
        lengths: tokens of each response, >= 1, [responses].
        reward_weight: factor on the reward.
        kl_weight: factor on the penalty; 0 where the KL is in the loss.
    """
    # rho_t = reward_weight * R [t = T] - kl_weight * (log pi(A_t|X_t) - log pi_ref(A_t|X_t))
    mask = token_mask(lengths, log_ratios.shape[1])
    # masked_fill, not a product with the mask: the padding may hold NaN
    penalties = (-kl_weight * log_ratios.detach()).masked_fill(~mask, 0.0)
    return penalties.scatter_add(1, (lengths - 1)[:, None], reward_weight * rewards.detach().to(penalties)[:, None])


def returns_to_go(rewards: Tensor) -> Tensor:
    """Undiscounted return of each token, the sum of its reward and all later ones; [responses, tokens]."""
    # Z_t = sum_{s >= t} rho_s
    return rewards.flip(1).cumsum(1).flip(1)


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float = 1.0, lam: float = 0.95) -> Tensor:
    """Generalized advantage estimation (GAE), Schulman et al. 2016 (arXiv 1506.02438, eq. 16); [responses, tokens].

    At lam = 1 and gamma = 1 the advantage is the return minus the value, at lam = 0 the temporal difference.

    Args:
        rewards: reward of each token, 0 in the padding; [responses, tokens].
        values: V(X_t) of each token; the padding is not read; [responses, tokens].
        lengths: tokens of each response.
        gamma: discount per token, in [0, 1].
        lam: weight of later temporal differences, in [0, 1].
    """
    mask = token_mask(lengths, rewards.shape[1])
    # V = 0 after the last token: the episode ends there
    values = values.masked_fill(~mask, 0.0)
    # delta_t = rho_t + gamma V(X_{t+1}) - V(X_t)
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    deltas = rewards + gamma * following - values
    advantages = torch.zeros_like(deltas)
    running = torch.zeros_like(deltas[:, 0])
    # A_t = sum_l (gamma lam)^l delta_{t+l} = delta_t + gamma lam A_{t+1}
    for t in reversed(range(deltas.shape[1])):
        running = deltas[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages.masked_fill(~mask, 0.0)


def group_sums(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the values in the group of each response, and the size of the group; both [responses]."""
    totals = values.new_zeros(int(groups.max()) + 1)
    sums, sizes = totals.index_add(0, groups, values), totals.index_add(0, groups, torch.ones_like(values))
    return sums[groups], sizes[groups]


def leave_one_out(scores: Tensor, groups: Tensor) -> Tensor:
    """Return of each response minus the mean return of the other responses to its prompt; [responses].

    RLOO, Ahmadian et al. 2024 (arXiv 2402.14740, eq. 7). The baseline does not depend on the response itself, so that
    the gradient is unbiased. With the mean of all k responses as baseline, it would shrink by a factor (k-1)/k.

    Args:
        scores: return R_i of each whole response, [responses].
        groups: index of the prompt of each response, from 0, [responses].

    Raises:
        ValueError: if a prompt has a single response.
    """
    sums, sizes = group_sums(scores, groups)
    if bool((sizes < 2).any()):
        raise ValueError(
            "a leave-one-out baseline needs at least two responses per prompt; raise data.responses_per_prompt"
        )
    # A_i = R_i - 1/(k-1) sum_{j != i} R_j = k/(k-1) (R_i - mean)
    return scores - (sums - scores) / (sizes - 1)


def group_relative(scores: Tensor, groups: Tensor, divide_by_std: bool = True, epsilon: float = 1e-4) -> Tensor:
    """Return of each response standardized within the responses to its prompt; [responses].

    GRPO, Shao et al. 2024 (arXiv 2402.03300, section 4.1.2). Without the division it is Dr. GRPO, Liu et al. 2025
    (arXiv 2503.20783). The mean includes the response itself, which shrinks the gradient by (k-1)/k. The division
    weights prompts by the inverse of their std, which changes the direction of the gradient. Groups with equal returns
    get 0.

    Args:
        scores: return R_i of each whole response, [responses].
        groups: index of the prompt of each response, from 0, [responses].
        divide_by_std: divide by the std of the group; False is Dr. GRPO.
        epsilon: added to the std, > 0; bounds advantages where the std is small.

    Raises:
        ValueError: if a prompt has a single response.
    """
    sums, sizes = group_sums(scores, groups)
    if bool((sizes < 2).any()):
        raise ValueError(
            "group-relative advantages need at least two responses per prompt; raise data.responses_per_prompt"
        )
    centered = scores - sums / sizes
    if not divide_by_std:
        return centered
    # A_i = (R_i - mean) / (std + epsilon), std with Bessel's correction (k - 1)
    squares, _ = group_sums(centered.square(), groups)
    return centered / ((squares / (sizes - 1)).sqrt() + epsilon)


def whiten(advantages: Tensor, lengths: Tensor) -> Tensor:
    """Standardize advantages over all response tokens of the batch: mean 0, std 1; [responses, tokens].

    Whitening changes the balance of reward and KL: beta is then no longer the one of the objective.

    Args:
        advantages: advantage of each token, [responses, tokens]; the padding is not read.
        lengths: tokens of each response, [responses].
    """
    mask = token_mask(lengths, advantages.shape[1])
    real = advantages[mask]
    # a single token has no std: divide by 1
    std = real.std(correction=0) if len(real) > 1 else torch.ones_like(real).sum()
    # A_t <- (A_t - mean) / (std + 1e-8)
    return ((advantages - real.mean()) / (std + 1e-8)).masked_fill(~mask, 0.0)
