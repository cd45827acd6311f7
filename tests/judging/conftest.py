"""The fault server as a fixture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def faults(load_module: Callable[[Path], ModuleType]) -> ModuleType:
    """The module `fault_server`."""
    return load_module(Path(__file__).with_name("fault_server.py"))
