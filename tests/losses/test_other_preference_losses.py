"""Losses of log-ratios, of likelihoods, with ties and by transport: values by hand, minima, and enumerated worlds."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_rlhf import losses
from lightning_rlhf.losses import (
    AbstractPreferenceLoss,
    AOTLoss,
    APODownLoss,
    APOZeroLoss,
    BCOLoss,
    CDPOLoss,
    ChiPOLoss,
    CPOLoss,
    DavidsonLoss,
    DiscoPOPLoss,
    DPOLoss,
    EXOLoss,
    HingeLoss,
    LNDPOLoss,
    NCALoss,
    NLLTermLoss,
    ORPOLoss,
    PairLogps,
    RaoKupperLoss,
    SimPOLoss,
    SPPOLoss,
    apo_down_loss,
    apo_zero_loss,
    bco_loss,
    chi_po_loss,
    davidson_logps,
    discopop_loss,
    exo_loss,
    log_odds,
    nca_loss,
    orpo_loss,
    preferred_nll,
    rao_kupper_logps,
    simpo_loss,
    sppo_loss,
    tie_loss,
)


BETA = 0.3
REFERENCE: list[AbstractPreferenceLoss] = [
    APOZeroLoss(),
    APODownLoss(),
    BCOLoss(shift=0.4),
    ChiPOLoss(),
    ChiPOLoss(reward_range=1.0),
    DiscoPOPLoss(),
    EXOLoss(0.05),
    LNDPOLoss(),
    NCALoss(),
    SPPOLoss(),
    NLLTermLoss(0.5),
    NLLTermLoss(0.5, base=HingeLoss(), length_normalize=False),
    RaoKupperLoss(),
    DavidsonLoss(),
    AOTLoss(),
    AOTLoss(paired=False, label_smoothing=0.1),
]
REFERENCE_FREE: list[AbstractPreferenceLoss] = [CPOLoss(), ORPOLoss(), SimPOLoss()]
all_classes = pytest.mark.parametrize("loss", REFERENCE + REFERENCE_FREE, ids=lambda loss: type(loss).__name__)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def pairs(seed: int = 0, n: int = 6) -> PairLogps:
    generator = torch.Generator().manual_seed(seed)

    def logps() -> Tensor:
        return -8 * torch.rand(n, generator=generator, dtype=torch.float64)

    return PairLogps(
        policy_chosen=logps().requires_grad_(),
        policy_rejected=logps().requires_grad_(),
        reference_chosen=logps(),
        reference_rejected=logps(),
        chosen_length=torch.randint(1, 9, (n,), generator=generator),
        rejected_length=torch.randint(1, 9, (n,), generator=generator),
        chosen_from_reference=torch.zeros(n, dtype=torch.bool),
        rejected_from_reference=torch.zeros(n, dtype=torch.bool),
        label=torch.rand(n, generator=generator, dtype=torch.float64),
        weight=torch.ones(n, dtype=torch.float64),
    )


def swapped(batch: PairLogps) -> PairLogps:
    return replace(
        batch,
        policy_chosen=batch.policy_rejected,
        policy_rejected=batch.policy_chosen,
        reference_chosen=batch.reference_rejected,
        reference_rejected=batch.reference_chosen,
        chosen_length=batch.rejected_length,
        rejected_length=batch.chosen_length,
        label=1 - batch.label,
    )


def one_pair(chosen: float, rejected: float, label: float = 1.0, lengths: tuple[int, int] = (1, 1)) -> PairLogps:
    """One pair with log-probabilities under the policy, and 0 under the reference."""
    batch = pairs(n=1)
    return replace(
        batch,
        policy_chosen=double(chosen),
        policy_rejected=double(rejected),
        reference_chosen=double(0),
        reference_rejected=double(0),
        chosen_length=torch.tensor([lengths[0]]),
        rejected_length=torch.tensor([lengths[1]]),
        label=double(label),
    )


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# -- every loss --------------------------------------------------------------------------------------------------------


@all_classes
def test_exchanging_chosen_and_rejected_with_the_label_changes_nothing(loss: AbstractPreferenceLoss) -> None:
    batch = pairs()
    values, mirrored = loss(batch, BETA), loss(swapped(batch), BETA)
    assert values.shape == (6,)
    torch.testing.assert_close(values, mirrored, rtol=1e-13, atol=1e-13)
    assert not torch.allclose(values, loss(replace(swapped(batch), label=batch.label), BETA))


@all_classes
def test_autograd_agrees_with_finite_differences(loss: AbstractPreferenceLoss) -> None:
    batch = pairs()

    def of_logps(chosen: Tensor, rejected: Tensor) -> Tensor:
        return loss(replace(batch, policy_chosen=chosen, policy_rejected=rejected), BETA)

    assert torch.autograd.gradcheck(of_logps, (batch.policy_chosen, batch.policy_rejected))


@all_classes
def test_losses_stay_finite_far_from_the_reference_in_float32(loss: AbstractPreferenceLoss) -> None:
    """Log-ratios of hundreds of nats occur in long responses, on either side; hard labels must not meet inf or NaN."""
    far = torch.tensor([-900.0, -3.0, -900.0, -3.0])
    near = torch.tensor([-3.0, -900.0, -3.0, -900.0])
    batch = replace(
        pairs(n=4),
        policy_chosen=far.clone().requires_grad_(),
        policy_rejected=near.clone().requires_grad_(),
        reference_chosen=near,
        reference_rejected=far,
        label=torch.tensor([1.0, 1.0, 0.0, 0.5]),
    )
    for beta in (0.1, 2.5):
        values = loss(batch, beta)
        gradients = torch.autograd.grad(values.sum(), [batch.policy_chosen, batch.policy_rejected], allow_unused=True)
        for tensor in (values, *gradients):
            assert tensor is not None
            assert tensor.dtype == torch.float32
            assert tensor.isfinite().all(), tensor


@all_classes
def test_weights_and_other_fields_are_not_used(loss: AbstractPreferenceLoss) -> None:
    batch = pairs()
    other = replace(batch, weight=7 * batch.weight, chosen_from_reference=~batch.chosen_from_reference)
    assert torch.equal(loss(batch, BETA), loss(other, BETA))


@pytest.mark.parametrize("loss", REFERENCE_FREE, ids=lambda loss: type(loss).__name__)
def test_losses_without_reference_do_not_read_it(loss: AbstractPreferenceLoss) -> None:
    batch, nan = pairs(), torch.full((6,), math.nan, dtype=torch.float64)
    blind = replace(batch, reference_chosen=nan, reference_rejected=nan)
    assert torch.equal(loss(batch, BETA), loss(blind, BETA))


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        (APOZeroLoss(), 1.0),
        (APODownLoss(), 1.0),
        (BCOLoss(), 2 * math.log(2)),
        (ChiPOLoss(), math.log(2)),
        (DiscoPOPLoss(), (math.log(2) + 1) / 2),
        (EXOLoss(0.1), 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)),
        (LNDPOLoss(), math.log(2)),
        (NCALoss(), 2 * math.log(2)),
        (SPPOLoss(), 2 * (0.5 / BETA) ** 2),
        (RaoKupperLoss(), math.log(4)),
        (DavidsonLoss(), math.log(4)),
        (AOTLoss(), math.log(2)),
        (AOTLoss(paired=False), math.log(2)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_first_loss_where_the_policy_equals_the_reference(loss: AbstractPreferenceLoss, value: float) -> None:
    batch = pairs()
    same = replace(
        batch, reference_chosen=batch.policy_chosen, reference_rejected=batch.policy_rejected, label=torch.ones(6)
    )
    torch.testing.assert_close(loss(same, BETA), torch.full((6,), value, dtype=torch.float64))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EXOLoss(0.0), r"EXOLoss expects a label_smoothing in \(0, 0.5\).*got 0.0"),
        (lambda: AOTLoss(label_smoothing=0.5), r"AOTLoss expects a label_smoothing in \[0, 0.5\).*got 0.5"),
        (lambda: DiscoPOPLoss(0.0), r"DiscoPOPLoss expects a tau in \(0, 1\]; got 0.0"),
        (lambda: ChiPOLoss(-1.0), "ChiPOLoss expects a reward_range > 0.*got -1.0"),
        (lambda: BCOLoss(math.nan), "BCOLoss expects a finite shift.*got nan"),
        (lambda: SimPOLoss(-0.1), "SimPOLoss expects a finite gamma >= 0; got -0.1"),
        (lambda: CPOLoss(math.inf), "CPOLoss expects a finite nll_weight >= 0; got inf"),
        (lambda: NLLTermLoss(math.nan), "NLLTermLoss expects a finite weight >= 0; got nan"),
        (lambda: RaoKupperLoss(1.0), "RaoKupperLoss expects a finite nu > 1; got 1.0"),
        (lambda: DavidsonLoss(0.0), "DavidsonLoss expects a finite nu > 0; got 0.0"),
    ],
)
def test_arguments_out_of_range_are_refused(build: Callable[[], AbstractPreferenceLoss], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_the_page_about_losses_has_a_row_for_each() -> None:
    page = (Path(__file__).parents[2] / "docs" / "losses.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    named = {name for name in losses.__all__ if name.endswith("Loss")} - {"AbstractPreferenceLoss", "SigmoidLoss"}
    assert rows == named


# -- losses of log-ratios ----------------------------------------------------------------------------------------------


def test_values_worked_by_hand() -> None:
    # beta h = log 3 and -log 4: sigma is 3/4 and 1/5
    chosen, rejected, one = double(math.log(3) / BETA), double(-math.log(4) / BETA), double(1)
    assert apo_zero_loss(chosen, rejected, one, BETA).item() == pytest.approx(1 / 4 + 1 / 5)
    assert apo_zero_loss(chosen, rejected, double(0), BETA).item() == pytest.approx(3 / 4 + 4 / 5)
    assert apo_down_loss(chosen, rejected, one, BETA).item() == pytest.approx(3 / 4 + 1 / 13)
    assert bco_loss(chosen, rejected, one, BETA, 0.0).item() == pytest.approx(math.log(4 / 3) + math.log(5 / 4))
    # a shift of log 3 makes the classifier undecided about the chosen, and sure by 12 to 1 about the rejected response
    shifted = math.log(2) + math.log(13 / 12)
    assert bco_loss(chosen, rejected, one, BETA, math.log(3)).item() == pytest.approx(shifted)
    assert nca_loss(chosen, rejected, one, BETA).item() == pytest.approx(
        math.log(4 / 3) + 0.5 * math.log(4) + 0.5 * math.log(5 / 4)
    )
    # margins of log 12: sigma is 12/13
    kl = 12 / 13 * math.log(12 / 13 / 0.9) + 1 / 13 * math.log(1 / 13 / 0.1)
    assert exo_loss(chosen - rejected, one, BETA, 0.1).item() == pytest.approx(kl)
    blend = sigmoid(math.log(12) / 0.5)
    assert discopop_loss(chosen - rejected, one, BETA, 0.5).item() == pytest.approx(
        (1 - blend) * math.log(13 / 12) + blend / 12
    )
    assert sppo_loss(double(3), double(-1), double(0.75), 0.25).item() == 4.0  # targets are 1 and -1
    # phi = 2 + log 2 and 1/2 - log 2
    difference = BETA * (1.5 + 2 * math.log(2))
    chi = chi_po_loss(double(math.log(2)), double(-math.log(2)), one, BETA, math.inf)
    assert chi.item() == pytest.approx(-math.log(sigmoid(difference)))
    clipped = chi_po_loss(double(math.log(2)), double(-math.log(2)), one, BETA, 0.1)
    assert clipped.item() == pytest.approx(-math.log(sigmoid(0.2)))


def minimum(loss: Callable[[Tensor, Tensor], Tensor], start: float = 0.0) -> tuple[float, float]:
    """Log-ratios of the chosen and the rejected response at which a loss of the two is smallest."""
    point = double(start, start).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [point], max_iter=200, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        value = loss(point[:1], point[1:]).sum()
        value.backward()
        return value.item()

    optimizer.step(closure)
    chosen, rejected = point.tolist()
    return chosen, rejected


@pytest.mark.parametrize("p", [0.2, 0.7, 0.9])
def test_soft_labels_put_the_minimum_where_the_paper_has_it(p: float) -> None:
    label, logit = double(p), math.log(p / (1 - p))
    assert minimum(lambda c, r: bco_loss(c, r, label, BETA, 0.4)) == pytest.approx(
        ((0.4 + logit) / BETA, (0.4 - logit) / BETA), abs=1e-5
    )
    assert minimum(lambda c, r: nca_loss(c, r, label, BETA)) == pytest.approx(
        (math.log(2 * p) / BETA, math.log(2 * (1 - p)) / BETA), abs=1e-5
    )
    assert minimum(lambda c, r: sppo_loss(c, r, label, BETA)) == pytest.approx(
        ((p - 0.5) / BETA, (0.5 - p) / BETA), abs=1e-6
    )
    # EXO and DPO say something about the margin only, and agree on it
    smoothed = 0.8 * p + 0.1
    chosen, rejected = minimum(lambda c, r: exo_loss(c - r, label, BETA, 0.1))
    assert BETA * (chosen - rejected) == pytest.approx(math.log(smoothed / (1 - smoothed)), abs=1e-5)
    assert exo_loss(double(chosen - rejected), label, BETA, 0.1).item() == pytest.approx(0, abs=1e-10)


def test_exo_is_the_reverse_of_the_divergence_that_dpo_minimizes() -> None:
    margin, target = double(-3, 0.2, 4), 0.9
    q = torch.sigmoid(BETA * margin)
    reverse = q * (q / target).log() + (1 - q) * ((1 - q) / (1 - target)).log()
    torch.testing.assert_close(exo_loss(margin, double(1, 1, 1), BETA, 0.1), reverse)
    entropy = -(target * math.log(target) + (1 - target) * math.log(1 - target))
    forward = target * (target / q).log() + (1 - target) * ((1 - target) / (1 - q)).log()
    dpo = CDPOLoss(0.1)(replace(pairs(n=3), **of_margins(margin)), BETA)
    torch.testing.assert_close(dpo, forward + entropy)


def of_margins(margin: Tensor) -> dict[str, Tensor]:
    zero = torch.zeros_like(margin)
    names = ("policy_rejected", "reference_chosen", "reference_rejected")
    return {"policy_chosen": margin, "label": torch.ones_like(margin), **dict.fromkeys(names, zero)}


def steps(loss: Callable[..., Tensor], chosen: float, rejected: float) -> tuple[float, float]:
    """How gradient descent moves the log-ratios of the chosen and of the rejected response, at beta 1."""
    start = double(chosen).requires_grad_(), double(rejected).requires_grad_()
    up, down = torch.autograd.grad(-loss(*start, double(1), 1.0).sum(), start)
    return up.item(), down.item()


def test_apo_moves_the_responses_in_its_directions() -> None:
    for chosen, rejected in ((0.5, -0.3), (-2.0, 1.0), (3.0, 3.0)):
        up, down = steps(apo_zero_loss, chosen, rejected)
        assert up > 0 > down
    # APO-down: the terms of the chosen response cancel at the start; once the margin is large, both fall
    assert steps(apo_down_loss, 0.0, 0.0) == pytest.approx((0.0, -1 / 4), abs=1e-15)
    up, down = steps(apo_down_loss, 2.0, -2.0)
    assert down < 0 and up < 0


def test_chi_po_finds_the_optimum_of_kl_plus_chi_squared_in_an_enumerated_world() -> None:
    """All pairs of four responses with Bradley-Terry labels; the policy is a softmax of free logits."""
    reward = double(0.0, 1.0, 2.0, 4.0)
    reference = double(0.6, 0.3, 0.08, 0.02)
    beta = 0.7
    logits = reference.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    first, second = (torch.tensor(side) for side in zip(*permutations(range(4), 2), strict=True))
    label = torch.sigmoid(reward[first] - reward[second])

    def closure() -> Tensor:
        optimizer.zero_grad()
        ratio = logits.log_softmax(-1) - reference.log()
        loss = chi_po_loss(ratio[first], ratio[second], label, beta, math.inf).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    policy = logits.detach().softmax(-1)

    def objective(law: Tensor) -> float:
        ratio = law / reference
        divergence = (reference * (ratio * ratio.log() + 0.5 * (ratio - 1) ** 2)).sum()
        return float(law @ reward - beta * divergence)

    # no other policy does better: random directions, and those towards the optimum of KL alone
    kl_optimum = (reference.log() + reward / beta).softmax(-1)
    generator = torch.Generator().manual_seed(0)
    for step in (1e-3, 1e-2, 0.1):
        for _ in range(30):
            noise = torch.randn(4, generator=generator, dtype=torch.float64)
            assert objective((policy.log() + step * noise).softmax(-1)) < objective(policy)
        assert objective((1 - step) * policy + step * kl_optimum) < objective(policy)
    # the rare response of high reward gets far less than under KL
    assert policy[3] < 0.4 * kl_optimum[3]


def test_discopop_is_logistic_below_zero_and_exponential_above() -> None:
    z = double(-40, -5, 5, 40)
    values = discopop_loss(z, torch.ones_like(z), 1.0, 0.05)
    torch.testing.assert_close(values[:2], torch.nn.functional.softplus(-z[:2]))
    torch.testing.assert_close(values[2:], torch.exp(-z[2:]))
    # the local extrema of the docstring
    grid = torch.linspace(-0.3, 0.3, 6001, dtype=torch.float64)
    curve = discopop_loss(grid, torch.ones_like(grid), 1.0, 0.05)
    turns = [float(grid[i]) for i in range(1, 6000) if (curve[i] - curve[i - 1]) * (curve[i + 1] - curve[i]) < 0]
    assert turns == pytest.approx([-0.12, 0.07], abs=0.005)


# -- losses of likelihoods ---------------------------------------------------------------------------------------------


def test_simpo_compares_tokens_with_a_target_margin() -> None:
    # per token -1 and -3: margin 2 * 2 - 0.5
    batch = one_pair(-3.0, -6.0, lengths=(3, 2))
    assert SimPOLoss(0.5)(batch, 2.0).item() == pytest.approx(-math.log(sigmoid(3.5)))
    rejected_wins = -math.log(sigmoid(-4.5))
    assert SimPOLoss(0.5)(replace(batch, label=double(0.25)), 2.0).item() == pytest.approx(
        -0.25 * math.log(sigmoid(3.5)) + 0.75 * rejected_wins
    )
    torch.testing.assert_close(
        simpo_loss(double(-1), double(-3), double(1), 2.0, 0.0), DPOLoss()(one_pair(-1, -3), 2.0)
    )


def test_odds_are_those_of_the_probability_and_stay_finite_at_one() -> None:
    p = double(1e-30, 0.01, 0.3, 0.5, 0.9, 0.999999)
    torch.testing.assert_close(log_odds(p.log()), (p / (1 - p)).log(), rtol=1e-9, atol=1e-12)
    certain = torch.zeros(1, requires_grad=True)
    odds = log_odds(certain)
    (gradient,) = torch.autograd.grad(odds.sum(), certain)
    assert odds.item() == pytest.approx(-math.log(torch.finfo(torch.float32).eps), rel=1e-6)
    assert gradient.item() == 0
    # float32 keeps its digits near 1, where 1 - p has none
    assert log_odds(torch.tensor(-1e-6)).item() == pytest.approx(-math.log(math.expm1(1e-6)), rel=1e-6)


def test_orpo_adds_the_odds_ratio_to_the_likelihood() -> None:
    # P = 3/4 and 1/3 per token: odds 3 and 1/2, ratio 6
    value = orpo_loss(double(math.log(0.75)), double(math.log(1 / 3)), double(1), 0.2)
    assert value.item() == pytest.approx(math.log(4 / 3) + 0.2 * math.log(7 / 6))
    batch = one_pair(4 * math.log(0.75), 2 * math.log(1 / 3), lengths=(4, 2))
    assert ORPOLoss()(batch, 0.2).item() == pytest.approx(value.item())


def test_cpo_and_the_nll_term_add_the_likelihood_of_the_preferred_response() -> None:
    batch = one_pair(-6.0, -4.0, lengths=(3, 4))
    dpo = DPOLoss()(batch, BETA).item()
    assert NLLTermLoss(0.5)(batch, BETA).item() == pytest.approx(dpo + 0.5 * 2.0)
    assert NLLTermLoss(0.5, length_normalize=False)(batch, BETA).item() == pytest.approx(dpo + 0.5 * 6.0)
    # label 1/4: the likelihoods of both count, -6/3 and -4/4
    soft = replace(batch, label=double(0.25))
    expected = DPOLoss()(soft, BETA).item() + 0.25 * 2.0 + 0.75 * 1.0
    assert NLLTermLoss(1.0)(soft, BETA).item() == pytest.approx(expected)
    # the reference of this pair is 0: CPO is DPO with the term
    assert CPOLoss(0.5)(batch, BETA).item() == pytest.approx(dpo + 1.0)
    assert preferred_nll(double(-2), double(-math.inf), double(1)).item() == 2.0


# -- ties --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("logps", "nu"), [(rao_kupper_logps, 3.0), (davidson_logps, 1.0), (davidson_logps, 0.2)])
def test_outcomes_are_a_distribution_and_ties_depend_on_the_gap(
    logps: Callable[[Tensor, float], tuple[Tensor, Tensor, Tensor]], nu: float
) -> None:
    gap = double(-30, -2, 0, 0.7, 5)
    win, tie, lose = logps(gap, nu)
    torch.testing.assert_close(win.exp() + tie.exp() + lose.exp(), torch.ones_like(gap), rtol=1e-13, atol=0)
    mirrored = logps(-gap, nu)
    torch.testing.assert_close((lose, tie, win), mirrored)
    at_zero = (nu - 1) / (nu + 1) if logps is rao_kupper_logps else nu / (1 + nu)
    assert tie[2].exp().item() == pytest.approx(at_zero)
    # strengths exp(r): Rao-Kupper P(win) = a / (a + nu b); Davidson a / (a + b + 2 nu sqrt(ab))
    a, b = torch.exp(gap), torch.ones_like(gap)
    expected = a / (a + nu * b) if logps is rao_kupper_logps else a / (a + b + 2 * nu * (a * b).sqrt())
    torch.testing.assert_close(win.exp(), expected)


@pytest.mark.parametrize(("logps", "nu"), [(rao_kupper_logps, 3.0), (davidson_logps, 1.0)])
@pytest.mark.parametrize("truth", [-1.3, 0.0, 0.6])
def test_labels_with_ties_are_most_likely_at_the_gap_that_made_them(
    logps: Callable[[Tensor, float], tuple[Tensor, Tensor, Tensor]], nu: float, truth: float
) -> None:
    outcomes = torch.stack(logps(double(truth), nu)).exp()[:, 0]
    gap = torch.linspace(-4, 4, 8001, dtype=torch.float64)
    expected = torch.zeros_like(gap)
    for probability, label in zip(outcomes, (1.0, 0.5, 0.0), strict=True):
        expected += probability * tie_loss(logps(gap, nu), torch.full_like(gap, label))
    assert gap[expected.argmin()].item() == pytest.approx(truth, abs=2e-3)


def test_a_tie_pulls_the_responses_together_and_other_labels_are_probabilities() -> None:
    margin = double(3).requires_grad_()
    for loss in (RaoKupperLoss(), DavidsonLoss()):
        batch = replace(pairs(n=1), **of_margins(margin))
        (tied,) = torch.autograd.grad(loss(replace(batch, label=double(0.5)), BETA).sum(), margin)
        assert tied.item() > 0
        level = double(0).requires_grad_()
        tie = replace(batch, policy_chosen=level, label=double(0.5))
        (none,) = torch.autograd.grad(loss(tie, BETA).sum(), level)
        assert none.item() == 0
        hard = [loss(replace(batch, label=double(label)), BETA).item() for label in (1.0, 0.0)]
        soft = loss(replace(batch, label=double(0.7)), BETA).item()
        assert soft == pytest.approx(0.7 * hard[0] + 0.3 * hard[1])


# -- transport ---------------------------------------------------------------------------------------------------------


def test_one_pair_of_aot_is_dpo() -> None:
    for i in range(6):
        batch = pairs(seed=i, n=1)
        for paired in (True, False):
            torch.testing.assert_close(AOTLoss(paired=paired)(batch, BETA), DPOLoss()(batch, BETA))
            smoothed = AOTLoss(paired=paired, label_smoothing=0.2)(batch, BETA)
            torch.testing.assert_close(smoothed, CDPOLoss(0.2)(batch, BETA))


@pytest.mark.parametrize("paired", [True, False])
def test_aot_is_the_smallest_loss_over_all_matchings(paired: bool) -> None:
    """The DPO loss is convex in the difference, so that matching by rank has the smallest mean of all permutations."""
    batch = replace(pairs(n=5), label=torch.ones(5, dtype=torch.float64))
    if paired:
        first = batch.policy_chosen - batch.policy_rejected
        second = batch.reference_chosen - batch.reference_rejected
    else:
        first, second = batch.policy_chosen - batch.reference_chosen, batch.policy_rejected - batch.reference_rejected
    means = [
        torch.nn.functional.softplus(-BETA * (first - second[list(order)])).mean().item()
        for order in permutations(range(5))
    ]
    assert AOTLoss(paired=paired)(batch, BETA).mean().item() == pytest.approx(min(means), rel=1e-12)
    assert min(means) < means[0] - 1e-3


@pytest.mark.parametrize("paired", [True, False])
def test_aot_does_not_depend_on_the_order_of_pairs(paired: bool) -> None:
    batch, order = pairs(), torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = replace(batch, **{name: getattr(batch, name)[order] for name in batch.__dataclass_fields__})
    loss = AOTLoss(paired=paired)
    torch.testing.assert_close(loss(shuffled, BETA), loss(batch, BETA)[order])
