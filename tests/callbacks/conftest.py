"""The toy run, as a fixture: test folders are no packages, so a test cannot import its neighbor."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    """The module `toy_run`."""
    spec = importlib.util.spec_from_file_location("toy_run", Path(__file__).with_name("toy_run.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy_run"] = module
    spec.loader.exec_module(module)
    return module
