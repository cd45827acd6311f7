"""Policy gradients on a language that can be enumerated: vocabulary 3 with EOS, two tokens at most, seven responses.

Expectations are sums over all responses (or over all pairs of them), so that gradients are compared with the exact
gradient of J in float64, without sampling error.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_rlhf.advantages import GAE, GRPO, RLOO, AbstractAdvantage, Episodes, LearnedBaseline
from lightning_rlhf.estimators import categorical_kl, objective_j
from lightning_rlhf.estimators.returns import (
    gae,
    group_relative,
    kl_price,
    leave_one_out,
    objective_weights,
    returns_to_go,
    token_rewards,
    whiten,
)
from lightning_rlhf.losses import (
    clipped_loss,
    clipped_value_loss,
    kl_loss,
    reinforce_loss,
    response_weights,
    value_loss,
)


EOS, LIMIT = 0, 2
RESPONSES = [(0,), *((first, second) for first in (1, 2) for second in (0, 1, 2))]
LENGTHS = torch.tensor([len(r) for r in RESPONSES])
GENERATOR = torch.Generator().manual_seed(0)
POLICY = torch.randn(3, 3, generator=GENERATOR, dtype=torch.float64)
REFERENCE = torch.randn(3, 3, generator=GENERATOR, dtype=torch.float64)
REWARD = torch.randn(7, generator=GENERATOR, dtype=torch.float64)
VALUES = torch.randn(3, generator=GENERATOR, dtype=torch.float64)
"""Row 0 of the logits is the start; row v is the state behind token v. So are the values."""


def per_token(table: Tensor) -> Tensor:
    """log pi of every token of every response; [7, 2], 0 behind the end."""
    logps = table.log_softmax(-1)
    rows = []
    for response in RESPONSES:
        first = logps[0, response[0]]
        rows.append(torch.stack([first, logps[response[0], response[1]] if len(response) > 1 else first * 0]))
    return torch.stack(rows)


def per_response(table: Tensor) -> Tensor:
    return per_token(table).sum(1)


def values_of_states() -> Tensor:
    return torch.stack([torch.stack([VALUES[0], VALUES[r[0]] if len(r) > 1 else VALUES[0] * 0]) for r in RESPONSES])


def exact_gradient(table: Tensor, beta: float) -> Tensor:
    """Gradient of J = (1 - beta) E[r] - beta KL, by enumeration."""
    table = table.clone().requires_grad_()
    log_policy, log_reference = per_response(table), per_response(REFERENCE)
    objective = objective_j(log_policy, log_reference, (1 - beta) * REWARD, beta)
    (gradient,) = torch.autograd.grad(objective, table)
    return gradient


def rollouts(table: Tensor, chosen: list[int], groups: Tensor, beta: float, reward: Tensor = REWARD) -> Episodes:
    """The batch that the module makes of sampled responses."""
    ratios = (per_token(table) - per_token(REFERENCE)).detach()[chosen]
    rewards = token_rewards(reward[chosen], ratios, LENGTHS[chosen], *objective_weights("convex", beta))
    return Episodes(rewards, LENGTHS[chosen], groups, values_of_states()[chosen])


def mean_gradient(
    table: Tensor,
    beta: float,
    advantage: AbstractAdvantage,
    clip: float | None = None,
    size: int = 2,
    reward: Tensor = REWARD,
) -> Tensor:
    """Mean gradient of the loss over groups of independent responses, with its sign turned."""
    table = table.clone().requires_grad_()
    groups = torch.tensor(list(itertools.product(range(7), repeat=size)))
    chosen = groups.flatten().tolist()
    numbers = torch.arange(len(groups)).repeat_interleave(size)
    advantages = advantage(rollouts(table, chosen, numbers, beta, reward))
    logps = per_token(table)[chosen]
    tokens = reinforce_loss(logps, advantages) if clip is None else clipped_loss(logps, logps, advantages, clip)
    probability = per_response(table).exp().detach()
    weight = probability[groups].prod(1).repeat_interleave(size) / size
    (gradient,) = torch.autograd.grad((weight * tokens.sum(1)).sum(), table)
    return -gradient


class Returns(AbstractAdvantage):
    """Plain REINFORCE."""

    def __call__(self, episodes: Episodes) -> Tensor:
        return episodes.returns()


@pytest.mark.parametrize(
    "advantage", [Returns(), LearnedBaseline(), RLOO(), GAE(lam=1.0)], ids=lambda a: type(a).__name__
)
@pytest.mark.parametrize("beta", [0.0, 0.05, 0.6, 1.0])
def test_the_mean_gradient_is_that_of_j(advantage: AbstractAdvantage, beta: float) -> None:
    expected = exact_gradient(POLICY, beta)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(mean_gradient(POLICY, beta, advantage), expected, atol=1e-12, rtol=1e-9)
    # on the first pass the ratio is 1, and the clip takes nothing away
    torch.testing.assert_close(mean_gradient(POLICY, beta, advantage, clip=0.2), expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("size", [2, 4])
def test_a_mean_that_holds_the_response_itself_shrinks_the_gradient(size: int) -> None:
    exact = exact_gradient(POLICY, 0.2)
    shrunk = mean_gradient(POLICY, 0.2, GRPO(divide_by_std=False), size=size)
    torch.testing.assert_close(shrunk, exact * (size - 1) / size, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(mean_gradient(POLICY, 0.2, RLOO(), size=size), exact, atol=1e-12, rtol=1e-9)


def test_division_by_the_spread_changes_the_direction() -> None:
    exact = exact_gradient(POLICY, 0.2).flatten()
    cosines = [
        torch.nn.functional.cosine_similarity(mean_gradient(POLICY, 0.2, GRPO(), size=k).flatten(), exact, dim=0).item()
        for k in (2, 4)
    ]
    # of two responses only the order is left; more tell more of their distances
    assert 0.2 < cosines[0] < cosines[1] < 0.99


def test_gae_below_one_is_biased_unless_the_values_are_right() -> None:
    biased = mean_gradient(POLICY, 0.2, GAE(lam=0.5))
    assert (biased - exact_gradient(POLICY, 0.2)).abs().max() > 1e-3


def spread(baseline: Tensor, table: Tensor = POLICY) -> Tensor:
    """Total variance of the gradient of one response, with advantages ``Z_t - baseline``."""
    table = table.clone().requires_grad_()
    episodes = rollouts(table, list(range(7)), torch.arange(7), 0.1)
    tokens = reinforce_loss(per_token(table), episodes.returns() - baseline).sum(1)
    gradients = torch.stack([torch.autograd.grad(loss, table, retain_graph=True)[0].flatten() for loss in tokens])
    probability = per_response(table).exp().detach()
    mean = probability @ gradients
    return probability @ (gradients - mean).square().sum(1)


def test_a_baseline_changes_the_variance_only() -> None:
    table = POLICY
    episodes = rollouts(table, list(range(7)), torch.arange(7), 0.1)
    probability = per_response(table).exp()
    # the exact value of each state: the mean return of the responses that pass through it
    returns, values = episodes.returns(), torch.zeros(7, 2, dtype=torch.float64)
    values[:, 0] = probability @ returns[:, 0]
    for token in (1, 2):
        passing = torch.tensor([r[0] == token for r in RESPONSES])
        values[passing, 1] = (probability * returns[:, 1])[passing].sum() / probability[passing].sum()
    assert spread(values) < spread(torch.zeros(())) < spread(torch.tensor(5.0))
    # test_the_mean_gradient_is_that_of_j says that the mean stays


@pytest.mark.parametrize(("beta", "advantage"), [(0.05, RLOO()), (0.3, LearnedBaseline()), (0.3, RLOO())])
def test_training_ends_at_the_tilted_reference(beta: float, advantage: AbstractAdvantage) -> None:
    """pi_SFT exp(((1 - beta) / beta) r) / Z, the maximum of J."""
    log_reference, reward = per_response(REFERENCE), 0.2 * REWARD
    optimum = (log_reference + reward / kl_price("convex", beta)).log_softmax(0)
    table = REFERENCE.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([table], max_iter=100, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        table.grad = -mean_gradient(table.detach(), beta, advantage, reward=reward)
        return -objective_j(per_response(table), log_reference, (1 - beta) * reward, beta).detach()

    optimizer.step(closure)
    assert categorical_kl(per_response(table.detach()), optimum) < 1e-6


def test_at_beta_one_the_reference_is_kept() -> None:
    for advantage in (Returns(), LearnedBaseline(), RLOO(), GRPO(divide_by_std=False)):
        assert mean_gradient(REFERENCE, 1.0, advantage).abs().max() < 1e-12


def test_the_reward_is_that_of_the_last_token_and_filling_is_not_read() -> None:
    lengths = torch.tensor([1, 2, 3])
    ratios = torch.tensor([[0.5, torch.nan, torch.nan], [0.1, 0.2, torch.inf], [1.0, 2.0, 3.0]])
    rewards = token_rewards(torch.tensor([1.0, 2.0, 4.0]), ratios, lengths, 0.9, 0.1)
    expected = [[0.9 - 0.05, 0, 0], [-0.01, 1.8 - 0.02, 0], [-0.1, -0.2, 3.6 - 0.3]]
    torch.testing.assert_close(rewards, torch.tensor(expected))
    advantages = gae(rewards, torch.full_like(rewards, torch.nan).masked_fill(rewards != 0, 0.5), lengths)
    assert advantages[0, 1:].eq(0).all() and advantages[1, 2] == 0 and advantages.isfinite().all()


def test_gae_identities() -> None:
    generator = torch.Generator().manual_seed(3)
    rewards, values = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64).unbind()
    lengths = torch.tensor([6, 1, 4, 2])
    mask = torch.arange(6) < lengths[:, None]
    rewards, values = rewards * mask, values * mask
    following = torch.cat([values[:, 1:], torch.zeros(4, 1)], 1)
    deltas = (rewards + 0.9 * following - values) * mask
    torch.testing.assert_close(gae(rewards, values, lengths, 1.0, 1.0), (returns_to_go(rewards) - values) * mask)
    torch.testing.assert_close(gae(rewards, values, lengths, 0.9, 0.0), deltas)
    # by the definition, term by term
    weights = torch.tensor([[(0.9 * 0.7) ** (s - t) if s >= t else 0.0 for s in range(6)] for t in range(6)])
    torch.testing.assert_close(gae(rewards, values, lengths, 0.9, 0.7), deltas @ weights.T.double())
    # the length that rows are filled up to makes no difference
    torch.testing.assert_close(
        gae(rewards[1:2, :1], values[1:2, :1], lengths[1:2]), gae(rewards, values, lengths)[1:2, :1]
    )


def test_leave_one_out_by_hand() -> None:
    scores, groups = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0]), torch.tensor([0, 0, 0, 1, 1])
    torch.testing.assert_close(leave_one_out(scores, groups), torch.tensor([-3.0, -1.5, 4.5, 0.0, 0.0]))
    torch.testing.assert_close(leave_one_out(scores + 100, groups), leave_one_out(scores, groups))
    relative = group_relative(scores, groups)
    torch.testing.assert_close(relative[:3], (scores[:3] - 3) / (scores[:3].std() + 1e-4))
    assert relative[3:].eq(0).all()  # nothing to learn where all are alike
    for function in (leave_one_out, group_relative):
        with pytest.raises(ValueError, match=r"at least two responses per prompt; raise data\.responses_per_prompt"):
            function(scores, torch.tensor([0, 0, 0, 1, 2]))


def test_the_clip_takes_the_gradient_only_where_it_says() -> None:
    sampling = torch.zeros(4)
    logps = torch.tensor([1.5, 1.5, 0.5, 0.5]).log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss = clipped_loss(logps, sampling, advantages, 0.2)
    torch.testing.assert_close(loss, torch.tensor([-1.2, 1.5, -0.5, 0.8]))
    loss.sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(logps.grad, torch.tensor([0.0, 1.5, -0.5, 0.0]))


def test_value_losses_by_hand() -> None:
    values, targets = torch.tensor([1.0, 1.0, 0.1]), torch.tensor([2.0, 0.0, 1.0])
    torch.testing.assert_close(value_loss(values, targets), torch.tensor([1.0, 1.0, 0.81]))
    # V may have moved by 0.2 from 0: the first looks worse than it is, the second is, the third has not moved so far
    clipped = clipped_value_loss(values, torch.zeros(3), targets, 0.2)
    torch.testing.assert_close(clipped, torch.tensor([3.24, 1.0, 0.81]))


@pytest.mark.parametrize("placement", ["loss_k2", "loss_k3", "loss_k3_ratio"])
def test_the_kl_in_the_loss_has_the_gradient_that_the_page_says(placement: str) -> None:
    """Of the next token's KL at each sampled state: backwards for k3, forwards for k2 and for k3 times the ratio."""
    table = POLICY.clone().requires_grad_()
    probability = per_response(table).exp().detach()
    tokens = kl_loss(per_token(table), per_token(REFERENCE), placement)  # type: ignore[arg-type]
    (found,) = torch.autograd.grad((probability[:, None] * tokens).sum(), table)
    visits = torch.stack(
        [torch.ones(()).double(), *(probability[[r[0] == v for r in RESPONSES]].sum() for v in (1, 2))]
    )
    log_policy, log_reference = table.log_softmax(-1), REFERENCE.log_softmax(-1)
    forwards, backwards = categorical_kl(log_policy, log_reference), categorical_kl(log_reference, log_policy)
    (expected,) = torch.autograd.grad(visits @ (backwards if placement == "loss_k3" else forwards), table)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)
    # and k3 is unbiased in its value
    if placement != "loss_k2":
        mean = (probability[:, None] * tokens).sum().detach()
        torch.testing.assert_close(mean, (visits @ forwards).detach())


def test_the_ratio_makes_up_for_tokens_of_an_earlier_policy() -> None:
    earlier = torch.randn(3, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    table = POLICY.clone().requires_grad_()
    probability = per_response(earlier).exp()
    tokens = kl_loss(per_token(table), per_token(REFERENCE), "loss_k3_ratio", per_token(earlier))
    visits = torch.stack(
        [torch.ones(()).double(), *(probability[[r[0] == v for r in RESPONSES]].sum() for v in (1, 2))]
    )
    found = (probability[:, None] * tokens).sum()
    expected = visits @ categorical_kl(table.log_softmax(-1), REFERENCE.log_softmax(-1))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, table)[0] for loss in (found, expected)))


def test_aggregations_by_hand() -> None:
    lengths = torch.tensor([2, 8])
    weigh: Callable[..., Tensor] = response_weights
    assert weigh(lengths, "sum", 5.0, 10).tolist() == [1.0, 1.0]
    assert weigh(lengths, "sequence_mean", 5.0, 10).tolist() == [0.5, 0.125]
    assert weigh(lengths, "token_mean", 5.0, 10).tolist() == pytest.approx([0.2, 0.2])
    assert weigh(lengths, "max_length", 5.0, 10).tolist() == pytest.approx([0.1, 0.1])


def test_whitened_advantages_have_mean_zero_and_spread_one_over_real_tokens() -> None:
    advantages, lengths = torch.tensor([[1.0, 3.0, 0.0], [5.0, 0.0, 0.0]]), torch.tensor([2, 1])
    white = whiten(advantages, lengths)
    real = torch.tensor([white[0, 0], white[0, 1], white[1, 0]])
    assert real.mean().abs() < 1e-6 and real.std(correction=0) == pytest.approx(1.0)
    assert white[0, 2] == 0 and white[1, 1:].eq(0).all()


def test_objectives_by_name() -> None:
    assert objective_weights("convex", 0.05) == (0.95, 0.05)
    assert objective_weights("penalty", 2.0) == (1.0, 2.0)
    assert kl_price("convex", 0.05) == pytest.approx(1 / 19)
    assert kl_price("convex", 1.0) == float("inf")
    with pytest.raises(ValueError, match=r"beta must lie in \[0, 1\]; got 1.5"):
        objective_weights("convex", 1.5)
