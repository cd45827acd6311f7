"""Float32 master weights for weights in bfloat16.

bfloat16 has eight significant bits: a step of 5e-7 on a weight of 0.02 rounds to no step at all, and AdamW's average
of squared gradients, which changes by 0.1 % per step, stays constant. So the optimizer works on float32 copies, and the
model computes with their rounded values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


MASTER = "master_weight"
"""Name of the float32 weight in the optimizer's state, and so in checkpoints."""


class MasterWeights(Optimizer):
    """Lets an optimizer work on float32 copies of weights that have fewer bits.

    Its groups hold the weights of the model, so that gradients are clipped and checked, and learning rates scheduled,
    as without it; make a schedule from this optimizer, not from the one inside. The states of the optimizer are float32
    too. Copies and states are in the state dict. Weights in float32 have no copy. Gradients are emptied by a step.

    Args:
        optimizer: any optimizer that needs no closure, just made; it is changed to work on the copies.

    Raises:
        ValueError: if the optimizer has taken a step already.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if optimizer.state:
            raise ValueError(f"MasterWeights needs a fresh optimizer; this {type(optimizer).__name__} has taken steps")
        super().__init__([{**group, "params": list(group["params"])} for group in optimizer.param_groups], {})
        self.defaults = optimizer.defaults
        self.optimizer = optimizer
        # the wrapped optimizer works on the copies from now on
        for group in optimizer.param_groups:
            group["params"] = [_master(parameter) for parameter in group["params"]]

    def add_param_group(self, param_group: dict[str, object]) -> None:
        """Add a group, as `torch.optim.Optimizer.add_param_group` does."""
        super().add_param_group(param_group)
        # the constructor of Optimizer calls this before `optimizer` exists
        if hasattr(self, "optimizer"):
            masters = [_master(parameter) for parameter in self.param_groups[-1]["params"]]
            self.optimizer.add_param_group({**self.param_groups[-1], "params": masters})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take a step on the copies and round them into the weights; weights without a gradient stay as they are.

        A weight that was changed from outside since the last step, by loading another model say, becomes the copy.

        Args:
            closure: computes loss and gradients; called once.
        """
        result = None
        if closure is not None:
            # a step runs without gradients, and the closure computes them
            with torch.enable_grad():
                result = closure()
        self._hand_settings_down()
        stepped = []
        for weight, master in self._pairs():
            # a weight in float32 is in the wrapped optimizer itself, with its gradient
            if master is weight:
                continue
            master.grad = None
            if weight.grad is not None:
                _follow(master, weight)
                # the model has no gradient of its own afterwards, which saves its memory
                master.grad, weight.grad = weight.grad.float(), None
                stepped.append((weight, master))
        self.optimizer.step()
        # round the copies into the weights
        for weight, master in stepped:
            _local(weight).copy_(_local(master))
            master.grad = None
        self._share_state()
        return result

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state of `state_dict`, in float32; torch's own would round it to the type of the weights.

        A state without copies, of a run before there were any, begins with copies of the weights as they are.
        """
        states = state_dict["state"]
        own = {key: _without_master(state) for key, state in states.items()}
        self.optimizer.load_state_dict({**state_dict, "state": own})
        # restored outside too, since each step hands the settings of the outer groups down
        for outer, inner in zip(self.param_groups, self.optimizer.param_groups, strict=True):
            outer.update({name: value for name, value in inner.items() if name != "params"})
        # the keys of a state dict follow the order of the groups, as `_pairs` does
        keys = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
        for key, (weight, master) in zip(keys, self._pairs(), strict=True):
            # a checkpoint of a version without copies holds none
            if master is not weight:
                held = states.get(key, {}).get(MASTER)
                _local(master).copy_(_local(weight if held is None else held))
        self.state.clear()
        self._share_state()

    def forget_states(self) -> None:
        """Go on as a fresh optimizer, on the copies as they are."""
        self.optimizer.state.clear()
        self.state.clear()
        self._share_state()

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Weights and their copies, in order."""
        for outer, inner in zip(self.param_groups, self.optimizer.param_groups, strict=True):
            yield from zip(outer["params"], inner["params"], strict=True)

    def _hand_settings_down(self) -> None:
        """Copy the settings of the groups, which a schedule may change, to the wrapped optimizer."""
        for outer, inner in zip(self.param_groups, self.optimizer.param_groups, strict=True):
            inner.update({name: value for name, value in outer.items() if name != "params"})

    def _share_state(self) -> None:
        # state_dict reads self.state, which has the weights of the model as keys, not the copies
        for weight, master in self._pairs():
            state = self.optimizer.state.get(master, {})
            if master is not weight:
                self.state[weight] = {**state, MASTER: master.detach()}
            elif state:
                self.state[weight] = state


def _without_master(state: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in state.items() if name != MASTER}


def is_half(tensor: Tensor) -> bool:
    """Whether a tensor has fewer bits than float32."""
    return tensor.is_floating_point() and tensor.itemsize < 4


def refuse_half_weights(optimizers: Iterable[Optimizer], owner: str) -> None:
    """Refuse optimizers that would work on weights in float16, or on weights in bfloat16 without copies.

    Args:
        optimizers: those of a run.
        owner: class that made them, for the message.

    Raises:
        ValueError: naming the remedy.
    """
    for optimizer in optimizers:
        kinds: set[torch.dtype] = set()
        for group in optimizer.param_groups:
            kinds.update(parameter.dtype for parameter in group["params"] if is_half(parameter))
        if torch.float16 in kinds:
            raise ValueError(
                f"{owner} trains weights in float16, whose small gradients are 0; set model.options.dtype=bfloat16, or "
                f"model.options.dtype=float32 with trainer.precision=16-mixed on a GPU"
            )
        if kinds and not isinstance(optimizer, MasterWeights):
            raise ValueError(
                f"configure_optimizers of {owner} gives a {type(optimizer).__name__} on weights in bfloat16, which "
                f"small steps would not change; return lightning_rlhf.models.master_weights.MasterWeights(optimizer) "
                f"and make the schedule from that, or set model.options.dtype=float32"
            )


def _master(weight: Tensor) -> Tensor:
    """A float32 copy of a weight with fewer bits, sharded as it is; any other weight itself."""
    if not is_half(weight):
        return weight
    # a copy made in inference mode could not be changed in place by a step
    with torch.inference_mode(False), torch.no_grad():
        return nn.Parameter(weight.detach().to(torch.float32, copy=True))


def _follow(master: Tensor, weight: Tensor) -> None:
    """Set a copy to its weight wherever the copy does not round to the weight."""
    mine, theirs = _local(master), _local(weight)
    # keep the copy where it still rounds to the weight: it has the bits that the weight lacks
    mine.copy_(torch.where(mine.to(theirs.dtype) == theirs, mine, theirs.to(mine.dtype)))


def _local(tensor: Tensor) -> Tensor:
    """The shard of this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
