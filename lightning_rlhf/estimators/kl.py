"""Estimators of KL(policy || reference) from the log-probabilities of tokens that the policy sampled.

Schulman 2020, "Approximating KL divergence". With ``log_ratio = log pi_theta - log pi_ref`` of a sampled token:

* k1 = log_ratio: unbiased, may be negative, high variance;
* k2 = log_ratio^2 / 2: never negative, biased upward or downward, low variance while the two laws are close;
* k3 = exp(-log_ratio) - 1 + log_ratio: never negative and unbiased.

"Unbiased" holds for samples of the policy at temperature 1 over its whole vocabulary. Nothing is clamped: a clamped k1
is biased upward. All values are in nats. Summed over the tokens of sampled responses, k1 and k3 are unbiased for the KL
between the laws of whole responses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def k1(policy_logps: Tensor, reference_logps: Tensor) -> Tensor:
    """Log-ratio of each token, the unbiased estimator; any shape."""
    return policy_logps - reference_logps


def k2(policy_logps: Tensor, reference_logps: Tensor) -> Tensor:
    """Half the squared log-ratio of each token, biased; any shape.

    Its expectation is ``E[(log pi_theta/pi_ref)^2] / 2``, which equals the KL to second order in the log-ratio. Its
    gradient on policy samples is the unbiased gradient of the KL, which that of k1 is not.
    """
    return (policy_logps - reference_logps) ** 2 / 2


def k3(policy_logps: Tensor, reference_logps: Tensor) -> Tensor:
    """Non-negative unbiased estimator of each token; any shape.

    Unbiased because ``E[pi_ref/pi_theta] = 1`` under the policy. Where the reference makes a token much more likely
    than the policy did, the exponential dominates, and overflows beyond 88 nats in float32: infinity is then reported.
    """
    log_ratio = reference_logps - policy_logps
    return torch.expm1(log_ratio) - log_ratio


def categorical_kl(log_policy: Tensor, log_reference: Tensor) -> Tensor:
    """Exact KL(policy || reference) of whole distributions, nats.

    Args:
        log_policy: normalised log-probabilities; shape [..., outcomes]. Outcomes of probability zero count nothing.
        log_reference: the same of the reference.
    """
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
        reference_logps: log pi_ref of the same tokens; same shape. Padding may hold anything, NaN included.
        lengths: number of real tokens of each row; integer, shape [sequences].
        estimator: `k1`, `k2` or `k3`, or another function that is 0 where the two agree.
    """
    mask = torch.arange(policy_logps.shape[1], device=lengths.device) < lengths[:, None]
    # Padding is replaced before the estimator: masked afterwards, a NaN would survive in the gradient.
    policy_logps, reference_logps = (logps.where(mask, 0.0) for logps in (policy_logps, reference_logps))
    return estimator(policy_logps, reference_logps).sum(1)


def kl_per_token(
    policy_logps: Tensor,
    reference_logps: Tensor,
    lengths: Tensor,
    estimator: Callable[[Tensor, Tensor], Tensor] = k1,
) -> Tensor:
    """Average a per-token estimator over all real tokens of all responses, nats per token; a scalar.

    Long responses count in proportion to their length. Arguments as in `kl_per_sequence`.

    Raises:
        ValueError: if there is no token at all.
    """
    if not bool((lengths > 0).any()):
        raise ValueError(f"a mean over tokens needs at least one token; got lengths {lengths.tolist()}")
    return kl_per_sequence(policy_logps, reference_logps, lengths, estimator).sum() / lengths.sum()


def pad_ragged(rows: Sequence[Tensor] | Sequence[Sequence[float]]) -> tuple[Tensor, Tensor]:
    """Pad rows of per-token numbers with zeros on the right: values [sequences, tokens] and lengths [sequences].

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
