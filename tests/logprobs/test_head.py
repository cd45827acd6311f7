"""The fused head against plain logits and autograd."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from lightning_rlhf.logprobs import head
from lightning_rlhf.logprobs.head import LogitRule, score_tokens, tile_size


TOKENS, WIDTH, VOCAB = 13, 6, 29
RULES = [LogitRule(), LogitRule(temperature=0.7), LogitRule(scale=0.25), LogitRule(2.0, 3.0, 1.3)]


def case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*s, generator=generator).to(dtype) for s in ((TOKENS, WIDTH), (VOCAB, WIDTH), (VOCAB,))
    )
    return (
        hidden,
        weight,
        bias,
        torch.randint(VOCAB, (TOKENS,), generator=generator),
        torch.randn(TOKENS, generator=generator).to(dtype),
    )


def plain(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rule: LogitRule
) -> tuple[Tensor, Tensor, Tensor]:
    """The twin: all logits, autograd."""
    logits = rule.scale * (hidden @ weight.T + bias)
    if rule.cap:
        logits = rule.cap * torch.tanh(logits / rule.cap)
    table = (logits / rule.temperature).log_softmax(-1)
    entropy = -(table.exp() * table).sum(-1)
    return table[torch.arange(TOKENS), targets], entropy, table.argmax(-1) == targets


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tile", [None, 4, 1])
@pytest.mark.parametrize("trained", ["hidden weight bias", "hidden weight", "hidden", "weight"])
def test_values_and_gradients_equal_autograd_in_float64(rule: LogitRule, tile: int | None, trained: str) -> None:
    hidden, weight, bias, targets, upstream = case()
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in trained.split())
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    logps, entropy, greedy = plain(hidden, weight, bias, targets, rule)
    expected = torch.autograd.grad(logps @ upstream, wanted)
    scores = score_tokens(hidden, weight, targets, bias=bias, rule=rule, tile=tile, statistics=True)
    found = torch.autograd.grad(scores.logps @ upstream, wanted, retain_graph=True)
    again = torch.autograd.grad(scores.logps @ upstream, wanted)
    torch.testing.assert_close(scores.logps, logps)
    torch.testing.assert_close(scores.entropy, entropy)
    assert scores.greedy is not None and torch.equal(scores.greedy, greedy) and not scores.entropy.requires_grad  # type: ignore[union-attr]
    for first, second, gradient in zip(found, again, expected, strict=True):
        torch.testing.assert_close(first, gradient)
        torch.testing.assert_close(second, gradient)


def test_nothing_is_kept_without_gradients() -> None:
    hidden, weight, bias, targets, _ = case()
    with torch.no_grad():
        scores = score_tokens(hidden, weight.requires_grad_(), targets, bias=bias)
    assert scores.logps.grad_fn is None and scores.entropy is None
    torch.testing.assert_close(scores.logps, plain(hidden, weight, bias, targets, LogitRule())[0].detach())


@pytest.mark.parametrize("tile", [None, 4])
@pytest.mark.parametrize("frozen", [True, False])
def test_bfloat16_products_and_float32_softmax(tile: int | None, frozen: bool) -> None:
    hidden, weight, bias, targets, upstream = case(torch.float32)
    expected = plain(hidden, weight, bias, targets, LogitRule())[0]
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    with torch.autocast("cpu", torch.bfloat16):
        scores = score_tokens(hidden, weight, targets, bias=bias, tile=tile)
    (scores.logps @ upstream).backward()
    assert scores.logps.dtype == hidden.grad.dtype == torch.float32  # type: ignore[union-attr]
    torch.testing.assert_close(scores.logps, expected, rtol=0, atol=0.05)
    reference = torch.autograd.grad(plain(hidden, weight, bias, targets, LogitRule())[0] @ upstream, hidden)[0]
    torch.testing.assert_close(hidden.grad, reference, rtol=0, atol=0.05)


def test_a_forbidden_token_leaves_the_entropy_finite() -> None:
    hidden, weight, _, targets, _ = case()
    bias = torch.zeros(VOCAB, dtype=torch.float64).index_fill_(0, torch.tensor([3]), -torch.inf)
    scores = score_tokens(hidden, weight, targets, bias=bias, statistics=True)
    assert bool(scores.entropy.isfinite().all())  # type: ignore[union-attr]


def test_tiles_come_from_a_byte_budget() -> None:
    assert tile_size(50_000, 2**20) == 5 and tile_size(10**9, 1) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", ["", "hidden", "hidden weight"])
def test_memory_that_is_used_again_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, trained: str
) -> None:
    """Tiles in one buffer, and exponentials a few rows at a time, against new memory for each, all rows at once."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(40, 16, generator=generator), torch.randn(1000, 16, generator=generator)
    targets, rule = torch.randint(1000, (40,), generator=generator), LogitRule(cap=3.0, temperature=0.7)
    hidden.requires_grad_("hidden" in trained)
    weight.requires_grad_("weight" in trained)

    def scored(bias: Tensor | None) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            scores = score_tokens(hidden, weight, targets, bias=bias, rule=rule, tile=15, statistics=True)
        wanted = [leaf for leaf in (hidden, weight) if leaf.requires_grad]
        gradients = torch.autograd.grad(scores.logps.sum(), wanted) if wanted else ()
        assert scores.entropy is not None and scores.greedy is not None
        return [scores.logps.detach(), scores.entropy, scores.greedy, *gradients]

    for bias in (None, torch.randn(1000, generator=generator)):
        with monkeypatch.context() as patch:
            patch.setattr(head, "_take_buffer", lambda *_: None)
            expected = scored(bias)
        # 3 rows of exponentials at a time
        monkeypatch.setattr(head, "SCRATCH_BYTES", 3 * 4000)
        with torch.inference_mode():
            score_tokens(hidden, weight, targets, bias=bias, tile=15)
        found = scored(bias)
        # results are no views of memory that the next call overwrites
        score_tokens(hidden.detach() + 1, weight.detach(), targets, tile=15)
        assert all(map(torch.equal, found, expected))
        assert len(head._idle) == 1


def test_threads_do_not_share_the_memory_of_a_tile() -> None:
    hidden, weight = torch.randn(200, 8), torch.randn(500, 8)
    targets = torch.arange(200)
    with torch.no_grad():
        expected = [score_tokens(hidden * k, weight, targets, tile=50).logps for k in range(8)]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda k: score_tokens(hidden * k, weight, targets, tile=50).logps, range(8)))
    assert all(map(torch.equal, found, expected))
