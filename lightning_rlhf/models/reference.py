"""Frozen references: the base under the adapter, a snapshot of the adapter, or a copy of the whole policy.

A reference is no ``nn.Module``: a LightningModule may keep it as an attribute without adding it to its parameters or
``state_dict``. Log-probabilities are computed inside ``with reference.active()``.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, TypeAlias, TypedDict, cast

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from lightning_rlhf.logprobs.eval_mode import evaluating
from lightning_rlhf.models.lora import changes_base
from lightning_rlhf.runtime import distributed


ReferenceRule: TypeAlias = Literal["fixed", "previous", "ema"]
Policy: TypeAlias = PreTrainedModel | PeftModel


class ReferenceState(TypedDict):
    """State of a reference in a checkpoint.

    Attributes:
        version: see `AbstractReference`.
        weights: tensors that differ from the initial policy, by name, on the CPU.
    """

    version: int
    weights: dict[str, Tensor]


class AbstractReference(ABC):
    """The model that computes log pi_ref.

    Attributes:
        version: number of updates; log-probabilities computed under another version are stale.
    """

    version: int = 0

    @property
    def own_model(self) -> PreTrainedModel | None:
        """The model, where it is not the policy's; it may be sharded."""
        return None

    @abstractmethod
    def active(self) -> AbstractContextManager[PreTrainedModel]:
        """Context in which the causal LM computes the reference, in eval mode and without gradients.

        Where the reference shares its weights with the policy, the policy *is* the reference inside: do not use it.
        Leaving, also by an exception, restores the policy bit by bit. Contexts may nest.
        """

    @abstractmethod
    def update(self, policy: Policy, rule: ReferenceRule, decay: float = 0.9) -> None:
        """Update the reference and increase ``version``.

        Args:
            policy: the policy that the reference was built from, with its present weights; sharded if the reference is.
            rule: ``previous`` copies the policy; ``ema`` averages, w <- decay w + (1 - decay) w_policy.
            decay: weight of the old reference under ``ema``, in [0, 1].

        Raises:
            ValueError: if the rule is ``fixed``, or this kind of reference cannot move.
        """

    def to(self, device: torch.device | str) -> None:
        """Move weights of the reference's own to a device; those shared with the policy stay where they are."""
        del device

    def state_dict(self) -> ReferenceState:
        """State for a checkpoint, beyond the initial policy."""
        return {"version": self.version, "weights": {}}

    def load_state_dict(self, state: ReferenceState) -> None:
        """Restore the result of `state_dict`, on a reference built from the same initial policy."""
        self.version = int(state["version"])


class AdapterOffReference(AbstractReference):
    """The model under the adapter: the initial policy of a LoRA run, without extra memory.

    Sets the same flags as ``peft.disable_adapter``, on layers collected once: peft searches all modules at each call,
    which takes milliseconds, and decoding changes between policy and reference at every token.

    Args:
        policy: the policy; its adapters must not be merged.
    """

    def __init__(self, policy: PeftModel) -> None:
        self._model = _causal_lm(policy)
        self._modules = list(policy.modules())
        self._layers = [m for m in self._modules if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
        if not self._layers:
            raise ValueError(
                f"{type(policy).__name__} has no adapter layers to switch off; build the policy with "
                f"load_policy(lora=LoRA()), or use FrozenCopyReference"
            )

    @contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        if any(layer.merged_adapters for layer in self._layers):
            # peft would unmerge first, which rounds the base weights
            raise ValueError("the adapter is merged into the base weights; call policy.unmerge_adapter() first")
        # nested contexts, and flags that the user has set, must be off afterwards as they were before
        before = [layer._disable_adapters for layer in self._layers]
        with evaluating(self._modules):
            try:
                for layer in self._layers:
                    # peft's enable_adapters would also change requires_grad; written to __dict__, since
                    # setattr of a module is slow and this runs at every token
                    layer.__dict__["_disable_adapters"] = True
                yield self._model
            finally:
                for layer, flag in zip(self._layers, before, strict=True):
                    layer.__dict__["_disable_adapters"] = flag

    @property
    def gates_rows(self) -> bool:
        """Whether `row_gate` works: plain LoRA on linear layers, one adapter at a time."""
        for layer in cast(list[LoraLinear], self._layers):
            # DoRA and other variants compute more than B A, and a bias of B would pass the gate
            more = layer.lora_variant or any(layer.lora_bias.values()) if type(layer) is LoraLinear else True
            if more or len(layer.active_adapters) != 1:
                return False
        return True

    @contextmanager
    def row_gate(self) -> Iterator[Callable[[Tensor], None]]:
        """Run rows of the policy and rows of the reference in one batch of the policy.

        Yields a function that sets the rows of the policy in the next forward passes: bool, [rows]. The other rows get
        zeros between the two factors of the adapter, which is exactly the base model; their products of rank r are
        wasted.
        """
        policy_rows = torch.ones(1, dtype=torch.bool)

        def set_rows(rows: Tensor) -> None:
            nonlocal policy_rows
            policy_rows = rows

        def gate(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            del module
            # h = W x + (alpha / r) B (g A x), with g = 1 in rows of the policy and 0 in rows of the reference
            # policy_rows: [rows] -> [rows, 1, 1] against A x: [rows, tokens, r]
            return (args[0] * policy_rows.view(-1, *[1] * (args[0].dim() - 1)).to(args[0].dtype),)

        if any(layer.merged_adapters for layer in self._layers):
            raise ValueError("the adapter is merged into the base weights; call policy.unmerge_adapter() first")
        hooks = []
        for layer in cast(list[LoraLinear], self._layers):
            up_projection = layer.lora_B[layer.active_adapters[0]]
            hooks.append(up_projection.register_forward_pre_hook(gate))
        try:
            yield set_rows
        finally:
            for hook in hooks:
                hook.remove()

    def update(self, policy: Policy, rule: ReferenceRule, decay: float = 0.9) -> None:
        raise ValueError(
            f"the base model under an adapter cannot move, but the rule is {rule!r}; "
            f"build the reference with build_reference(policy, {rule!r})"
        )


class AdapterSnapshotReference(AbstractReference):
    """An earlier, or averaged, state of the adapter over the same base model.

    Keeps a float32 copy of the trained tensors. `active` lets the policy's parameters point to the copy and back again:
    no data is copied, and a graph recorded before stays valid for its backward pass.

    Args:
        policy: the policy; the reference follows its trainable parameters.
    """

    def __init__(self, policy: PeftModel) -> None:
        self._model = _causal_lm(policy)
        self._modules = list(policy.modules())
        # owners, not parameters: moving or casting a module may exchange its parameters
        owners = {name: name.rpartition(".") for name in _trained(policy)}
        self._slots = {name: (self._model.get_submodule(path), leaf) for name, (path, _, leaf) in owners.items()}
        # always float32: an average in bfloat16 would not change by steps below 0.4 %
        self._weights = _copies({name: _full(tensor) for name, tensor in _trained(policy).items()}, torch.float32)

    @contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        parameters = [cast(nn.Parameter, module._parameters[name]) for module, name in self._slots.values()]
        before = [(parameter, parameter.data) for parameter in parameters]
        with evaluating(self._modules):
            try:
                for (parameter, data), key in zip(before, self._slots, strict=True):
                    # the policy may have moved to another device; the copy moves once and stays there
                    if self._weights[key].device != data.device:
                        self._weights[key] = self._weights[key].to(data.device)
                    # the policy may have been cast since; where the types agree, `to` copies nothing
                    parameter.data = self._weights[key].to(data.dtype)
                yield self._model
            finally:
                for parameter, data in before:
                    parameter.data = data

    def update(self, policy: Policy, rule: ReferenceRule, decay: float = 0.9) -> None:
        _move(self._weights, _trained(policy), rule, decay)
        self.version += 1

    def to(self, device: torch.device | str) -> None:
        self._weights = {name: tensor.to(device) for name, tensor in self._weights.items()}

    def state_dict(self) -> ReferenceState:
        return {"version": self.version, "weights": _saved(self._weights)}

    def load_state_dict(self, state: ReferenceState) -> None:
        _load(self._weights, state["weights"])
        super().load_state_dict(state)


class FrozenCopyReference(AbstractReference):
    """A model of its own, for full fine-tuning; it may be sharded as the policy is.

    Args:
        model: becomes the reference: in eval mode, and without gradients.
    """

    def __init__(self, model: Policy) -> None:
        self._model: PreTrainedModel = _causal_lm(model).eval().requires_grad_(False)  # type: ignore[no-untyped-call]
        # the average at full precision, where the model itself has less
        self._average: dict[str, Tensor] = {}

    @property
    def own_model(self) -> PreTrainedModel:
        return self._model

    @contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        with torch.no_grad():
            yield self._model

    def update(self, policy: Policy, rule: ReferenceRule, decay: float = 0.9) -> None:
        weights = dict(self._model.named_parameters())
        source = dict(_causal_lm(policy).named_parameters())
        low = {name: tensor for name, tensor in weights.items() if tensor.is_floating_point() and tensor.itemsize < 4}
        if rule == "ema" and low:
            self._average = self._average or _copies(low, torch.float32)
        else:
            # the model takes the new weights themselves, so that an earlier average ends here
            self._average = {}
        # where there is an average it takes the step, and the model gets its rounded values
        _move({**weights, **self._average}, source, rule, decay)
        _assign(weights, self._average)
        self.version += 1

    def to(self, device: torch.device | str) -> None:
        cast(nn.Module, self._model).to(device)
        self._average = {name: tensor.to(device) for name, tensor in self._average.items()}

    def state_dict(self) -> ReferenceState:
        # a reference without an update is the initial policy, which the run loads anyway
        # an average in place of its rounded weight: small steps would be lost on resuming
        weights = {**dict(self._model.named_parameters()), **self._average} if self.version else {}
        return {"version": self.version, "weights": _saved(weights)}

    def load_state_dict(self, state: ReferenceState) -> None:
        if state["version"]:
            weights = dict(self._model.named_parameters())
            _load(weights, state["weights"])
            # an average is recognized by its type, float32, where the model has fewer bits
            self._average = {
                name: _like(weights[name], tensor)
                for name, tensor in state["weights"].items()
                if tensor.dtype != weights[name].dtype
            }
        super().load_state_dict(state)


def build_reference(
    policy: Policy, rule: ReferenceRule, original: Policy | None = None, *, continued: bool = False
) -> AbstractReference:
    """Build the reference of a policy as it is now.

    Args:
        policy: the initial policy. A LoRA policy shares its base model with the reference; any other is copied.
        rule: ``fixed`` stays with the initial policy; ``previous`` and ``ema`` move when `AbstractReference.update` is
            called.
        original: the same policy once more, which becomes the reference in place of a copy; a policy that is sharded
            without LoRA needs one.
        continued: whether the adapter was trained before and belongs to the initial policy. The reference then is a
            snapshot of it, in place of the model with adapters switched off.

    Raises:
        ValueError: if the rule is unknown.
    """
    if rule not in ("fixed", "previous", "ema"):
        raise ValueError(f"the reference rule must be 'fixed', 'previous' or 'ema'; got {rule!r}")
    if not isinstance(policy, PeftModel):
        # `update` could not change inference tensors, of which a copy made in inference mode consists
        with torch.inference_mode(False):
            return FrozenCopyReference(copy.deepcopy(policy) if original is None else original)
    off = rule == "fixed" and not continued and off_is_start(policy)
    return AdapterOffReference(policy) if off else AdapterSnapshotReference(policy)


def off_is_start(policy: PeftModel) -> bool:
    """Whether a policy with its adapters switched off is, and stays, the policy before it got them.

    It is not where the adapter took its start out of the base weights (PiSSA, OLoRA), and it does not stay so where
    weights of the base are trained as well (``bias`` of LoRA).
    """
    if any(changes_base(config) for config in policy.peft_config.values()):
        return False
    inside: set[int] = set()
    base: set[int] = set()
    for layer in policy.modules():
        if isinstance(layer, BaseTunerLayer):
            inside.update(map(id, layer.parameters()))
            base.update(map(id, layer.get_base_layer().parameters()))
        if isinstance(layer, AuxiliaryTrainingWrapper):
            inside.update(map(id, layer.parameters()))
            base.update(map(id, cast(nn.Module, layer.original_module).parameters()))
    # weights of the base: those under adapters, and those outside of layers with adapters
    trained = _trained(policy).values()
    return not any(id(parameter) in base or id(parameter) not in inside for parameter in trained)


def _causal_lm(policy: Policy) -> PreTrainedModel:
    """The transformers model inside a peft model, or the model itself."""
    return cast(PreTrainedModel, policy.get_base_model() if isinstance(policy, PeftModel) else policy)


def _trained(policy: Policy) -> dict[str, nn.Parameter]:
    """Parameters that are trained, by their name in the transformers model."""
    return {name: p for name, p in _causal_lm(policy).named_parameters() if p.requires_grad}


def _copies(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Detached copies that share no memory, sharded as they are; ordinary tensors even under inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        return {name: tensor.detach().to(dtype=dtype, copy=True) for name, tensor in tensors.items()}


def _saved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU for a checkpoint, which rank zero writes; it alone keeps those that are sharded elsewhere."""
    kept: dict[str, Tensor] = {}
    with torch.inference_mode(False), torch.no_grad():
        for name, tensor in tensors.items():
            full = _full(tensor)
            if distributed.rank() == 0 or full is tensor:
                # copy=True also on the CPU: an update in place must not change an earlier state
                kept[name] = full.detach().to("cpu", copy=True)
    return kept


def _full(tensor: Tensor) -> Tensor:
    """The tensor, gathered if it is sharded; then every rank must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(target: Tensor, tensor: Tensor) -> Tensor:
    """A copy of a whole tensor on the device of another one, and sharded as that is."""
    tensor = tensor.to(target.device, copy=True)
    if isinstance(target, DTensor):
        # src_data_rank=None: every rank has the whole tensor and keeps its own part, without communication
        return distribute_tensor(tensor, target.device_mesh, target.placements, src_data_rank=None)
    return tensor


def _local(tensor: Tensor) -> Tensor:
    """The shard of this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _move(target: Mapping[str, Tensor], source: Mapping[str, Tensor], rule: ReferenceRule, decay: float) -> None:
    """Replace ``target`` by ``source``, or average the two, in place."""
    if rule not in ("previous", "ema"):
        raise ValueError(f"a reference moves by the rule 'previous' or 'ema'; got {rule!r}")
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay must lie in [0, 1]; got {decay}")
    _check_same(target, source, "the policy")
    with torch.inference_mode(False), torch.no_grad():
        for name, tensor in target.items():
            new = source[name].detach()
            # both are sharded alike, or the target not at all
            new = _local(new) if isinstance(tensor, DTensor) else _full(new)
            old = _local(tensor)
            if rule == "ema" and tensor.is_floating_point():
                # w <- decay w + (1 - decay) w_policy
                old.lerp_(new.to(old), 1.0 - decay)
            else:
                old.copy_(new)


def _load(target: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's tensors into ``target``."""
    _check_same(target, state, "the checkpoint")
    _assign(target, {name: _like(target[name], tensor) for name, tensor in state.items()})


def _assign(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Copy tensors that are sharded as those of ``target`` into them."""
    with torch.inference_mode(False), torch.no_grad():
        for name, tensor in source.items():
            _local(target[name]).copy_(_local(tensor))


def _check_same(target: Mapping[str, Tensor], source: Mapping[str, Tensor], origin: str) -> None:
    """Raise unless both hold the same names with the same shapes."""
    if target.keys() != source.keys():
        odd = sorted(target.keys() ^ source.keys())
        raise ValueError(
            f"{origin} and the reference have different tensors ({len(odd)}, e.g. {odd[0]!r}); "
            f"both must come from the same model with the same LoRA settings"
        )
    for name, tensor in target.items():
        if tensor.shape != source[name].shape:
            raise ValueError(
                f"{name!r} has shape {tuple(source[name].shape)} in {origin} and {tuple(tensor.shape)} in the "
                f"reference; both must come from the same model with the same LoRA settings"
            )
