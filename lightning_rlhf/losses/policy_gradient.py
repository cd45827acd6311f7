"""Policy-gradient losses as pure functions: one value per token; the caller weights and sums them.

Log-probabilities are those of the distribution that the tokens were sampled from, at its temperature, in nats.
Advantages and the values at sampling time carry no gradient. The formulas of returns and advantages are in
`lightning_rlhf.estimators.returns`.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_rlhf.estimators.kl import k2, k3


KLPlacement: TypeAlias = Literal["reward", "loss_k2", "loss_k3", "loss_k3_ratio"]
Aggregation: TypeAlias = Literal["sum", "sequence_mean", "token_mean", "max_length"]


def reinforce_loss(logps: Tensor, advantages: Tensor) -> Tensor:
    """REINFORCE loss of each token; any shape.

    Williams 1992. With the advantage ``Z_t - V(X_t)`` it is the policy loss of RLAIF vs. RLHF (arXiv 2309.00267v2,
    appendix F). Its expected gradient is that of -J as long as the tokens were sampled from the current policy.

    Args:
        logps: log pi of each token; carries gradient.
        advantages: advantage of each token; detached here.
    """
    # L_t = -A_t log pi(a_t | x_t), with no gradient through A_t
    return -logps * advantages.detach()


def clipped_loss(logps: Tensor, sampling_logps: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """PPO's clipped surrogate loss of each token; any shape.

    Schulman et al. 2017 (arXiv 1707.06347, eq. 7). While the policy is the one that sampled the tokens, rho = 1 and the
    gradient is that of `reinforce_loss`.

    Args:
        logps: log pi of each token; carries gradient.
        sampling_logps: log pi of each token at sampling time.
        advantages: advantage of each token; detached here.
        clip: clip range of the ratio around 1, > 0; the paper uses 0.2.
    """
    # rho_t = pi(a_t | x_t) / pi_sampling(a_t | x_t)
    ratio = (logps - sampling_logps.detach()).exp()
    advantages = advantages.detach()
    # L_t = -min(rho A, clip(rho, 1 - clip, 1 + clip) A) = max(-rho A, -clip(rho, ...) A)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1.0 - clip, 1.0 + clip))


def clipped_share(logps: Tensor, sampling_logps: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Whether clipping removed the gradient of a token, 0 or 1; any shape, detached. Arguments as in `clipped_loss`."""
    log_ratio = (logps - sampling_logps).detach()
    ratio = log_ratio.exp()
    # the max of `clipped_loss` takes the constant branch only if the ratio has moved in the direction of the advantage
    return (((advantages > 0) & (ratio > 1.0 + clip)) | ((advantages < 0) & (ratio < 1.0 - clip))).to(logps.dtype)


def value_loss(values: Tensor, targets: Tensor) -> Tensor:
    """Squared error of the value of each token (arXiv 2309.00267v2, appendix F); any shape.

    Args:
        values: V(X_t); carries gradient.
        targets: target of V, such as the return Z_t; detached here.
    """
    # L_t = (Z_t - V(X_t))^2
    return (targets.detach() - values).square()


def clipped_value_loss(values: Tensor, sampling_values: Tensor, targets: Tensor, clip: float) -> Tensor:
    """Squared error of the value of each token, with the change of the value clipped; any shape.

    From the PPO code of OpenAI Baselines; not in the paper.

    Args:
        values: V(X_t); carries gradient.
        sampling_values: V(X_t) at sampling time.
        targets: target of V; detached here.
        clip: clip range of V around its value at sampling time, > 0.
    """
    # V_clip = V_old + clip(V - V_old, -clip, clip)
    clipped = sampling_values.detach() + (values - sampling_values.detach()).clamp(-clip, clip)
    # L_t = max((Z_t - V)^2, (Z_t - V_clip)^2)
    return torch.maximum(value_loss(values, targets), value_loss(clipped, targets))


def kl_loss(
    logps: Tensor, reference_logps: Tensor, placement: KLPlacement, sampling_logps: Tensor | None = None
) -> Tensor:
    """KL term of each token in the loss, unclamped; any shape. 0 where the KL is in the reward.

    On tokens sampled from the policy at state X_t, the expected gradient of ``loss_k2`` is that of KL(pi || pi_ref) at
    X_t. The expected gradient of ``loss_k3`` is that of KL(pi_ref || pi), although the expected value of k3 is
    KL(pi || pi_ref). ``loss_k3_ratio`` is k3 times rho = pi / pi_sampling, through which the gradient flows too
    (DeepSeek-V3.2, arXiv 2512.02556; the default of TRL's GRPO): its expected gradient is that of KL(pi || pi_ref),
    also on tokens of an earlier policy. All of them ignore the effect of a token on later states. Only ``reward`` has
    the gradient of the KL of whole responses.

    Args:
        logps: log pi of each token; carries gradient.
        reference_logps: log pi_ref of each token.
        placement: where the KL is.
        sampling_logps: log pi when the token was sampled; for ``loss_k3_ratio``, whose default
            takes the policy to have sampled the tokens.
    """
    if placement == "reward":
        # the return and so the advantage holds it already
        return torch.zeros_like(logps)
    if placement == "loss_k3_ratio":
        # rho has value 1 without log-probabilities at sampling, but still the gradient of log pi
        sampled = logps if sampling_logps is None else sampling_logps
        # L_t = rho_t k3_t with rho_t = pi(a_t | x_t) / pi_sampling(a_t | x_t)
        return (logps - sampled.detach()).exp() * k3(logps, reference_logps.detach())
    # L_t = log(pi / pi_ref)^2 / 2 or pi_ref / pi - 1 - log(pi_ref / pi)
    return (k2 if placement == "loss_k2" else k3)(logps, reference_logps.detach())


def response_weights(lengths: Tensor, aggregation: Aggregation, mean_length: float, max_length: int) -> Tensor:
    """Weight of the summed token losses of each response in the mean over responses; [responses].

    Args:
        lengths: tokens of each response, [responses].
        aggregation: ``sum`` sums over the tokens of a response, as the gradient of J requires; ``sequence_mean``
            averages over them (GRPO), ``token_mean`` averages over all tokens of the optimizer step (TRL's PPO, DAPO),
            ``max_length`` divides by the token limit (Dr. GRPO).
        mean_length: mean length of the responses of the optimizer step, over all ranks, tokens.
        max_length: token limit of a response.
    """
    # loss = mean_i w_i sum_t L_{i,t} with w_i = 1, 1/|y_i|, 1/mean |y| or 1/max_length
    # lengths are integers, weights are not
    ones = torch.ones_like(lengths, dtype=torch.get_default_dtype())
    if aggregation == "sequence_mean":
        return ones / lengths
    return ones / {"sum": 1.0, "token_mean": mean_length, "max_length": float(max_length)}[aggregation]
