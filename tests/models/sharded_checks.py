"""What test_sharding.py runs in two processes: ``torchrun --nproc_per_node=2 sharded_checks.py POLICY CHECK ...``."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from lightning_rlhf.models.load import LoRA, load_policy
from lightning_rlhf.models.reference import FrozenCopyReference, ReferenceRule, build_reference
from lightning_rlhf.models.scorer import Ensemble, Scorer, build_scorer
from lightning_rlhf.models.sharding import build_sharded, fill, full_state_dict, gathered, scattered, shard
from lightning_rlhf.runtime import distributed


IDS = torch.tensor([[5, 6, 7, 8]])
LORA = LoRA(r=2, alpha=4)


def on_rank_zero_only(build: Callable[..., Any]) -> Callable[[bool], Any]:
    """What `build_sharded` calls; fails where weights are read on another rank."""

    def checked(meta: bool = False) -> Any:
        assert meta or dist.get_rank() == 0, "weights were read on another rank than zero"
        model = build(meta=meta)
        assert all(tensor.is_meta == meta for tensor in (*model.parameters(), *model.buffers()))
        return model

    return checked


def sharded_policy(path: str, mesh: DeviceMesh, **options: Any) -> Any:
    """A policy in shards."""
    build = on_rank_zero_only(lambda meta: load_policy(path, meta=meta, **options))
    return build_sharded(build, shard, mesh, torch.device("cpu"))


def moved(model: Any, seed: int) -> Any:
    """The model after a step at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def check_same(got: nn.Module | dict[str, Tensor], expected: nn.Module | dict[str, Tensor]) -> None:
    """Fail unless names and tensors are equal bit by bit; what is sharded is gathered."""
    pair = [dict(x.named_parameters()) if isinstance(x, nn.Module) else x for x in (got, expected)]
    assert pair[0].keys() == pair[1].keys()
    for name, tensor in pair[1].items():
        other = pair[0][name]
        other = other.full_tensor() if isinstance(other, DTensor) else other
        assert other.dtype == tensor.dtype and torch.equal(other, tensor), name


def policy(path: str, mesh: DeviceMesh, lora: LoRA | None = None) -> None:
    """Weights, buffers, gradients and saved weights of a sharded policy are those of a whole one."""
    torch.manual_seed(dist.get_rank())  # the random numbers of rank zero count
    model = sharded_policy(path, mesh, lora=lora)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    expected: Any = load_policy(path, lora=lora)
    if dist.get_rank() == 0:
        assert torch.equal(state, torch.get_rng_state()), "other random numbers than in one process"
    assert model.training
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    check_same(model, expected)
    check_same(dict(model.named_buffers()), dict(expected.named_buffers()))
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()

    fill(model, partial(moved, copy.deepcopy(expected), 1))
    moved(expected, 1)
    check_same(model, expected)
    for each in (model, expected):
        each(input_ids=IDS).logits.square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert p.requires_grad == q.requires_grad, name
        if q.requires_grad:
            torch.testing.assert_close(p.grad.full_tensor(), q.grad, atol=1e-6, rtol=1e-4)
    saved = full_state_dict(model)
    assert saved is not None
    if dist.get_rank() == 0:
        check_same(saved, expected.state_dict())


def adapters(path: str, mesh: DeviceMesh) -> None:
    """The same of a policy with adapters."""
    policy(path, mesh, LORA)


def scorer(path: str, mesh: DeviceMesh) -> None:
    """Backbone, adapters and heads of a reward model; the heads are random."""
    options: dict[str, Any] = {"ensemble": Ensemble(kind="linear", size=2), "lora": LORA}
    torch.manual_seed(0)
    build = on_rank_zero_only(lambda meta: build_scorer(path, meta=meta, **options))
    model = build_sharded(build, Scorer.shard, mesh, torch.device("cpu"))
    torch.manual_seed(0)
    check_same(model, build_scorer(path, **options))


def reference(path: str, mesh: DeviceMesh) -> None:
    """A sharded reference moves, computes, is saved and restored as a whole one."""
    cases: list[tuple[str, ReferenceRule]] = [("float32", "previous"), ("float32", "ema"), ("bfloat16", "ema")]
    for dtype, rule in cases:
        model, expected = sharded_policy(path, mesh, dtype=dtype), load_policy(path, dtype=dtype)
        found = build_reference(model, rule, sharded_policy(path, mesh, dtype=dtype))
        plain = build_reference(expected, rule)
        assert isinstance(found, FrozenCopyReference)
        for seed in range(3):
            fill(model, partial(moved, copy.deepcopy(expected), seed))
            moved(expected, seed)
            with gathered(model, found.own_model):
                with scattered(model):
                    found.update(model, rule, 0.9)
                plain.update(expected, rule, 0.9)
                with found.active() as one, plain.active() as other, torch.no_grad():
                    assert torch.equal(one(input_ids=IDS).logits, other(input_ids=IDS).logits)
        saved, wanted = found.state_dict(), plain.state_dict()
        assert saved["version"] == wanted["version"] == 3
        if dist.get_rank() == 0:
            check_same(saved["weights"], wanted["weights"])
        else:
            assert not saved["weights"], "rank zero alone writes"
        fresh = build_reference(model, rule, sharded_policy(path, mesh, dtype=dtype))
        fresh.load_state_dict(wanted)
        for each in (fresh, plain):
            each.update(model if each is fresh else expected, "ema", 0.9)
        assert isinstance(fresh, FrozenCopyReference)
        assert isinstance(plain, FrozenCopyReference)
        check_same(fresh.own_model, plain.own_model)


def no_weights(path: str, mesh: DeviceMesh) -> None:
    """An error of rank zero ends all ranks."""

    def build(meta: bool) -> Any:
        if not meta:
            raise FileNotFoundError("no weights here")
        return load_policy(path, meta=True)

    try:
        build_sharded(build, shard, mesh, torch.device("cpu"))
    except (FileNotFoundError, distributed.RankError) as error:
        print(f"rank {dist.get_rank()}: {type(error).__name__}: {error}\n", end="", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for check in sys.argv[2:]:
        globals()[check](sys.argv[1], init_device_mesh("cpu", (2,)))
    distributed.leave()
