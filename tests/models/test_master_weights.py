"""Float32 copies of bfloat16 weights: the steps of float32, kept exactly, also through checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_rlhf.models.master_weights import MASTER, MasterWeights, refuse_half_weights


Maker = Callable[[list[Any]], Optimizer]


def adamw(groups: list[Any]) -> Optimizer:
    return AdamW(groups, lr=1e-4, weight_decay=0.1, fused=True)


def momentum(groups: list[Any]) -> Optimizer:
    return SGD(groups, lr=1e-4, momentum=0.9)


def start(dtype: torch.dtype) -> list[nn.Parameter]:
    """Two weights that both types hold exactly, and one that is float32 in either case, as adapters are."""
    torch.manual_seed(0)
    values = [torch.randn(5, 3).bfloat16(), torch.randn(4).bfloat16()]
    return [*(nn.Parameter(v.to(dtype)) for v in values), nn.Parameter(torch.randn(2))]


def groups_of(weights: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": weights[:1]}, {"params": weights[1:], "lr": 3e-4}]


def give_gradients(weights: list[nn.Parameter], step: int) -> None:
    torch.manual_seed(100 + step)
    for weight in weights:
        weight.grad = torch.randn(weight.shape).bfloat16().to(weight.dtype)


def copies(optimizer: MasterWeights) -> list[Tensor]:
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    return [optimizer.state[w].get(MASTER, w).detach().clone() for w in weights]


@pytest.mark.parametrize("make", [adamw, momentum])
def test_copies_take_the_steps_of_float32_and_the_weights_are_their_rounding(make: Maker) -> None:
    single, half = start(torch.float32), start(torch.bfloat16)
    plain, wrapped = make(groups_of(single)), MasterWeights(make(groups_of(half)))
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)) for o in (plain, wrapped)]
    for step in range(20):
        for weights, optimizer, schedule in zip((single, half), (plain, wrapped), schedules, strict=True):
            give_gradients(weights, step)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    for expected, weight, held in zip(single, half, copies(wrapped), strict=True):
        assert torch.equal(held, expected)
        assert torch.equal(weight, expected.to(weight.dtype))
    # in bfloat16 itself hardly any weight would have moved
    fresh = start(torch.bfloat16)
    assert sum(int((a != b).sum()) for a, b in zip(fresh[:2], half[:2], strict=True)) < 8
    assert all(bool((a.float() != b).all()) for a, b in zip(fresh[:2], copies(wrapped)[:2], strict=True))


@pytest.mark.parametrize("make", [adamw, momentum])
def test_a_run_goes_on_from_its_state_dict_bit_by_bit(make: Maker) -> None:
    weights = start(torch.bfloat16)
    optimizer = MasterWeights(make(groups_of(weights)))
    for step in range(6):
        give_gradients(weights, step)
        optimizer.step()
        if step == 2:
            saved, values = copy.deepcopy(optimizer.state_dict()), [w.detach().clone() for w in weights]
    assert {v.dtype for state in saved["state"].values() for v in state.values() if v is not None} == {torch.float32}
    again = [nn.Parameter(value) for value in values]
    resumed = MasterWeights(make(groups_of(again)))
    resumed.load_state_dict(saved)
    for step in range(3, 6):
        give_gradients(again, step)
        resumed.step()
    assert all(map(torch.equal, copies(optimizer), copies(resumed)))
    assert all(map(torch.equal, weights, again))


def test_a_state_of_before_there_were_copies_is_taken_up() -> None:
    weights = start(torch.bfloat16)
    old = AdamW(groups_of(weights), lr=1e-2)
    give_gradients(weights, 0)
    old.step()
    optimizer = MasterWeights(adamw(groups_of(weights)))
    optimizer.load_state_dict(copy.deepcopy(old.state_dict()))
    assert all(torch.equal(held, w.float()) for held, w in zip(copies(optimizer), weights, strict=True))
    assert optimizer.param_groups[0]["lr"] == 1e-2
    assert all(s["exp_avg"].dtype == torch.float32 and s["exp_avg"].any() for s in optimizer.state.values())


def test_a_weight_without_gradient_stays_and_one_that_was_exchanged_is_followed() -> None:
    weights = start(torch.bfloat16)
    optimizer = MasterWeights(SGD(weights, lr=2**-12))
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    with torch.no_grad():
        weights[0].fill_(3.0)  # another model is loaded
    before = weights[1].detach().clone()
    weights[0].grad = torch.ones_like(weights[0])
    optimizer.step()
    assert torch.equal(copies(optimizer)[0], torch.full((5, 3), 3.0 - 2**-12))
    assert torch.equal(weights[1], before)
    later = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer.add_param_group({"params": [later], "lr": 2**-11})
    later.grad = torch.ones_like(later)
    assert optimizer.step(lambda: "loss") == "loss"
    assert torch.equal(copies(optimizer)[-1], torch.full((2,), 1 - 2**-11))


def test_unsuitable_optimizers_are_refused() -> None:
    refuse_half_weights([adamw(start(torch.float32)), MasterWeights(adamw(start(torch.bfloat16)))], "Mine")
    with pytest.raises(ValueError, match=r"of Mine gives a SGD on weights in bfloat16.*MasterWeights\(optimizer\)"):
        refuse_half_weights([SGD(start(torch.bfloat16), lr=1.0)], "Mine")
    with pytest.raises(ValueError, match=r"float16, whose small gradients are 0; set model\.options\.dtype=bfloat16"):
        refuse_half_weights([MasterWeights(adamw(start(torch.float16)))], "Mine")
    used = adamw(start(torch.bfloat16))
    give_gradients([p for group in used.param_groups for p in group["params"]], 0)
    used.step()
    with pytest.raises(ValueError, match="needs a fresh optimizer; this AdamW has taken steps"):
        MasterWeights(used)


@pytest.mark.parametrize("make", [adamw, momentum])
def test_an_optimizer_without_its_states_goes_on_as_a_fresh_one(make: Maker) -> None:
    single, half = start(torch.float32), start(torch.bfloat16)
    plain, wrapped = make(groups_of(single)), MasterWeights(make(groups_of(half)))
    for step in range(10):
        # both begin anew after five steps, the copies with the bits that they have
        if step == 5:
            plain.state.clear()
            wrapped.forget_states()
            assert all(set(wrapped.state[weight]) <= {MASTER} for weight in half)
        for weights, optimizer in ((single, plain), (half, wrapped)):
            give_gradients(weights, step)
            optimizer.step()
            optimizer.zero_grad()
    for weight, copied in zip(single, copies(wrapped), strict=True):
        torch.testing.assert_close(copied, weight.detach(), atol=0, rtol=0)
