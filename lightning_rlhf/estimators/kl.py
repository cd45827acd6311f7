"""Estimators of KL(policy || reference) from the log-probabilities of tokens that the policy sampled.

Schulman 2020, "Approximating KL divergence". With ``log_ratio = log pi_theta - log pi_ref`` of a sampled token:

* k1 = log_ratio: unbiased, may be negative, high variance;
* k2 = log_ratio^2 / 2: never negative, biased upward or downward, low variance while the two distributions are close;
* k3 = exp(-log_ratio) - 1 + log_ratio: never negative and unbiased.

"Unbiased" holds for samples of the policy at temperature 1 over its whole vocabulary. Nothing is clamped: a clamped k1
is biased upward. All values are in nats. Summed over the tokens of sampled responses, k1 and k3 are unbiased for the KL
between the distributions of whole responses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def k1(policy_logps: Tensor, reference_logps: Tensor) -> Tensor:
    """Log-ratio of each token, unbiased; nats, any shape.

    Args:
        policy_logps: log pi_theta of each sampled token, nats.
        reference_logps: log pi_ref of the same tokens, nats; same shape.
    """
    # k1 = log(pi_theta / pi_ref)
    return policy_logps - reference_logps


def k2(policy_logps: Tensor, reference_logps: Tensor) -> Tensor:
    """Half the squared log-ratio of each token, biased; nats, any shape. Arguments as in `k1`.

    Its expectation is ``E[(log pi_theta/pi_ref)^2] / 2``, which equals the KL to second order in the log-ratio. Its
    gradient on policy samples is an unbiased gradient of the KL. The gradient of k1 is not: its expectation is 0.
    """
    # k2 = log(pi_theta / pi_ref)^2 / 2
    return (policy_logps - reference_logps) ** 2 / 2


def k3(policy_logps: Tensor, reference_logps: Tensor) -> Tensor:
    """Non-negative, unbiased estimate of each token; nats, any shape. Arguments as in `k1`.

    Unbiased because ``E[pi_ref/pi_theta] = 1`` under the policy. Where the reference gives a token a much higher
    probability than the policy, the exponential dominates. Beyond 88 nats it overflows float32 and the result is inf.
    """
    # k3 = u - 1 - log u with u = pi_ref / pi_theta; expm1 keeps the digits where the two models are close
    log_ratio = reference_logps - policy_logps
    return torch.expm1(log_ratio) - log_ratio


def categorical_kl(log_policy: Tensor, log_reference: Tensor) -> Tensor:
    """Exact KL(policy || reference) of whole distributions, nats; shape [...].

    Args:
        log_policy: normalized log-probabilities; shape [..., outcomes]. Outcomes of probability zero contribute 0.
        log_reference: normalized log-probabilities of the reference; same shape.
    """
    # KL = sum_y p(y) log(p(y) / q(y)), with 0 log 0 = 0: `where`, since 0 * -inf would be NaN
    probabilities = log_policy.exp()
    terms = torch.where(probabilities > 0, log_policy - log_reference, torch.zeros_like(log_policy))
    return (probabilities * terms).sum(-1)


def kl_per_sequence(
    policy_logps: Tensor,
    reference_logps: Tensor,
    lengths: Tensor,
    estimator: Callable[[Tensor, Tensor], Tensor] = k1,
) -> Tensor:
    """Sum a per-token estimator over each response, nats per response; shape [sequences].

    Args:
        policy_logps: log pi_theta of sampled tokens, padded on the right; shape [sequences, tokens].
        reference_logps: log pi_ref of the same tokens; same shape. Padding may hold any value, NaN included.
        lengths: number of real tokens of each row; integer, shape [sequences].
        estimator: `k1`, `k2`, `k3` or another function that is 0 where the two arguments agree.
    """
    mask = torch.arange(policy_logps.shape[1], device=lengths.device) < lengths[:, None]
    # mask the inputs, not the result: the gradient of a masked NaN is still NaN
    policy_logps, reference_logps = (logps.where(mask, 0.0) for logps in (policy_logps, reference_logps))
    return estimator(policy_logps, reference_logps).sum(1)


def kl_per_token(
    policy_logps: Tensor,
    reference_logps: Tensor,
    lengths: Tensor,
    estimator: Callable[[Tensor, Tensor], Tensor] = k1,
) -> Tensor:
    """Average a per-token estimator over all response tokens of the batch, nats per token; a scalar.

    A response counts in proportion to its length. Arguments as in `kl_per_sequence`.

    Raises:
        ValueError: if there are no tokens.
    """
    if not bool((lengths > 0).any()):
        raise ValueError(f"a mean over tokens needs at least one token; got lengths {lengths.tolist()}")
    return kl_per_sequence(policy_logps, reference_logps, lengths, estimator).sum() / lengths.sum()


def pad_ragged(rows: Sequence[Tensor] | Sequence[Sequence[float]]) -> tuple[Tensor, Tensor]:
    """Pad rows of per-token values with zeros on the right: values [sequences, tokens] and lengths [sequences].

    Args:
        rows: one row per response, as tensors (dtype and gradient are kept) or as Python numbers (float64).

    Raises:
        ValueError: if there are no rows.
    """
    if not rows:
        raise ValueError("expected at least one row of per-token log-probabilities; got none")
    tensors = [row if isinstance(row, Tensor) else torch.tensor(row, dtype=torch.float64) for row in rows]
    lengths = torch.tensor([len(row) for row in tensors], device=tensors[0].device)
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True), lengths
