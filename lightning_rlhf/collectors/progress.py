"""Progress bars of rounds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from tqdm.auto import tqdm


class Bar(Protocol):
    """A progress bar, as `tqdm` makes them."""

    def update(self, n: float = 1) -> object:
        """Advance by ``n`` items."""

    def set_postfix_str(self, s: str = "") -> None:
        """Show a text at the end of the bar."""


def count_tokens(bar: Bar) -> Callable[[int], None]:
    """Make a hook that shows on a progress bar how many tokens were decoded, so that it moves within a chunk."""
    total = 0

    def count(tokens: int) -> None:
        nonlocal total
        total += tokens
        bar.set_postfix_str(f"{total} tokens")

    return count


Progress = Callable[[str, int], AbstractContextManager[Bar]]


def silent(description: str, total: int) -> AbstractContextManager[Bar]:
    """Make a progress bar that shows nothing."""
    bar: AbstractContextManager[Bar] = tqdm(total=total, desc=description, disable=True)
    return bar
