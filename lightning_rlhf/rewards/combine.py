"""From the rewards of several members to one: pure functions of [..., members].

Variance and standard deviation are those of the members at hand, divided by their number k and not by k - 1, as in
Coste et al. 2023 (arXiv 2310.02743) and UP-RLHF (arXiv 2401.00243); one member has deviation 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor


CombineRule = Literal["mean", "lcb", "uwo", "wco"]


def combine(members: Tensor, rule: CombineRule = "mean", coefficient: float = 1.0) -> Tensor:
    """Make one reward of those of the members; [..., members] -> [...].

    Args:
        members: rewards, on one scale: standardised, or of members that were trained alike.
        rule: ``mean`` is the mean; ``lcb`` the mean less ``coefficient`` standard deviations (arXiv 2401.16635);
            ``uwo`` the mean less ``coefficient`` variances, and ``wco`` the lowest reward (both arXiv 2310.02743).
        coefficient: how much disagreement costs, >= 0; ``mean`` and ``wco`` do not use it.

    Raises:
        ValueError: if there is no such rule, or the coefficient is negative.
    """
    check_rule(rule, coefficient)
    # worst case over the members
    if rule == "wco":
        return members.amin(-1)
    # mean - c std (lcb), mean - c var (uwo)
    mean = members.mean(-1)
    if rule == "mean":
        return mean
    return mean - coefficient * (disagreement(members) if rule == "lcb" else disagreement(members).square())


def check_rule(rule: str, coefficient: float) -> None:
    """Raise unless `combine` knows the rule and the coefficient."""
    if rule not in get_args(CombineRule):
        raise ValueError(f"combine must be one of {', '.join(get_args(CombineRule))}; got {rule!r}")
    # also refuses NaN
    if not coefficient >= 0:
        raise ValueError(f"the coefficient of combine={rule} must be >= 0; got {coefficient}")


def disagreement(members: Tensor) -> Tensor:
    """Standard deviation over the members, divided by k; [..., members] -> [...]."""
    # sqrt(sum_k (r_k - mean)^2 / k): with k - 1 a single member would give NaN
    return members.std(-1, correction=0)


def standardised(members: Tensor, means: Sequence[float], stds: Sequence[float]) -> Tensor:
    """Put every member on one scale, by its own mean and deviation on held-out data; the shape stays.

    Without it the member with the widest scale decides every minimum and every variance.

    Args:
        members: rewards, [..., members].
        means: mean reward of each member.
        stds: standard deviation of the rewards of each member, > 0.
    """
    # (r_k - mean_k) / std_k
    return (members - members.new_tensor(means)) / members.new_tensor(stds)
