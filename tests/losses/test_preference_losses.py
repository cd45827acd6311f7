"""The preference losses against hand-worked values, closed-form gradients, and the identities that define each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_rlhf.losses import (
    AbstractPreferenceLoss,
    CDPOLoss,
    DPOLoss,
    HingeLoss,
    IPOLoss,
    NudgedPreferenceLoss,
    PairLogps,
    RobustLoss,
    XPOLoss,
    cdpo_loss,
    dpo_loss,
    hinge_loss,
    implicit_rewards,
    ipo_loss,
    nudged_preference_loss,
    reward_accuracy,
    robust_loss,
    xpo_bonus,
)


BETA = 0.3
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sigmoid": lambda margin, label: dpo_loss(margin, label, BETA),
    "cdpo": lambda margin, label: cdpo_loss(margin, label, BETA, 0.2),
    "robust": lambda margin, label: robust_loss(margin, label, BETA, 0.2),
    "ipo": lambda margin, label: ipo_loss(margin, label, BETA),
    "hinge": lambda margin, label: hinge_loss(margin, label, BETA),
}
CLASSES: list[AbstractPreferenceLoss] = [
    DPOLoss(),
    CDPOLoss(0.2),
    RobustLoss(0.2),
    IPOLoss(),
    IPOLoss(length_normalize=False),
    HingeLoss(),
    XPOLoss(0.01),
    XPOLoss(0.01, base=HingeLoss()),
    NudgedPreferenceLoss(0.1),
]
all_losses = pytest.mark.parametrize("name", list(LOSSES))
all_classes = pytest.mark.parametrize("loss", CLASSES, ids=lambda loss: type(loss).__name__)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def pairs(seed: int = 0, n: int = 6) -> PairLogps:
    generator = torch.Generator().manual_seed(seed)

    def logps() -> Tensor:
        return -20 * torch.rand(n, generator=generator, dtype=torch.float64)

    return PairLogps(
        policy_chosen=logps().requires_grad_(),
        policy_rejected=logps().requires_grad_(),
        reference_chosen=logps(),
        reference_rejected=logps(),
        chosen_length=torch.randint(1, 9, (n,), generator=generator),
        rejected_length=torch.randint(1, 9, (n,), generator=generator),
        chosen_from_reference=torch.arange(n) % 3 == 0,
        rejected_from_reference=torch.arange(n) % 3 == 1,
        label=torch.rand(n, generator=generator, dtype=torch.float64),
        weight=torch.ones(n, dtype=torch.float64),
    )


def swapped(batch: PairLogps) -> PairLogps:
    return PairLogps(
        policy_chosen=batch.policy_rejected,
        policy_rejected=batch.policy_chosen,
        reference_chosen=batch.reference_rejected,
        reference_rejected=batch.reference_chosen,
        chosen_length=batch.rejected_length,
        rejected_length=batch.chosen_length,
        chosen_from_reference=batch.rejected_from_reference,
        rejected_from_reference=batch.chosen_from_reference,
        label=1 - batch.label,
        weight=batch.weight,
    )


def test_values_worked_by_hand() -> None:
    # beta * margin = log 3, so that sigma = 3/4 and 1 - sigma = 1/4.
    margin, beta = double(math.log(3) / BETA), BETA
    straight, flipped = math.log(4 / 3), math.log(4)
    assert dpo_loss(margin, double(1), beta).item() == pytest.approx(straight, rel=1e-14)
    assert dpo_loss(margin, double(0), beta).item() == pytest.approx(flipped, rel=1e-14)
    assert dpo_loss(margin, double(0.7), beta).item() == pytest.approx(0.7 * straight + 0.3 * flipped, rel=1e-14)
    # smoothing 0.2 turns the label 1 into 0.8, and 0.7 into 0.8 * 0.7 + 0.2 * 0.3 = 0.62
    assert cdpo_loss(margin, double(1), beta, 0.2).item() == pytest.approx(0.8 * straight + 0.2 * flipped, rel=1e-14)
    assert cdpo_loss(margin, double(0.7), beta, 0.2).item() == pytest.approx(
        0.62 * straight + 0.38 * flipped, rel=1e-14
    )
    assert robust_loss(margin, double(1), beta, 0.2).item() == pytest.approx(
        (0.8 * straight - 0.2 * flipped) / 0.6, rel=1e-14
    )
    # target 1/(2 * 0.25) = 2
    assert ipo_loss(double(5), double(1), 0.25).item() == 9.0
    assert ipo_loss(double(5), double(0), 0.25).item() == 49.0
    assert ipo_loss(double(5), double(0.75), 0.25).item() == 0.75 * 9 + 0.25 * 49
    assert hinge_loss(double(2), double(1), 0.25).item() == 0.5
    assert hinge_loss(double(2), double(0), 0.25).item() == 1.5
    assert hinge_loss(double(5, -5), double(1, 0), 0.25).tolist() == [0.0, 0.0]


def test_the_log_of_two_where_the_policy_equals_the_reference() -> None:
    label = double(0, 0.3, 1)
    margin = torch.zeros(3, dtype=torch.float64)
    for name in ("sigmoid", "cdpo", "robust"):
        torch.testing.assert_close(LOSSES[name](margin, label), torch.full_like(label, math.log(2)), rtol=1e-15, atol=0)
    torch.testing.assert_close(hinge_loss(margin, label, BETA), torch.ones_like(label))
    torch.testing.assert_close(ipo_loss(margin, label, BETA), torch.full_like(label, (1 / (2 * BETA)) ** 2))


def test_gradients_equal_their_closed_forms() -> None:
    label = double(1, 1, 0, 0.3, 0.9, 0.5)
    margin = double(-4, 2, 1, 0.1, 7, 0).requires_grad_()
    sigma = torch.sigmoid(BETA * margin.detach())
    smoothed = 0.8 * label + 0.2 * (1 - label)
    # robust: the label is replaced by its unbiased estimate (label - eps) / (1 - 2 eps)
    estimate = (label - 0.2) / 0.6
    expected = {
        "sigmoid": -BETA * (label - sigma),
        "cdpo": -BETA * (smoothed - sigma),
        "robust": -BETA * (estimate - sigma),
        "ipo": 2 * (margin.detach() - (label - 0.5) / BETA),
        "hinge": -BETA * label * (BETA * margin.detach() < 1) + BETA * (1 - label) * (BETA * margin.detach() > -1),
    }
    for name, loss in LOSSES.items():
        (gradient,) = torch.autograd.grad(loss(margin, label).sum(), margin)
        torch.testing.assert_close(gradient, expected[name], rtol=1e-13, atol=1e-15, msg=lambda m, n=name: f"{n}: {m}")


@all_classes
def test_autograd_agrees_with_finite_differences(loss: AbstractPreferenceLoss) -> None:
    batch = pairs()

    def of_logps(chosen: Tensor, rejected: Tensor) -> Tensor:
        return loss(replace(batch, policy_chosen=chosen, policy_rejected=rejected), BETA)

    assert torch.autograd.gradcheck(of_logps, (batch.policy_chosen, batch.policy_rejected))


@all_losses
def test_every_loss_is_the_expectation_over_labels(name: str) -> None:
    margin, label = double(-9, -1, 0, 2, 30), double(0.1, 0.4, 0.5, 0.8, 0.25)
    hard = label * LOSSES[name](margin, torch.ones_like(label)) + (1 - label) * LOSSES[name](
        margin, torch.zeros_like(label)
    )
    torch.testing.assert_close(LOSSES[name](margin, label), hard, rtol=1e-13, atol=1e-13)


@all_classes
def test_exchanging_chosen_and_rejected_with_the_label_changes_nothing(loss: AbstractPreferenceLoss) -> None:
    batch = pairs()
    values, mirrored = loss(batch, BETA), loss(swapped(batch), BETA)
    assert values.shape == (6,)
    torch.testing.assert_close(values, mirrored, rtol=1e-14, atol=1e-14)
    # and without the label it does change something
    assert not torch.allclose(values, loss(replace(swapped(batch), label=batch.label), BETA))


@all_classes
def test_a_constant_per_prompt_and_the_pair_weight_do_not_matter(loss: AbstractPreferenceLoss) -> None:
    batch = replace(pairs(), chosen_length=torch.full((6,), 4), rejected_length=torch.full((6,), 4))
    shifted = replace(
        batch,
        reference_chosen=batch.reference_chosen + 3.0,
        reference_rejected=batch.reference_rejected + 3.0,
        weight=torch.full((6,), 7.0),
    )
    torch.testing.assert_close(loss(batch, BETA), loss(shifted, BETA))


@pytest.mark.parametrize("label", [0.05, 0.5, 0.8])
def test_a_soft_label_is_met_where_the_model_predicts_it(label: float) -> None:
    logit = math.log(label / (1 - label))
    for loss, target in (
        (LOSSES["sigmoid"], logit / BETA),
        (LOSSES["cdpo"], math.log((0.6 * label + 0.2) / (0.8 - 0.6 * label)) / BETA),
        (LOSSES["ipo"], (label - 0.5) / BETA),
    ):
        margin = double(target).requires_grad_()
        value = loss(margin, double(label))
        (gradient,) = torch.autograd.grad(value.sum(), margin)
        assert abs(gradient.item()) < 1e-14
        for step in (-0.1, 0.1):
            assert loss(margin.detach() + step, double(label)).item() > value.item()


def test_minima_for_hard_labels() -> None:
    # IPO: 1/(2 beta), finite. cDPO: log((1-eps)/eps)/beta. The sigmoid loss has none.
    margin = torch.linspace(-20, 20, 40001, dtype=torch.float64)
    one = torch.ones_like(margin)
    assert margin[ipo_loss(margin, one, 0.25).argmin()].item() == pytest.approx(2.0, abs=1e-3)
    assert margin[cdpo_loss(margin, one, 0.5, 0.1).argmin()].item() == pytest.approx(2 * math.log(9), abs=1e-3)
    assert margin[dpo_loss(margin, one, 0.5).argmin()].item() == 20.0


@pytest.mark.parametrize("flip", [0.0, 0.1, 0.45])
@pytest.mark.parametrize("clean", [0.0, 0.3, 1.0])
def test_robust_loss_is_unbiased_under_flips_and_cdpo_is_not(flip: float, clean: float) -> None:
    margin = double(-8, -0.5, 0, 3, 12)
    label = torch.full_like(margin, clean)

    def averaged(loss: Callable[[Tensor, Tensor, float, float], Tensor]) -> Tensor:
        return (1 - flip) * loss(margin, label, BETA, flip) + flip * loss(margin, 1 - label, BETA, flip)

    torch.testing.assert_close(averaged(robust_loss), dpo_loss(margin, label, BETA), rtol=1e-12, atol=1e-12)
    if flip > 0:
        assert not torch.allclose(averaged(cdpo_loss), dpo_loss(margin, label, BETA), atol=1e-3)


def test_small_and_large_beta() -> None:
    margin, label = double(-2, -0.1, 0.5, 4), double(0.2, 1, 0.6, 1)
    # beta -> 0: (loss - log 2)/beta -> (1/2 - label) * margin; the hinge's (loss - 1)/beta has twice that slope.
    beta = 1e-7
    torch.testing.assert_close(
        (dpo_loss(margin, label, beta) - math.log(2)) / beta, (0.5 - label) * margin, rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(
        (hinge_loss(margin, label, beta) - 1) / beta, (1 - 2 * label) * margin, rtol=1e-6, atol=1e-6
    )
    # beta -> infinity: loss/beta -> label * (-margin)+ + (1-label) * (margin)+, for both.
    ramp = label * (-margin).clamp(min=0) + (1 - label) * margin.clamp(min=0)
    torch.testing.assert_close(dpo_loss(margin, label, 1e9) / 1e9, ramp, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(hinge_loss(margin, label, 1e9) / 1e9, ramp, rtol=1e-8, atol=1e-8)
    # IPO's target vanishes as beta grows.
    torch.testing.assert_close(ipo_loss(margin, label, 1e12), margin**2)


def test_hard_labels_keep_their_digits_at_large_margins_in_float32() -> None:
    margin = torch.tensor([400.0, -400.0], requires_grad=True)
    loss = dpo_loss(margin, torch.tensor([1.0, 1.0]), 0.1)
    torch.testing.assert_close(loss, torch.tensor([math.exp(-40), 40.0]), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), margin)
    torch.testing.assert_close(gradient, torch.tensor([-0.1 * math.exp(-40), -0.1]), rtol=1e-5, atol=0)


def test_ipo_normalizes_each_response_by_its_own_length() -> None:
    batch = replace(
        pairs(n=1),
        policy_chosen=double(-3),
        reference_chosen=double(-9),
        policy_rejected=double(-8),
        reference_rejected=double(-4),
        chosen_length=torch.tensor([3]),
        rejected_length=torch.tensor([2]),
        label=double(1),
    )
    # per token: 6/3 - (-4/2) = 4; per response: 6 - (-4) = 10; target 1/(2 * 0.25) = 2
    assert batch.margin_per_token().item() == 4.0
    assert batch.margin().item() == 10.0
    assert IPOLoss()(batch, 0.25).item() == 4.0
    assert IPOLoss(length_normalize=False)(batch, 0.25).item() == 64.0


def test_xpo_adds_alpha_times_the_log_probability_of_reference_draws_only() -> None:
    batch = pairs()
    bonus = XPOLoss(0.01)(batch, BETA) - DPOLoss()(batch, BETA)
    chosen, rejected = batch.policy_chosen.detach(), batch.policy_rejected.detach()
    expected = 0.01 * torch.stack([chosen[0], rejected[1], double(0)[0], chosen[3], rejected[4], double(0)[0]])
    torch.testing.assert_close(bonus, expected)
    # Lowering the loss lowers the probability of the reference's response: the gradient has the sign of alpha.
    (gradient,) = torch.autograd.grad(bonus.sum(), batch.policy_chosen)
    torch.testing.assert_close(gradient, double(0.01, 0, 0, 0.01, 0, 0))
    torch.testing.assert_close(XPOLoss(0.0)(batch, BETA), DPOLoss()(batch, BETA), rtol=0, atol=0)


def test_an_impossible_response_of_the_policy_does_not_enter_the_xpo_bonus() -> None:
    no, yes = torch.tensor([False]), torch.tensor([True])
    assert xpo_bonus(double(-math.inf), double(-2), no, yes, 0.5).item() == -1.0


def test_implicit_rewards_and_accuracy() -> None:
    torch.testing.assert_close(implicit_rewards(double(-1, -2), double(-3, -1), 0.5), double(1, -0.5))
    margin, label = double(2, 2, -2, 0, 5), double(1, 0.4, 0.4, 1, 0.5)
    assert reward_accuracy(margin, label).tolist() == [1.0, 0.0, 1.0, 0.5, 0.5]
    assert not reward_accuracy(margin.requires_grad_(), label).requires_grad


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 1.0, math.nan])
@pytest.mark.parametrize("build", [CDPOLoss, RobustLoss])
def test_label_smoothing_outside_its_range_is_refused(build: type[CDPOLoss | RobustLoss], smoothing: float) -> None:
    with pytest.raises(ValueError, match=rf"{build.__name__} expects a label_smoothing in \[0, 0.5\).*got {smoothing}"):
        build(smoothing)


@pytest.mark.parametrize("alpha", [-1e-5, math.inf, math.nan])
def test_xpo_refuses_a_negative_or_infinite_alpha(alpha: float) -> None:
    with pytest.raises(ValueError, match=f"finite alpha >= 0; got {alpha}"):
        XPOLoss(alpha)


def test_the_nudge_adds_to_the_weight_of_both_responses() -> None:
    batch = pairs()
    for epsilon in (0.0, 0.2):
        gradients = torch.autograd.grad(
            NudgedPreferenceLoss(epsilon)(batch, BETA).sum(), [batch.policy_chosen, batch.policy_rejected]
        )
        # descent moves log pi(a) by p - 1/2 + eps, and log pi(b) by (1 - p) - 1/2 + eps
        torch.testing.assert_close(-gradients[0], batch.label - 0.5 + epsilon)
        torch.testing.assert_close(-gradients[1], 0.5 - batch.label + epsilon)


def test_the_nudged_gradient_is_that_of_the_preference_against_a_second_sample() -> None:
    # E over ordered pairs of p(Y >= Y') - 1/2, with Y' fixed: the policy gradient of the expected win rate
    logits = double(0.3, -0.2, 0.9).requires_grad_()
    rewards = double(1.0, -0.5, 0.2)
    wins = torch.sigmoid(rewards[:, None] - rewards)
    law = logits.softmax(0)
    expected = torch.zeros((), dtype=torch.float64)
    for a in range(3):
        for b in range(3):
            weight = (law[a] * law[b]).detach()
            loss = nudged_preference_loss(law[a].log(), law[b].log(), wins[a, b], 0.0)
            expected = expected + weight * loss
    (ours,) = torch.autograd.grad(expected, logits, retain_graph=True)
    # both orders: twice the gradient of sum_a pi(a) sum_b stopgrad(pi(b)) P(a >= b)
    (theirs,) = torch.autograd.grad(-2 * (law[:, None] * law.detach() * wins).sum(), logits)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("epsilon", [-0.1, math.inf, math.nan])
def test_a_nudge_outside_its_range_is_refused(epsilon: float) -> None:
    with pytest.raises(ValueError, match=f"finite epsilon >= 0; got {epsilon}"):
        NudgedPreferenceLoss(epsilon)
