"""Imports of the packages that serve the page; the extra ``human`` installs them."""

from __future__ import annotations

import importlib
from types import ModuleType


PACKAGES = ("jinja2", "markdown_it", "nh3", "starlette", "uvicorn")


def check_installed() -> None:
    """Check that the packages of the page are there.

    Raises:
        ImportError: naming the extra.
    """
    missing = [name for name in PACKAGES if _found(name) is None]
    if missing:
        raise ImportError(
            f"the annotation page needs {', '.join(missing)}: pip install 'lightning-rlhf[human]'", name=missing[0]
        )


def _found(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
