"""Losses of reward models: closed forms in float64, and the numbers of TRL."""

from __future__ import annotations

import pytest
import torch

from lightning_rlhf.losses import bradley_terry_loss, centering_penalty, nuclear_norm_ratio


D = torch.tensor([-2.0, -0.3, 0.0, 1.7], dtype=torch.float64)
P = torch.tensor([0.1, 0.5, 0.9, 1.0], dtype=torch.float64)


def test_gradient_is_sigma_of_the_difference_less_the_label() -> None:
    difference = D.clone().requires_grad_()
    bradley_terry_loss(difference, torch.zeros_like(D), P).sum().backward()
    torch.testing.assert_close(difference.grad, D.sigmoid() - P)


def test_minimum_is_the_entropy_of_the_label_at_its_logit() -> None:
    p = P[:3]
    entropy = -(p * p.log() + (1 - p) * (1 - p).log())
    torch.testing.assert_close(bradley_terry_loss(p.logit(), torch.zeros_like(p), p), entropy)


def test_exchange_turns_the_label_and_a_constant_changes_nothing() -> None:
    loss = bradley_terry_loss(D, 2 * D, P)
    torch.testing.assert_close(bradley_terry_loss(2 * D, D, 1 - P), loss)
    torch.testing.assert_close(bradley_terry_loss(D + 3, 2 * D + 3, P), loss)


def test_hard_labels_and_margins_give_the_usual_loss() -> None:
    ones = torch.ones_like(D)
    torch.testing.assert_close(bradley_terry_loss(D, -D, ones), -torch.nn.functional.logsigmoid(2 * D))
    torch.testing.assert_close(bradley_terry_loss(D, -D, ones, 0.5), -torch.nn.functional.logsigmoid(2 * D - 0.5))


def test_a_margin_counts_as_much_as_the_label_prefers_one_response() -> None:
    difference = D.clone().requires_grad_()
    bradley_terry_loss(difference, torch.zeros_like(D), P, 0.5).sum().backward()
    torch.testing.assert_close(difference.grad, (D - 0.5 * (2 * P - 1)).sigmoid() - P)
    # on a tie neither response is pushed, and it does not matter which of two comes first
    tied = bradley_terry_loss(D, 2 * D, torch.full_like(D, 0.5), 0.5)
    torch.testing.assert_close(tied, bradley_terry_loss(D, 2 * D, torch.full_like(D, 0.5)))
    exchanged = bradley_terry_loss(2 * D, D, 1 - P, 0.5)
    torch.testing.assert_close(exchanged, bradley_terry_loss(D, 2 * D, P, 0.5))
    # the minimum is where sigma(difference - lead) is the label
    p, lead = torch.tensor(0.78, dtype=torch.float64), 0.5 * 0.56
    at_best = bradley_terry_loss(p.logit() + lead, torch.zeros_like(p), p, 0.5)
    torch.testing.assert_close(at_best, -(p * p.log() + (1 - p) * (1 - p).log()))


def test_the_penalty_vanishes_where_the_mean_reward_is_zero() -> None:
    torch.testing.assert_close(centering_penalty(D, -D), torch.zeros_like(D))
    assert centering_penalty(torch.tensor(1.0), torch.tensor(2.0)).item() == pytest.approx(9.0)


def test_a_fit_to_one_soft_pair_finds_the_logit() -> None:
    reward = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([reward], line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = bradley_terry_loss(reward[0], reward[1], torch.tensor(0.78)) + 0.1 * centering_penalty(*reward)
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)  # type: ignore[arg-type]
    assert (reward[0] - reward[1]).item() == pytest.approx(torch.tensor(0.78).logit().item(), abs=1e-4)
    assert reward.sum().item() == pytest.approx(0.0, abs=1e-6)


def test_identical_adapters_read_few_directions_and_orthogonal_ones_all() -> None:
    """UP-RLHF: N identical blocks of rank r give sqrt(r), N that read different directions sqrt(N r)."""
    basis, _ = torch.linalg.qr(torch.randn(32, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    block = basis[:, :4].T
    torch.testing.assert_close(nuclear_norm_ratio(block.repeat(5, 1)), torch.tensor(4.0).double().sqrt())
    torch.testing.assert_close(nuclear_norm_ratio(basis.T), torch.tensor(20.0).double().sqrt())


def test_gradient_of_the_nuclear_norm_is_that_of_the_thin_decomposition() -> None:
    a = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    nuclear_norm_ratio(a).backward()
    u, s, v = torch.linalg.svd(a.detach(), full_matrices=False)
    frobenius = s.square().sum().sqrt()
    # quotient rule, with d||A||_*/dA = U V^T and d||A||_F/dA = A / ||A||_F
    torch.testing.assert_close(a.grad, u @ v / frobenius - s.sum() * a.detach() / frobenius**3)
