"""How well a reward model picks the best of n responses, by a gold reward; exact on one process and on many."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_rlhf.evaluation.metrics import merge_moments, moments_of


def best_of_n_gold(proxy: Tensor, gold: Tensor, n: int) -> Tensor:
    """Expected gold reward of the response that the proxy likes best among n of the N at hand; [prompts], float64.

    The mean over all subsets of size n, without sampling any: ``sum_i C(i - 1, n - 1) / C(N, n) gold_(i)``, responses
    sorted by the proxy, which is unbiased for n fresh responses and of far less variance than one subset (Nakano et al.
    2021, arXiv 2112.09332, appendix I). Of responses with equal proxy reward each is picked equally often.

    Args:
        proxy: rewards by the model under test, [prompts, N].
        gold: rewards by the judge, [prompts, N].
        n: responses to choose from, from 1 to N.
    """
    proxy, gold = _checked(proxy, gold, n)
    # below[p, i, j]: the proxy prefers response i to j; [prompts, N, N]
    below = proxy[:, None, :] < proxy[:, :, None]
    equal = proxy[:, None, :] == proxy[:, :, None]
    # equal - 1: each response also equals itself
    return (_chance_of_choice(below.sum(2), equal.sum(2) - 1, proxy.shape[1], n) * gold).sum(1)


def best_of_n_accuracy(proxy: Tensor, gold: Tensor, n: int) -> Tensor:
    """How often the proxy's best of n of the N responses is the gold reward's best as well; [prompts], float64.

    The mean over all subsets of size n, as in `best_of_n_gold`. Any of several equally good responses is right; n = 2
    gives the accuracy on pairs, but for a tie of the proxy, which counts one half unless the gold rewards tie too.

    Args:
        proxy: rewards by the model under test, [prompts, N].
        gold: rewards by the judge, [prompts, N].
        n: responses to choose from, from 1 to N.
    """
    proxy, gold = _checked(proxy, gold, n)
    # response i is chosen, and right, in subsets of i and responses that neither proxy nor gold reward prefers
    no_better = gold[:, None, :] <= gold[:, :, None]
    below = (proxy[:, None, :] < proxy[:, :, None]) & no_better
    equal = (proxy[:, None, :] == proxy[:, :, None]) & no_better
    return _chance_of_choice(below.sum(2), equal.sum(2) - 1, proxy.shape[1], n).sum(1)


def _chance_of_choice(below: Tensor, equal: Tensor, total: int, n: int) -> Tensor:
    """Chance that a random subset of size n holds a response, others of two kinds only, and that it is picked there.

    With m of the ``equal`` responses in the subset it is picked with chance 1 / (m + 1):
    ``sum_m C(below, n - 1 - m) C(equal, m) / (m + 1) / C(total, n)``.
    """
    chance = torch.zeros(below.shape, dtype=torch.float64, device=below.device)
    # in logarithms: a quotient of large binomials, of which each alone may overflow
    whole = _log_choose(torch.tensor(total, device=below.device), n)
    for m in range(min(n - 1, int(equal.max())) + 1):
        chance += (_log_choose(below, n - 1 - m) + _log_choose(equal, m) - whole).exp() / (m + 1)
    return chance


def _log_choose(n: Tensor, k: int) -> Tensor:
    """Logarithm of the number of ways to choose k of n; -inf if there are not so many."""
    n = n.double()
    # log C(n, k) = lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)
    ways = torch.lgamma(n + 1) - torch.lgamma(n.new_tensor(k + 1.0)) - torch.lgamma((n - k).clamp_min(0) + 1)
    return ways.masked_fill(n < k, -torch.inf)


def _checked(proxy: Tensor, gold: Tensor, n: int) -> tuple[Tensor, Tensor]:
    if proxy.ndim != 2 or proxy.shape != gold.shape:
        raise ValueError(
            f"proxy and gold rewards must both have shape [prompts, N]; got {tuple(proxy.shape)} and "
            f"{tuple(gold.shape)}"
        )
    if not 1 <= n <= proxy.shape[1]:
        raise ValueError(f"the best of n={n} cannot be told from {proxy.shape[1]} responses per prompt; sample more")
    return proxy.detach().double(), gold.detach().double()


class BestOfN(Metric):
    """Quality of a reward model's choice among n responses, over held-out prompts with N scored responses each.

    `compute` returns float64 scalars, means over prompts with standard errors (s / sqrt(prompts)) under the same name
    and ``_stderr``; NaN where there are too few prompts:

    - ``accuracy/n``: how often the choice is the best of the n; see `best_of_n_accuracy`.
    - ``gold/n``: gold reward of the choice; see `best_of_n_gold`. It falls as n grows if the model is over-optimized.
    - ``oracle/n``: gold reward of the best of the n, the choice of a perfect model.
    - ``prompts``: their number, without error.

    Args:
        ns: sizes of the choice, each from 1 to N.
    """

    is_differentiable = False
    full_state_update = False

    moments: Tensor

    def __init__(self, ns: Sequence[int] = (1, 2, 4, 8)) -> None:
        super().__init__()
        if not ns or min(ns) < 1:
            raise ValueError(f"ns must be sizes of at least 1; got {tuple(ns)}")
        self.ns = tuple(ns)
        self.names: list[str] = []
        for n in self.ns:
            self.names += [f"accuracy/{n}", f"gold/{n}", f"oracle/{n}"]
        self.add_state("moments", torch.zeros(len(self.names), 3, dtype=torch.float64), dist_reduce_fx=_merge_rows)

    def update(self, proxy: Tensor, gold: Tensor) -> None:
        """Take in prompts.

        Args:
            proxy: rewards by the model under test, [prompts, N].
            gold: rewards by the judge, [prompts, N].
        """
        metrics: list[Tensor] = []
        for n in self.ns:
            metrics.append(best_of_n_accuracy(proxy, gold, n))
            metrics.append(best_of_n_gold(proxy, gold, n))
            metrics.append(best_of_n_gold(gold, gold, n))
        new = torch.stack([moments_of(values) for values in metrics]).to(self.moments.device)
        self.moments = _merge_rows(torch.stack([self.moments, new]))

    def compute(self) -> dict[str, Tensor]:
        """The metrics, over all prompts of all processes."""
        found: dict[str, Tensor] = {}
        nan = self.moments.new_tensor(float("nan"))
        for name, (count, mean, deviations) in zip(self.names, self.moments, strict=True):
            found[name] = mean if count > 0 else nan
            # stderr = s / sqrt(n) with s^2 = sum of squared deviations / (n - 1)
            found[f"{name}_stderr"] = (deviations / (count - 1) / count).sqrt() if count > 1 else nan
        return {**found, "prompts": self.moments[0, 0]}


def _merge_rows(groups: Tensor) -> Tensor:
    """Pool the moments of several metrics of several groups; [groups, metrics, 3] -> [metrics, 3]."""
    return torch.stack([merge_moments(groups[:, figure]) for figure in range(groups.shape[1])])
