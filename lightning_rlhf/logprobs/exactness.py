"""Exactness probes: compare a fast computation with a plain one, once per model, and remember the result.

Log-probabilities (`lightning_rlhf.logprobs.compute`) and generation (`lightning_rlhf.generation.lanes`) use an
optimization only with models that it does not change. The checks of checkpoints compare with the same tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Generic, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


Result = TypeVar("Result")


class ProbeCache(Generic[Result]):
    """Results of a probe by model; kept until attention implementation, data type or device of the model change.

    Args:
        probe: computes the result for a model.
    """

    def __init__(self, probe: Callable[[nn.Module], Result]) -> None:
        self._probe = probe
        # by the model of transformers, which adapters share; weak, so that a probe keeps no model in memory
        self._results: WeakKeyDictionary[PreTrainedModel, tuple[object, Result]] = WeakKeyDictionary()

    def __call__(self, model: nn.Module, base: PreTrainedModel) -> Result:
        """The result for a model, probed first if need be.

        Args:
            model: the model, perhaps with adapters.
            base: the model of transformers inside.
        """
        weight = cast(Tensor, base.get_input_embeddings().weight)
        # these select the attention kernel, and the rounding
        circumstances = (base.config._attn_implementation, weight.dtype, weight.device.type)
        known = self._results.get(base)
        if known is None or known[0] != circumstances:
            known = self._results[base] = (circumstances, self._probe(model))
        return known[1]


def reason_against(check: Callable[[], str | None]) -> str | None:
    """Run a check of an optimization: the reason against it, or None; an exception of the model is a reason."""
    try:
        return check()
    except torch.OutOfMemoryError:
        # says nothing about exactness, and must not be remembered
        raise
    except Exception as error:  # third-party model code may raise anything: reported in the warning
        return f"its forward pass raised {type(error).__name__}: {error}"


def rounding_tolerance(dtype: torch.dtype) -> float:
    """Tolerance for numbers of size 1: far above rounding, far below the effect of a wrong mask or weight."""
    return 3 * math.sqrt(torch.finfo(dtype).eps)


def largest_difference(left: Tensor, right: Tensor) -> float:
    """Largest absolute difference; infinity if one is not finite, so that NaN never passes a comparison."""
    difference = (left.double() - right.double()).abs().max().item()
    return difference if math.isfinite(difference) else math.inf


def nearly_equal(left: Tensor, right: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether two results of one shape differ by rounding alone.

    Args:
        left: one result.
        right: the other, whose size sets the scale.
        dtype: data type of the computation. Default: that of ``right``.
    """
    scale = max(1.0, right.abs().max().item())
    difference = largest_difference(left, right)
    # an infinite result makes the tolerance infinite as well
    return math.isfinite(difference) and difference <= rounding_tolerance(dtype or right.dtype) * scale
