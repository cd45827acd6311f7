"""Eval mode as a context manager: computation without dropout and without gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put modules in eval mode, without gradients, and restore the mode of each one afterwards.

    Args:
        modules: all modules, not just the root: ``model.modules()``. Collect them once if this is called often.
    """
    # not train(): it would also switch modules that were in eval mode before. Direct writes to __dict__, since train()
    # and setattr are slow, and this runs at every token
    training = [module for module in modules if module.__dict__["training"]]
    with torch.no_grad():
        try:
            for module in training:
                module.__dict__["training"] = False
            yield
        finally:
            for module in training:
                module.__dict__["training"] = True
