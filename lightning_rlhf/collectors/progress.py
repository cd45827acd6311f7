"""Progress bars of rounds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from tqdm.auto import tqdm


def count_tokens(bar: Any) -> Callable[[int], None]:
    """Make a hook that shows on a progress bar how many tokens were decoded, so that it moves within a chunk."""
    total = 0

    def count(tokens: int) -> None:
        nonlocal total
        total += tokens
        bar.set_postfix_str(f"{total} tokens")

    return count


Progress = Callable[[str, int], AbstractContextManager[Any]]


def silent(description: str, total: int) -> AbstractContextManager[Any]:
    """Make a progress bar that shows nothing."""
    bar: AbstractContextManager[Any] = tqdm(total=total, desc=description, disable=True)
    return bar
