"""Whether the Hugging Face Hub answers: where it does not, cached files are opened at once, or a short error is raised.

huggingface_hub requests every file six times, over 25 seconds or more, before it looks into its cache.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info


ASK_AGAIN = 60.0
"""Seconds after which a Hub that did not answer is asked again."""

NO_CONNECTION = ("ConnectError", "ConnectTimeout", "ProxyError")
"""Classes of httpx and httpx2 for requests that did not arrive; slow answers are left to the retries of the library."""

_asked: dict[str, tuple[float, str | None]] = {}
"""By address: when it was asked, and why it did not answer; None if it did."""
_noted: set[str] = set()


def hub_fault() -> str | None:
    """Why nothing can be read from the Hub, with its address; None if it can be reached.

    A Hub that answered is not asked again in this process, one that did not after `ASK_AGAIN`.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"
    address = constants.ENDPOINT
    when, fault = _asked.get(address, (float("-inf"), ""))
    if fault is None or time.monotonic() - when < ASK_AGAIN:
        return fault
    fault = _connect(address)
    if fault is not None and "timed out" not in fault:
        # a name server may fail once
        time.sleep(1.0)
        fault = _connect(address)
    _asked[address] = (time.monotonic(), fault)
    return fault


@contextmanager
def hub_or_cache(source: Path | str) -> Iterator[None]:
    """Open a model or data in this context: from the cache alone where the Hub does not answer.

    Args:
        source: a Hub id; a folder needs no Hub.
    """
    # the base of an adapter may be a folder that is named by a text
    fault = None if Path(source).is_dir() else hub_fault()
    if fault is None:
        yield
        return
    from huggingface_hub import constants

    # read by huggingface_hub and transformers at every request; other code of the process keeps its own setting
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
    if not before and str(source) not in _noted:
        _noted.add(str(source))
        rank_zero_info(f"{fault}: {source} is read from the cache. HF_HUB_OFFLINE=1 skips the test of the connection")


def _connect(address: str) -> str | None:
    from huggingface_hub import constants, get_session

    try:
        # the session of huggingface_hub knows the proxies and certificates of the user
        get_session().head(address, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:
        if any(kind.__name__ in NO_CONNECTION for kind in type(error).__mro__):
            cause = "timed out" if "Timeout" in type(error).__name__ else " ".join(str(error).split())
            return f"{address} cannot be reached ({cause})"
    return None
