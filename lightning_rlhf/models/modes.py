"""Eval mode for a while: how every part of the library computes without dropout and without gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put modules in eval mode, without gradients, and restore the mode of each one afterwards.

    Args:
        modules: each of them, not just the root: ``model.modules()``. Collect them once where this is called often.
    """
    # straight into __dict__: train() walks the tree and setattr searches parameters, both at every token; and train()
    # would wake up modules that were in eval mode before
    training = [module for module in modules if module.__dict__["training"]]
    with torch.no_grad():
        try:
            for module in training:
                module.__dict__["training"] = False
            yield
        finally:
            for module in training:
                module.__dict__["training"] = True
