"""A mean with its standard error, equal on one process and on many."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


def moments_of(values: Tensor) -> Tensor:
    """Count, mean and sum of squared deviations of some numbers; shape [3], float64."""
    values = values.detach().double().flatten()
    if values.numel() == 0:
        return values.new_zeros(3)
    mean = values.mean()
    return torch.stack([values.new_tensor(float(values.numel())), mean, (values - mean).square().sum()])


def merge_moments(moments: Tensor) -> Tensor:
    """Pool the moments of several groups of numbers; shape [groups, 3] -> [3].

    Chan, Golub and LeVeque 1983, over any number of groups. Sums of plain squares would cancel where the mean is large
    against the std, as it is for log-probabilities of long responses.
    """
    counts, means, deviations = moments.unbind(dim=-1)
    count = counts.sum()
    # clamp: the mean of no numbers is 0, as NaN would spoil every later merge
    mean = (counts * means).sum() / count.clamp(min=1.0)
    # M2 = sum_g M2_g + sum_g n_g (mean_g - mean)^2
    return torch.stack([count, mean, deviations.sum() + (counts * (means - mean).square()).sum()])


class MeanWithError(Metric):
    """Mean of all numbers seen, and the standard error of that mean.

    The standard error is s / sqrt(n), with the sample deviation s (n - 1 in the denominator): it assumes
    independent samples. States are float64 under every Trainer precision, and pooled over processes when `compute` is
    called. Without numbers the mean is NaN, and with fewer than two so is its standard error.
    """

    is_differentiable = False
    full_state_update = False

    moments: Tensor

    def __init__(self, *, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.add_state("moments", torch.zeros(3, dtype=torch.float64), dist_reduce_fx=merge_moments)

    def update(self, values: Tensor) -> None:
        """Take in numbers of any shape."""
        self.moments = merge_moments(torch.stack([self.moments, moments_of(values).to(self.moments.device)]))

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean and standard error; two float64 scalars."""
        count, mean, deviations = self.moments.unbind()
        nan = torch.full_like(mean, float("nan"))
        # stderr = s / sqrt(n) with s^2 = M2 / (n - 1)
        error = torch.where(count > 1, (deviations / (count - 1).clamp(min=1.0) / count.clamp(min=1.0)).sqrt(), nan)
        return torch.where(count > 0, mean, nan), error


def mean_with_error(values: Tensor) -> tuple[float, float]:
    """Mean and standard error of numbers that every process already holds; see `MeanWithError`."""
    # every process holds all numbers: pooled, each would count once per process
    metric = MeanWithError(sync_on_compute=False)
    metric.update(values)
    mean, error = metric.compute()
    return mean.item(), error.item()
