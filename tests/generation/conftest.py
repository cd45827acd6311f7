"""The completions server as a fixture: test folders are no packages, so a test cannot import its neighbor."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def servers() -> ModuleType:
    """The module `completion_server`."""
    spec = importlib.util.spec_from_file_location("completion_server", Path(__file__).with_name("completion_server.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["completion_server"] = module
    spec.loader.exec_module(module)
    return module
