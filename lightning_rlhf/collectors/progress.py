"""Progress bars of rounds, in the bar of the Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from transformers.utils import logging as transformers_logging


if TYPE_CHECKING:
    from lightning.pytorch.callbacks.progress.rich_progress import CustomProgress


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
    bar: AbstractContextManager[Bar] = Tqdm(total=total, desc=description, disable=True)
    return bar


@contextmanager
def bar_of(trainer: Trainer, description: str, total: int, unit: str) -> Iterator[Bar]:
    """Show progress beside the bar of the Trainer: a line of its display, or a bar of the same library.

    Nothing is shown on ranks other than zero, nor where the Trainer shows no bar.

    Args:
        trainer: the Trainer.
        description: text in front of the bar.
        total: number of items.
        unit: name of an item.
    """
    bar = trainer.progress_bar_callback
    if (
        isinstance(bar, RichProgressBar)
        and bar.is_enabled
        and bar.progress is not None
        and bar.progress.live.is_started
    ):
        # a display of rich takes over the output: another bar would be printed into it, in a notebook without end
        line = _RichLine(bar.progress, description, total)
        try:
            yield line
        finally:
            line.close()
        return
    is_off = trainer.global_rank > 0 or bar is None or not getattr(bar, "is_enabled", True)
    with Tqdm(total=total, desc=description, unit=unit, leave=False, disable=is_off) as shown:
        yield shown


def silence_other_bars(trainer: Trainer) -> bool:
    """Switch off the bars of transformers where a display of rich writes into a notebook; returns whether it did.

    Such a bar is a line without an end, which rich (15.0) prints into itself whenever Jupyter flushes the output, until
    Python's recursion limit. Switch them on again with `restore_other_bars`.
    """
    if not isinstance(trainer.progress_bar_callback, RichProgressBar):
        return False
    from rich import get_console

    if not get_console().is_jupyter or not transformers_logging.is_progress_bar_enabled():
        return False
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return True


def restore_other_bars() -> None:
    """Undo `silence_other_bars`."""
    transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


class _RichLine:
    """A line in a display of rich.

    Args:
        progress: the display.
        description: text in front of the bar.
        total: number of items.
    """

    def __init__(self, progress: CustomProgress, description: str, total: int) -> None:
        self._progress, self._description = progress, description
        self._task = progress.add_task(description, total=total)

    def update(self, n: float = 1) -> None:
        """Advance by ``n`` items."""
        self._progress.update(self._task, advance=n, refresh=True)

    def set_postfix_str(self, s: str = "") -> None:
        """Show a text behind the description."""
        # drawn by Lightning's thread: tokens come too often for a refresh each
        self._progress.update(self._task, description=f"{self._description} {s}")
        self._progress.soft_refresh()

    def close(self) -> None:
        """Hide the line; Lightning finds its own lines by their number, so that none may be removed."""
        self._progress.update(self._task, visible=False, refresh=True)
