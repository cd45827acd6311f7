"""Combining members: a table worked out by hand, with the convention of the variance pinned."""

from __future__ import annotations

import pytest
import torch

from lightning_rlhf.rewards import combine, disagreement, standardised


# four responses, three members
MEMBERS = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [-1.0, 5.0, -1.0], [2.0, 2.0, 5.0]], dtype=torch.float64)
MEANS = torch.tensor([2.0, 0.0, 1.0, 3.0], dtype=torch.float64)
# divided by 3, not by 2: (1 + 0 + 1) / 3, 0, (4 + 16 + 4) / 3, (1 + 1 + 4) / 3
VARIANCES = torch.tensor([2 / 3, 0.0, 8.0, 2.0], dtype=torch.float64)


def test_rules_by_hand() -> None:
    torch.testing.assert_close(disagreement(MEMBERS), VARIANCES.sqrt())
    torch.testing.assert_close(combine(MEMBERS), MEANS)
    torch.testing.assert_close(combine(MEMBERS, "lcb", 0.5), MEANS - 0.5 * VARIANCES.sqrt())
    torch.testing.assert_close(combine(MEMBERS, "uwo", 0.5), MEANS - 0.5 * VARIANCES)
    torch.testing.assert_close(combine(MEMBERS, "wco"), torch.tensor([1.0, 0.0, -1.0, 2.0]).double())


def test_one_member_never_disagrees() -> None:
    for rule in ("mean", "lcb", "uwo", "wco"):
        torch.testing.assert_close(combine(MEMBERS[:, :1], rule), MEMBERS[:, 0])


def test_standardised_members_count_alike() -> None:
    """Without it the widest member alone decides the minimum."""
    generator = torch.Generator().manual_seed(0)
    good = torch.randn(1000, 2, generator=generator, dtype=torch.float64)
    wide = torch.cat([good, 100 * torch.randn(1000, 1, generator=generator, dtype=torch.float64) + 7], 1)
    means, stds = wide.mean(0).tolist(), wide.std(0).tolist()
    aligned = standardised(wide, means, stds)
    torch.testing.assert_close(aligned.mean(0), torch.zeros(3).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(aligned.std(0), torch.ones(3).double())
    lowest = torch.stack([(members.argmin(1) == 2).double().mean() for members in (wide, aligned)])
    assert lowest[0] > 0.45  # it is the lowest whenever it is negative
    assert 0.28 < lowest[1] < 0.38


def test_bad_use_is_named() -> None:
    with pytest.raises(ValueError, match="combine must be one of mean, lcb, uwo, wco; got 'median'"):
        combine(MEMBERS, "median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"coefficient of combine=lcb must be >= 0; got -1"):
        combine(MEMBERS, "lcb", -1.0)
