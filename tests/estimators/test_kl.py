"""The KL estimators against exact KL, by enumeration of every token and of every response."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_rlhf.estimators import categorical_kl, k1, k2, k3, kl_per_sequence, kl_per_token, pad_ragged


def laws(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).log_softmax(-1)


def test_categorical_kl_by_hand_and_with_impossible_outcomes() -> None:
    # p = (1/2, 1/2, 0), q = (1/4, 1/2, 1/4): KL = 1/2 log 2
    log_p, log_q = (torch.tensor([law], dtype=torch.float64).log() for law in ([0.5, 0.5, 0.0], [0.25, 0.5, 0.25]))
    assert categorical_kl(log_p, log_q).item() == pytest.approx(math.log(2) / 2, rel=1e-15)
    assert categorical_kl(log_q, log_p).item() == math.inf
    assert categorical_kl(log_p, log_p).item() == 0.0


def test_expectations_over_tokens() -> None:
    log_p, log_q = laws(0, 50, 7), laws(1, 50, 7)
    exact, p = categorical_kl(log_p, log_q), log_p.exp()
    torch.testing.assert_close((p * k1(log_p, log_q)).sum(-1), exact, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close((p * k3(log_p, log_q)).sum(-1), exact, rtol=1e-13, atol=1e-13)
    # k2: half the second moment of the log-ratio, that is (variance + KL^2) / 2; not the KL when the laws are far apart
    variance = (p * (log_p - log_q - exact[:, None]) ** 2).sum(-1)
    torch.testing.assert_close((p * k2(log_p, log_q)).sum(-1), (variance + exact**2) / 2, rtol=1e-13, atol=1e-13)
    assert ((p * k2(log_p, log_q)).sum(-1) - exact).abs().min() > 1e-3
    assert (k3(log_p, log_q) >= 0).all()
    assert (k2(log_p, log_q) >= 0).all()
    assert (k1(log_p, log_q) < 0).any()  # not clamped


def test_all_three_agree_to_second_order() -> None:
    log_p, direction = laws(0, 7), laws(1, 7)
    bias = []
    for step in (1e-2, 5e-3):
        log_q = (log_p + step * direction).log_softmax(-1)
        bias.append(((log_p.exp() * k2(log_p, log_q)).sum() - categorical_kl(log_p, log_q)).abs().item())
    assert bias[0] / bias[1] == pytest.approx(8, rel=0.05)  # the difference is third order in the log-ratio


def test_gradients_on_policy_samples() -> None:
    # E[grad k2] is the gradient of the KL, E[grad k1] = E[grad log pi] = 0 (Schulman's note warns of this).
    theta, log_q = laws(3, 6).requires_grad_(), laws(4, 6)
    log_p = theta.log_softmax(-1)
    p = log_p.detach().exp()
    exact, of_k1, of_k2 = (
        torch.autograd.grad(value.sum(), theta, retain_graph=True)[0]
        for value in (categorical_kl(log_p, log_q), p * k1(log_p, log_q), p * k2(log_p, log_q))
    )
    torch.testing.assert_close(of_k2, exact, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(of_k1, torch.zeros_like(of_k1), rtol=0, atol=1e-15)
    assert exact.abs().max() > 1e-2


def responses_of_a_tiny_model() -> tuple[list[Tensor], list[Tensor], Tensor, float]:
    """Every response of a three-token model (token 0 is EOS, at most three tokens) with its probability.

    Returns per-token log-probabilities under policy and reference, probabilities of whole responses under the policy,
    and the exact KL between the two laws of whole responses.
    """
    log_p, log_q = laws(5, 3, 3, 3), laws(6, 3, 3, 3)  # [position, previous token, token]
    policy, reference, done = [], [], []
    open_prefixes: list[tuple[int, ...]] = [()]
    for position in range(3):
        open_prefixes = [(*prefix, token) for prefix in open_prefixes for token in range(3)]
        done += [prefix for prefix in open_prefixes if prefix[-1] == 0 or position == 2]
        open_prefixes = [prefix for prefix in open_prefixes if prefix[-1] != 0]
    for response in done:
        steps = list(enumerate(zip((0, *response), response, strict=False)))
        policy.append(torch.stack([log_p[t, before, token] for t, (before, token) in steps]))
        reference.append(torch.stack([log_q[t, before, token] for t, (before, token) in steps]))
    totals = torch.stack([row.sum() for row in policy])
    exact = (totals.exp() * (totals - torch.stack([row.sum() for row in reference]))).sum().item()
    return policy, reference, totals.exp(), exact


@pytest.mark.parametrize("estimator", [k1, k3])
def test_sums_over_responses_are_unbiased_for_the_kl_of_whole_responses(estimator: object) -> None:
    policy, reference, probabilities, exact = responses_of_a_tiny_model()
    assert len(policy) == 1 + 2 + 4 * 3
    assert probabilities.sum().item() == pytest.approx(1, rel=1e-14)
    (policy_logps, lengths), (reference_logps, _) = pad_ragged(policy), pad_ragged(reference)
    sums = kl_per_sequence(policy_logps, reference_logps, lengths, estimator)  # type: ignore[arg-type]
    assert (probabilities * sums).sum().item() == pytest.approx(exact, rel=1e-13)
    assert exact > 0.1


def test_per_token_mean_divides_by_the_tokens_of_all_responses() -> None:
    policy, lengths = pad_ragged([[-1.0, -2.0, -3.0], [-4.0]])
    reference, _ = pad_ragged([[-2.0, -2.0, -1.0], [-4.5]])
    assert lengths.tolist() == [3, 1]
    assert kl_per_sequence(policy, reference, lengths).tolist() == [-1.0, 0.5]
    assert kl_per_token(policy, reference, lengths).item() == -0.125
    assert kl_per_sequence(policy, reference, lengths, k2).tolist() == [2.5, 0.125]


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_padding_changes_neither_values_nor_gradients(estimator: object) -> None:
    policy, reference = laws(7, 2, 3).requires_grad_(), laws(8, 2, 3)
    lengths = torch.tensor([3, 2])
    for junk in (math.nan, -math.inf, 1e300):
        tail = torch.full((2, 4), junk, dtype=torch.float64)
        policy_tail = tail.clone().requires_grad_()
        padded = kl_per_sequence(
            torch.cat([policy, policy_tail], 1),
            torch.cat([reference, tail], 1),
            lengths,
            estimator,  # type: ignore[arg-type]
        )
        plain = kl_per_sequence(policy, reference, lengths, estimator)  # type: ignore[arg-type]
        torch.testing.assert_close(padded, plain, rtol=0, atol=0)
        gradient, of_tail = torch.autograd.grad(padded.sum(), (policy, policy_tail))
        torch.testing.assert_close(gradient, torch.autograd.grad(plain.sum(), policy)[0], rtol=0, atol=0)
        assert gradient[1, 2] == 0
        assert not of_tail.any()


def test_errors_name_what_is_missing() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        pad_ragged([])
    with pytest.raises(ValueError, match=r"at least one token; got lengths \[0, 0\]"):
        kl_per_token(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 0]))


def test_pad_ragged_keeps_gradient_and_accepts_empty_rows() -> None:
    row = torch.tensor([-1.0, -2.0], requires_grad=True)
    values, lengths = pad_ragged([row, torch.tensor([])])
    assert lengths.tolist() == [2, 0]
    assert values.tolist() == [[-1.0, -2.0], [0.0, 0.0]]
    values.sum().backward()
    assert row.grad is not None
    assert row.grad.tolist() == [1.0, 1.0]
