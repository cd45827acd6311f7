"""The completions server as a fixture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def servers(load_module: Callable[[Path], ModuleType]) -> ModuleType:
    """The module `completion_server`."""
    return load_module(Path(__file__).with_name("completion_server.py"))
