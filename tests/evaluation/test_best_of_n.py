"""The estimators of best-of-n against all subsets and all orders, enumerated one by one."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from lightning_rlhf.evaluation.best_of_n import BestOfN, best_of_n_accuracy, best_of_n_gold


def brute_force(proxy: list[float], gold: list[float], n: int) -> tuple[float, float]:
    """Mean over all subsets of size n, and over the responses the proxy likes best there."""
    accuracies, golds = [], []
    for subset in combinations(range(len(proxy)), n):
        top = max(proxy[i] for i in subset)
        choices = [i for i in subset if proxy[i] == top]
        best = max(gold[i] for i in subset)
        golds.append(sum(gold[i] for i in choices) / len(choices))
        accuracies.append(sum(gold[i] == best for i in choices) / len(choices))
    return sum(accuracies) / len(accuracies), sum(golds) / len(golds)


def rewards(seed: int, prompts: int, total: int, levels: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if levels is not None:
        return torch.randint(levels, (prompts, total), generator=generator).double()
    return torch.randn(prompts, total, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("levels", [None, 3], ids=["distinct", "tied"])
@pytest.mark.parametrize("total", [1, 2, 5, 10])
def test_estimators_equal_all_subsets(total: int, levels: int | None) -> None:
    proxy, gold = rewards(0, 3, total, levels), rewards(1, 3, total, levels)
    for n in range(1, total + 1):
        accuracy, value = best_of_n_accuracy(proxy, gold, n), best_of_n_gold(proxy, gold, n)
        for row in range(3):
            expected = brute_force(proxy[row].tolist(), gold[row].tolist(), n)
            assert (accuracy[row].item(), value[row].item()) == pytest.approx(expected, abs=1e-12)


def test_the_formula_of_the_paper() -> None:
    proxy, gold = rewards(2, 1, 9), rewards(3, 1, 9)
    ordered = gold[0, proxy[0].argsort()].tolist()
    expected = sum(math.comb(i - 1, 3) / math.comb(9, 4) * score for i, score in enumerate(ordered, start=1))
    assert best_of_n_gold(proxy, gold, 4).item() == pytest.approx(expected)


def test_one_of_one_is_a_mean_and_thousands_do_not_overflow() -> None:
    proxy, gold = rewards(4, 2, 4000), rewards(5, 2, 4000)
    torch.testing.assert_close(best_of_n_gold(proxy, gold, 1), gold.mean(1))
    torch.testing.assert_close(best_of_n_gold(proxy, gold, 4000), gold.gather(1, proxy.argmax(1, keepdim=True))[:, 0])
    # the best of 100 standard normals is 2.508 on average
    normal = rewards(8, 20, 1000)
    assert best_of_n_gold(normal, normal, 100).mean().item() == pytest.approx(2.508, abs=0.15)


def test_metric_reports_means_with_errors_whatever_the_pieces() -> None:
    proxy, gold = rewards(6, 12, 8), rewards(7, 12, 8)
    whole, parts = BestOfN((1, 4)), BestOfN((1, 4))
    whole.update(proxy, gold)
    for start in (0, 5, 6):
        end = {0: 5, 5: 6, 6: 12}[start]
        parts.update(proxy[start:end], gold[start:end])
    found = whole.compute()
    for name, value in parts.compute().items():
        torch.testing.assert_close(value, found[name])
    values = best_of_n_gold(proxy, gold, 4)
    torch.testing.assert_close(found["gold/4"], values.mean())
    torch.testing.assert_close(found["gold/4_stderr"], values.std() / 12**0.5)
    assert found["accuracy/1"].item() == pytest.approx(1.0)
    assert found["oracle/4"] > found["gold/4"]
    assert found["prompts"] == 12
    assert math.isnan(BestOfN().compute()["gold/1"])


def test_bad_use_is_named() -> None:
    with pytest.raises(ValueError, match="the best of n=3 cannot be told from 2 responses per prompt"):
        best_of_n_gold(torch.zeros(1, 2), torch.zeros(1, 2), 3)
    with pytest.raises(ValueError, match=r"shape \[prompts, N\]; got \(2,\) and \(2,\)"):
        best_of_n_accuracy(torch.zeros(2), torch.zeros(2), 1)
    with pytest.raises(ValueError, match="ns must be sizes of at least 1"):
        BestOfN(())
