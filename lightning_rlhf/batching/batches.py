"""The tensors of a batch, and how a batch is split into micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import accumulate, chain
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from lightning_rlhf.types import Rollout


Ids = tuple[int, ...]


@runtime_checkable
class StepBatch(Protocol):
    """A batch that is an optimizer step; the items are pairs, or prompts with their responses."""

    @property
    def num_padding(self) -> int:
        """Padding items, at the end; they have weight 0."""

    @property
    def num_global(self) -> float | None:
        """Items of the optimizer step on all ranks, divided by the number of ranks; None counts the items here."""

    @property
    def weight(self) -> Tensor:
        """Weight of each item in the loss, [items]."""

    @property
    def names(self) -> Sequence[str]:
        """Name of each item in messages; may be empty."""

    def __len__(self) -> int:
        """Number of items, padding items included."""

    def split(self) -> Sequence[Self]:
        """Make a batch of each micro-batch, in order."""

    def to(self, device: torch.device | str) -> Self:
        """Move the tensors to a device."""


@dataclass(frozen=True)
class PromptBatch:
    """Fields that the batches below share; an item is a prompt with its pair or its responses.

    Args:
        prompts: token ids of the prompts.
        num_global: items of the optimizer step on all ranks, divided by the number of ranks. The loss is the sum over
            items divided by it, so that DDP's average over ranks is the mean over items. Default: the items here.
        micro_batches: number of items in each micro-batch; default: one micro-batch.
        num_padding: padding items at the end, of weight 0 and left out of metrics: a rank with fewer items must run as
            many micro-batches as the others.
        names: name of each item in messages; may be empty.
    """

    prompts: list[Ids]
    # by keyword, so that subclasses may add fields without a default
    num_global: float | None = field(default=None, kw_only=True)
    micro_batches: tuple[int, ...] | None = field(default=None, kw_only=True)
    num_padding: int = field(default=0, kw_only=True)
    names: list[str] = field(default_factory=list, kw_only=True)

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class PreferenceBatch(PromptBatch):
    """Labeled pairs; the response with P >= 0.5 is the chosen one, on a tie response a.

    A single response (`Comparison.is_single`) is an item whose rejected response has no tokens, and log-probability 0.

    Numbers per pair are float64 (float32 on MPS, which has no float64): they are few, and sums over many tokens.
    Log-probabilities are summed over tokens, in nats, and NaN where they were not computed.

    Args:
        prompts, num_global, micro_batches, num_padding, names: as in `PromptBatch`; the items are pairs.
        chosen: token ids of the preferred responses, or of single ones.
        rejected: token ids of the other responses; empty beside single ones.
        label: P(chosen preferred) in [0.5, 1], of a single response P(desirable) in [0, 1], [pairs].
        weight: weight of each pair in the loss, >= 0, [pairs].
        reference_chosen_logps: log pi_ref(chosen | prompt), [pairs].
        reference_rejected_logps: log pi_ref(rejected | prompt), [pairs].
        sampling_chosen_logps: log pi(chosen | prompt) of the policy at the time of sampling, untempered, [pairs].
        sampling_rejected_logps: the same of the rejected response, [pairs].
        chosen_from_reference: whether the chosen response was sampled from the reference; bool, [pairs].
        rejected_from_reference: the same of the rejected response.
    """

    chosen: list[Ids]
    rejected: list[Ids]
    label: Tensor
    weight: Tensor
    reference_chosen_logps: Tensor
    reference_rejected_logps: Tensor
    sampling_chosen_logps: Tensor
    sampling_rejected_logps: Tensor
    chosen_from_reference: Tensor
    rejected_from_reference: Tensor

    @cached_property
    def has_reference(self) -> bool:
        """Whether the reference log-probabilities of all pairs are known."""
        return _all_known(self.reference_chosen_logps, self.reference_rejected_logps)

    @cached_property
    def has_sampling(self) -> bool:
        """Whether the sampling-time log-probabilities of all pairs are known."""
        return _all_known(self.sampling_chosen_logps, self.sampling_rejected_logps)

    @cached_property
    def has_singles(self) -> bool:
        """Whether some of the items are single responses."""
        return not all(self.rejected)

    def groups(self) -> list[tuple[Ids, tuple[Ids, ...]]]:
        """Prompts with their two responses, as `lightning_rlhf.logprobs.compute.summed_logps` takes them.

        Responses count chosen, rejected, chosen, rejected, ...:
        ``chosen_logps, rejected_logps = summed_logps(policy, batch.groups()).view(-1, 2).unbind(1)``. A single response
        is alone in its group, see `by_pair`.
        """
        return [(p, (c, r) if r else (c,)) for p, c, r in zip(self.prompts, self.chosen, self.rejected, strict=True)]

    def by_pair(self, logps: Tensor) -> Tensor:
        """Values of the responses of `groups` as columns chosen and rejected, [pairs, 2]; 0 where there is no response.

        Args:
            logps: a value per response, in the order of `groups`; carries gradient.
        """
        if not self.has_singles:
            # order chosen, rejected, chosen, ...
            return logps.view(-1, 2)
        present = torch.tensor([[True, bool(ids)] for ids in self.rejected], device=logps.device)
        return torch.zeros(present.shape, dtype=logps.dtype, device=logps.device).masked_scatter(present, logps)

    def split(self) -> list[PreferenceBatch]:
        """Make a batch of each micro-batch, in order; each has the ``num_global`` of the whole step."""
        if self.micro_batches is None:
            return [self]
        if sum(self.micro_batches) != len(self) or min(self.micro_batches) < 1:
            raise ValueError(
                f"micro_batches {self.micro_batches} must be positive and add up to the {len(self)} pairs of the batch"
            )
        # padding pairs come last: pairs last_counted, ..., len(self) - 1
        parts, start, last_counted = [], 0, len(self) - self.num_padding
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for end in accumulate(self.micro_batches):
            # one entry per pair in every list and tensor: [start, end) is the micro-batch
            mine: dict[str, Any] = {name: v[start:end] for name, v in values.items() if isinstance(v, (list, Tensor))}
            num_padding = min(max(end - last_counted, 0), end - start)
            # each part divides by the count of the whole step: their gradients add up to that of the step
            part = replace(
                self, **mine, micro_batches=None, num_padding=num_padding, num_global=self.num_global or last_counted
            )
            # taken from the whole batch: computing them for a part may wait for the device
            # only True carries over: a part may be complete where the batch is not; vars() holds the cache
            # of cached_property, which a frozen dataclass cannot set as attributes
            vars(part).update({name: True for name in ("has_reference", "has_sampling") if getattr(self, name)})
            parts.append(part)
            start = end
        return parts

    def to(self, device: torch.device | str) -> PreferenceBatch:
        """Move the tensors to a device; Lightning calls this. Token ids stay on the CPU until they are packed."""
        single = torch.device(device).type == "mps"

        def move(tensor: Tensor) -> Tensor:
            # None keeps the type: flags stay bool
            return tensor.to(
                device, torch.float32 if single and tensor.is_floating_point() else None, non_blocking=True
            )

        return self._map(move)

    def pin_memory(self) -> PreferenceBatch:
        """Pin the tensors; the DataLoader calls this."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> PreferenceBatch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        mapped = replace(self, **{name: change(v) for name, v in values.items() if isinstance(v, Tensor)})  # type: ignore[arg-type]
        # computed while the tensors are on the CPU: on the device it would wait for the whole queue
        vars(mapped).update(has_reference=self.has_reference, has_sampling=self.has_sampling)
        return mapped


@dataclass(frozen=True)
class RolloutGroup:
    """The rollouts of one prompt with advantages; one number per token, response after response.

    Args:
        rollouts: responses to one prompt.
        advantages: advantage of each token.
        targets: target of the value model in the state before each token; None without a value model.
    """

    rollouts: tuple[Rollout, ...]
    advantages: tuple[float, ...]
    targets: tuple[float, ...] | None = None


@dataclass(frozen=True)
class ResponseBatch(PromptBatch):
    """Prompts with responses, sampled from the policy or recorded; an item is a prompt with all its responses.

    Args:
        prompts, num_global, micro_batches, num_padding, names: as in `PromptBatch`.
        responses: token ids of the responses to each prompt.
        numbers: five numbers per token, response after response, [5, tokens], float64 (float32 on MPS): log pi at
            sampling time, log pi_ref, advantage, V at sampling time, target of V; the last two NaN without a value
            model. [0, tokens] for recorded responses.
        weight: weight of each prompt in the loss, 0 for padding, [prompts].
        mean_length: mean tokens of a response of the optimizer step, over all ranks.
        max_length: token limit of the responses.
        temperature: softmax temperature of sampling.
    """

    responses: list[tuple[Ids, ...]]
    numbers: Tensor
    weight: Tensor
    mean_length: float
    max_length: int
    temperature: float = 1.0

    def groups(self) -> list[tuple[Ids, tuple[Ids, ...]]]:
        """Prompts with their responses, as `lightning_rlhf.logprobs.compute.response_logps` takes them."""
        return list(zip(self.prompts, self.responses, strict=True))

    def split(self) -> list[ResponseBatch]:
        """Make a batch of each micro-batch, in order; each has the ``num_global`` of the whole step."""
        if self.micro_batches is None:
            return [self]
        if sum(self.micro_batches) != len(self) or min(self.micro_batches) < 1:
            raise ValueError(
                f"micro_batches {self.micro_batches} must be positive and add up to the {len(self)} prompts of the "
                f"batch"
            )
        # prompts [start, end) own the columns [first, last) of numbers [5, tokens]
        parts, start, first, last_counted = [], 0, 0, len(self) - self.num_padding
        for size in self.micro_batches:
            end = start + size
            # last = first + sum_{i,k} |y_ik| over the responses k of the prompts i of the micro-batch
            last = first + sum(map(len, chain.from_iterable(self.responses[start:end])))
            parts.append(
                replace(
                    self,
                    prompts=self.prompts[start:end],
                    names=self.names[start:end],
                    responses=self.responses[start:end],
                    numbers=self.numbers[:, first:last],
                    weight=self.weight[start:end],
                    num_global=self.num_global or last_counted,
                    micro_batches=None,
                    num_padding=min(max(end - last_counted, 0), size),
                )
            )
            start, first = end, last
        return parts

    def to(self, device: torch.device | str) -> ResponseBatch:
        """Move the tensors to a device; Lightning calls this. Token ids stay on the CPU until they are packed."""
        dtype = torch.float32 if torch.device(device).type == "mps" else None
        numbers, weight = (t.to(device, dtype, non_blocking=True) for t in (self.numbers, self.weight))
        return replace(self, numbers=numbers, weight=weight)

    def pin_memory(self) -> ResponseBatch:
        """Pin the tensors; the DataLoader calls this."""
        return replace(self, numbers=self.numbers.pin_memory(), weight=self.weight.pin_memory())


def _all_known(*logps: Tensor) -> bool:
    # stacked, so that bool() waits for the device once and not once per tensor
    return not bool(torch.stack(logps).isnan().any())
