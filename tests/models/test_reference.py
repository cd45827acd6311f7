"""References: what they compute, that they leave the policy untouched, and how they move."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lightning_rlhf.models.reference import (
    AbstractReference,
    AdapterOffReference,
    AdapterSnapshotReference,
    FrozenCopyReference,
    build_reference,
)


IDS = torch.tensor([[3, 9, 4, 1], [5, 6, 7, 8]])


def full_policy(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        attention_dropout=0.3,
    )
    return LlamaForCausalLM(config).train()


def lora_policy(dropout: float = 0.2) -> PeftModel:
    config = LoraConfig(
        task_type="CAUSAL_LM", r=2, lora_alpha=4, lora_dropout=dropout, target_modules=["q_proj", "v_proj"]
    )
    policy = get_peft_model(full_policy(), config)
    assert isinstance(policy, PeftModel)
    perturb(policy, 1.0)
    return policy.train()


def perturb(policy: nn.Module, scale: float, seed: int = 1) -> None:
    """A stand-in for training: move all trained tensors, LoRA's B, which starts at zero, too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter))


def logits(model: nn.Module) -> Tensor:
    """Logits in eval mode, training flags restored."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        result = model(IDS).logits
    for module, flag in flags:
        module.training = flag
    return result


def reference_logits(reference: AbstractReference) -> Tensor:
    with reference.active() as model:
        return model(IDS).logits


def fingerprint(policy: nn.Module) -> dict[str, Any]:
    """Everything that a reference could spoil: tensors, where they live, training modes, gradients wanted."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in policy.state_dict().items()},
        "pointers": {name: p.data_ptr() for name, p in policy.named_parameters()},
        "training": {name: module.training for name, module in policy.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in policy.named_parameters()},
        "disabled": {
            name: m._disable_adapters for name, m in policy.named_modules() if hasattr(m, "_disable_adapters")
        },
    }


def assert_untouched(policy: nn.Module, before: dict[str, Any]) -> None:
    after = fingerprint(policy)
    for name, tensor in before.pop("tensors").items():
        assert torch.equal(tensor, after["tensors"][name]), name
    del after["tensors"]
    assert after == before


BUILDERS: dict[str, Callable[[], tuple[Any, AbstractReference]]] = {}


def builder(function: Callable[[], tuple[Any, AbstractReference]]) -> Callable[[], tuple[Any, AbstractReference]]:
    BUILDERS[function.__name__] = function
    return function


@builder
def adapter_off() -> tuple[Any, AbstractReference]:
    policy = lora_policy()
    return policy, AdapterOffReference(policy)


@builder
def adapter_snapshot() -> tuple[Any, AbstractReference]:
    policy = lora_policy()
    reference = AdapterSnapshotReference(policy)
    perturb(policy, 0.5, seed=2)
    return policy, reference


@builder
def frozen_copy() -> tuple[Any, AbstractReference]:
    policy = full_policy()
    reference = FrozenCopyReference(copy.deepcopy(policy))
    perturb(policy, 0.1, seed=2)
    return policy, reference


everyone = pytest.mark.parametrize("build", list(BUILDERS.values()), ids=list(BUILDERS))
movers = pytest.mark.parametrize("build", [adapter_snapshot, frozen_copy])


# --- what every reference promises ---


@everyone
def test_an_exception_inside_leaves_the_policy_bitwise_untouched(
    build: Callable[[], tuple[Any, AbstractReference]],
) -> None:
    policy, reference = build()
    policy.get_submodule(next(n for n, _ in policy.named_modules() if n.endswith("layers.1"))).eval()
    before = fingerprint(policy)
    with pytest.raises(IndexError), reference.active() as model:
        model(IDS + 10_000)  # no such tokens
    assert_untouched(policy, before)


@everyone
def test_reference_differs_from_policy_and_has_neither_dropout_nor_gradient(
    build: Callable[[], tuple[Any, AbstractReference]],
) -> None:
    policy, reference = build()
    first, second = reference_logits(reference), reference_logits(reference)
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert (first - logits(policy)).abs().max() > 1e-3
    assert not torch.equal(policy(IDS).logits, policy(IDS).logits), "the policy keeps its dropout"


@everyone
def test_reference_stays_put_while_the_policy_trains(build: Callable[[], tuple[Any, AbstractReference]]) -> None:
    policy, reference = build()
    before = reference_logits(reference)
    perturb(policy, 0.5, seed=3)
    assert torch.equal(reference_logits(reference), before)


@everyone
def test_contexts_nest_and_work_under_inference_mode(build: Callable[[], tuple[Any, AbstractReference]]) -> None:
    policy, reference = build()
    expected, before = reference_logits(reference), fingerprint(policy)
    with torch.inference_mode(), reference.active() as outer:
        with reference.active() as inner:
            assert torch.equal(inner(IDS).logits, expected)
        assert torch.equal(outer(IDS).logits, expected)
    assert_untouched(policy, before)
    policy(IDS).logits.sum().backward()


@everyone
def test_a_graph_recorded_before_the_reference_ran_still_gives_its_gradient(
    build: Callable[[], tuple[Any, AbstractReference]],
) -> None:
    policy, reference = build()
    policy.eval()
    trained = [p for p in policy.parameters() if p.requires_grad]
    expected = torch.autograd.grad(policy(IDS).logits.pow(2).sum(), trained)
    loss = policy(IDS).logits.pow(2).sum()
    reference_logits(reference)
    for got, want in zip(torch.autograd.grad(loss, trained), expected, strict=True):
        assert torch.equal(got, want)


# --- the adapter switched off ---


def test_adapter_off_equals_pefts_own_disable_adapter_and_the_base_model() -> None:
    policy, reference = adapter_off()
    policy.eval()
    with policy.disable_adapter(), torch.no_grad():
        expected = policy(IDS).logits
    policy.train()
    assert torch.equal(reference_logits(reference), expected)
    assert torch.equal(expected, logits(full_policy()))


def test_adapter_off_respects_flags_that_were_set_before() -> None:
    policy, reference = adapter_off()
    with policy.disable_adapter():
        reference_logits(reference)
        assert torch.equal(logits(policy), logits(full_policy()))
    assert not torch.equal(logits(policy), logits(full_policy()))


def test_adapter_off_also_switches_off_modules_to_save() -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    policy = get_peft_model(full_policy(), config)
    assert isinstance(policy, PeftModel)
    perturb(policy, 1.0)
    assert torch.equal(reference_logits(AdapterOffReference(policy)), logits(full_policy()))


def test_adapter_off_refuses_a_merged_adapter() -> None:
    policy, reference = adapter_off()
    policy.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"), reference.active():
        pass


def test_adapter_off_cannot_move() -> None:
    policy, reference = adapter_off()
    with pytest.raises(ValueError, match="build_reference"):
        reference.update(policy, "previous")
    assert reference.version == 0


# --- references that move ---


@movers
def test_previous_takes_the_policy_as_it_is(build: Callable[[], tuple[Any, AbstractReference]]) -> None:
    policy, reference = build()
    reference.update(policy, "previous")
    assert reference.version == 1
    torch.testing.assert_close(reference_logits(reference), logits(policy), rtol=0, atol=0)
    perturb(policy, 0.5, seed=4)
    assert (reference_logits(reference) - logits(policy)).abs().max() > 1e-3


@movers
def test_ema_follows_its_closed_form(build: Callable[[], tuple[Any, AbstractReference]]) -> None:
    policy, reference = build()
    expected = {name: tensor.clone() for name, tensor in _weights(reference).items()}
    names = dict(_model(policy).named_parameters())
    for step in range(3):
        perturb(policy, 0.2, seed=10 + step)
        with torch.inference_mode():  # rounds move the reference under inference mode, too
            reference.update(policy, "ema", 0.7)
        expected = {name: 0.7 * old + 0.3 * names[name].detach() for name, old in expected.items()}
    assert reference.version == 3
    for name, tensor in _weights(reference).items():
        torch.testing.assert_close(tensor, expected[name])
    # and the weights are the ones that compute
    twin = copy.deepcopy(policy)
    with torch.no_grad():
        for name, parameter in _model(twin).named_parameters():
            if name in expected:
                parameter.copy_(expected[name])
    torch.testing.assert_close(reference_logits(reference), logits(twin))


@pytest.mark.parametrize("decay", [0.0, 1.0])
@movers
def test_ema_limits(build: Callable[[], tuple[Any, AbstractReference]], decay: float) -> None:
    policy, reference = build()
    expected = logits(policy) if decay == 0.0 else reference_logits(reference)
    reference.update(policy, "ema", decay)
    torch.testing.assert_close(reference_logits(reference), expected)


@movers
@pytest.mark.parametrize("rule", ["previous", "ema"])
def test_state_survives_a_checkpoint(build: Callable[[], tuple[Any, AbstractReference]], rule: Any) -> None:
    policy, reference = build()
    for step in range(2):
        perturb(policy, 0.2, seed=20 + step)
        reference.update(policy, rule, 0.5)
    file = io.BytesIO()
    torch.save(reference.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    _, restored = build()
    assert not torch.equal(reference_logits(restored), reference_logits(reference))
    restored.load_state_dict(state)
    assert restored.version == 2
    assert torch.equal(reference_logits(restored), reference_logits(reference))
    # and goes on alike
    perturb(policy, 0.2, seed=30)
    for each in (reference, restored):
        each.update(policy, "ema", 0.5)
    assert torch.equal(reference_logits(restored), reference_logits(reference))


def test_state_dict_is_a_copy() -> None:
    policy, reference = adapter_snapshot()
    state = copy.deepcopy(reference.state_dict())
    kept = reference.state_dict()
    reference.update(policy, "previous")
    assert all(torch.equal(kept["weights"][name], tensor) for name, tensor in state["weights"].items())


def test_a_copy_that_has_not_moved_puts_nothing_into_checkpoints() -> None:
    _, reference = frozen_copy()
    assert reference.state_dict() == {"version": 0, "weights": {}}


@pytest.mark.parametrize("lora", [True, False])
def test_bfloat16_averages_keep_steps_too_small_for_bfloat16(lora: bool) -> None:
    policy: Any = lora_policy() if lora else full_policy()
    policy.to(torch.bfloat16)
    reference = build_reference(policy, "ema")
    name = next(iter(reference_weights := {n: p for n, p in _model(policy).named_parameters() if p.requires_grad}))
    parameter = reference_weights[name]
    with torch.no_grad():
        parameter.fill_(1.0)
    reference.update(policy, "previous")
    with torch.no_grad():
        parameter.fill_(2.0)
    for _ in range(100):
        reference.update(policy, "ema", 0.999)
    # 1 + 0.001 rounds to 1 in bfloat16, where the average would never leave
    torch.testing.assert_close(_weights(reference)[name], torch.full(parameter.shape, 2 - 0.999**100))
    with torch.inference_mode():
        assert reference_logits(reference).dtype == torch.bfloat16
    fresh = build_reference(policy, "ema")
    fresh.load_state_dict(reference.state_dict())
    for each in (reference, fresh):
        each.update(policy, "ema", 0.999)
    assert torch.equal(_weights(fresh)[name], _weights(reference)[name])


@movers
def test_refusals_name_the_problem(build: Callable[[], tuple[Any, AbstractReference]]) -> None:
    policy, reference = build()
    with pytest.raises(ValueError, match="'fixed'"):
        reference.update(policy, "fixed")
    with pytest.raises(ValueError, match="decay must lie"):
        reference.update(policy, "ema", 1.5)
    with pytest.raises(ValueError, match="different tensors"):
        reference.load_state_dict({"version": 1, "weights": {"nonsense": torch.zeros(1)}})
    reference.update(policy, "previous")
    state = reference.state_dict()
    name = next(iter(state["weights"]))
    state["weights"][name] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"has shape \(2, 2\) in the checkpoint"):
        reference.load_state_dict(state)
    assert reference.version == 1, "a refused update or load does not count"


def test_frozen_copy_of_a_lora_policy_and_of_its_own_gradients() -> None:
    policy = lora_policy()
    policy(IDS).logits.sum().backward()
    reference = FrozenCopyReference(copy.deepcopy(policy))
    expected = logits(policy)
    perturb(policy, 1.0)
    assert torch.equal(reference_logits(reference), expected)
    with reference.active() as model:
        assert isinstance(model, PreTrainedModel)
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    reference.to("cpu")
    assert torch.equal(reference_logits(reference), expected)


def test_build_reference_shares_what_it_can() -> None:
    policy = lora_policy()
    assert isinstance(build_reference(policy, "fixed"), AdapterOffReference)
    assert isinstance(build_reference(policy, "previous"), AdapterSnapshotReference)
    assert isinstance(build_reference(policy, "ema"), AdapterSnapshotReference)
    for rule in ("fixed", "previous", "ema"):
        assert isinstance(build_reference(full_policy(), rule), FrozenCopyReference)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'fixed', 'previous' or 'ema'; got 'sliding'"):
        build_reference(policy, "sliding")  # type: ignore[arg-type]


def test_adapter_snapshot_follows_a_module_that_was_cast_after_it_was_built() -> None:
    policy, reference = adapter_snapshot()
    expected = reference_logits(reference)
    policy.double()
    got = reference_logits(reference)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got.float(), expected, rtol=1e-4, atol=1e-5)


def _model(policy: Any) -> nn.Module:
    return policy.get_base_model() if isinstance(policy, PeftModel) else policy


def _weights(reference: AbstractReference) -> dict[str, Tensor]:
    """The reference's own tensors, at the precision it keeps."""
    if isinstance(reference, AdapterSnapshotReference):
        return reference.state_dict()["weights"]
    assert isinstance(reference, FrozenCopyReference)
    state: dict[str, Tensor] = reference.state_dict()["weights"]
    return state or dict(reference._model.named_parameters())
