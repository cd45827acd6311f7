"""Policy-gradient losses as pure functions: one value per token, for the caller to weigh and sum.

Log-probabilities are those of the law that the tokens were drawn from, at its temperature, in nats. Advantages and
values at the time of sampling carry no gradient. The formulas of returns and advantages are in
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
    """``-log pi(A_t|X_t) * A_t`` of each token; any shape.

    Williams 1992; with A_t = Z_t - V(X_t) the policy loss of RLAIF vs. RLHF (arXiv 2309.00267v2, appendix F). Its mean
    gradient is that of -J as long as the policy is the one that drew the tokens.

    Args:
        logps: log pi of each token; carries gradient.
        advantages: advantage of each token; detached here.
    """
    return -logps * advantages.detach()


def clipped_loss(logps: Tensor, sampling_logps: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """``max(-A rho, -A clip(rho, 1 - clip, 1 + clip))`` of each token; any shape.

    PPO, Schulman et al. 2017 (arXiv 1707.06347, eq. 7), rho = pi / pi_sampling. On the first pass rho is 1, and its
    gradient that of `reinforce_loss`.

    Args:
        logps: log pi of each token; carries gradient.
        sampling_logps: the same when the token was drawn.
        advantages: advantage of each token; detached here.
        clip: how far the ratio may leave 1 with a gradient, > 0; the paper uses 0.2.
    """
    ratio = (logps - sampling_logps.detach()).exp()
    advantages = advantages.detach()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1.0 - clip, 1.0 + clip))


def clipped_share(logps: Tensor, sampling_logps: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Whether the clip took the gradient of a token, 0 or 1; any shape, detached."""
    log_ratio = (logps - sampling_logps).detach()
    ratio = log_ratio.exp()
    return (((advantages > 0) & (ratio > 1.0 + clip)) | ((advantages < 0) & (ratio < 1.0 - clip))).to(logps.dtype)


def value_loss(values: Tensor, targets: Tensor) -> Tensor:
    """``(Z_t - V(X_t))^2`` of each token (arXiv 2309.00267v2, appendix F); any shape, gradient by the values alone."""
    return (targets.detach() - values).square()


def clipped_value_loss(values: Tensor, sampling_values: Tensor, targets: Tensor, clip: float) -> Tensor:
    """The larger of the squared errors of V and of V kept within ``clip`` of what it was at sampling; any shape.

    From the code of PPO (Baselines); not in the paper.

    Args:
        values: V(X_t); carries gradient.
        sampling_values: V(X_t) when the response was drawn.
        targets: what V should be.
        clip: how far V may move with a gradient, > 0.
    """
    near = sampling_values.detach() + (values - sampling_values.detach()).clamp(-clip, clip)
    return torch.maximum(value_loss(values, targets), value_loss(near, targets))


def kl_loss(
    logps: Tensor, reference_logps: Tensor, placement: KLPlacement, sampling_logps: Tensor | None = None
) -> Tensor:
    """KL term of each token in the loss, unclamped; any shape. 0 where the KL is in the reward.

    On tokens of the policy itself, with X_t as it was drawn: the mean gradient of ``loss_k2`` is that of
    KL(pi || pi_ref) at X_t, the mean gradient of ``loss_k3`` that of KL(pi_ref || pi), though the mean value of k3 is
    KL(pi || pi_ref). ``loss_k3_ratio`` is k3 times rho = pi / pi_sampling, through which the gradient flows too
    (DeepSeek-V3.2, arXiv 2512.02556; what TRL's GRPO does unless told otherwise): its mean gradient is that of
    KL(pi || pi_ref), also on tokens of an earlier policy.

    None of them sees that a token changes which states come later, as a penalty in the reward does: only
    ``reward`` has the gradient of the KL of whole responses.

    Args:
        logps: log pi of each token; carries gradient.
        reference_logps: log pi_ref of each token.
        placement: where the KL is.
        sampling_logps: log pi when the token was drawn; for ``loss_k3_ratio``, which takes the policy to have drawn
            the tokens when this is not given.
    """
    if placement == "reward":
        return torch.zeros_like(logps)
    if placement == "loss_k3_ratio":
        drawn = logps if sampling_logps is None else sampling_logps
        return (logps - drawn.detach()).exp() * k3(logps, reference_logps.detach())
    return (k2 if placement == "loss_k2" else k3)(logps, reference_logps.detach())


def response_weights(lengths: Tensor, aggregation: Aggregation, mean_length: float, max_length: int) -> Tensor:
    """Weight of the summed token losses of each response in a mean over responses; [responses].

    Args:
        lengths: tokens of each response.
        aggregation: ``sum`` adds up the tokens of a response, which the gradient of J asks for; ``sequence_mean``
            averages them (GRPO), ``token_mean`` averages over all tokens of the optimizer step (TRL's PPO, DAPO),
            ``max_length`` divides by the token limit (Dr. GRPO).
        mean_length: mean length of the responses of the whole optimizer step, over all ranks.
        max_length: token limit of decoding.
    """
    ones = torch.ones_like(lengths, dtype=torch.get_default_dtype())
    if aggregation == "sequence_mean":
        return ones / lengths
    return ones / {"sum": 1.0, "token_mean": mean_length, "max_length": float(max_length)}[aggregation]
