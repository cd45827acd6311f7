"""The result of the run as a page, which opens in a browser."""

from __future__ import annotations

import os
import sys
import webbrowser

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_rlhf.callbacks.reporting import root
from lightning_rlhf.evaluation.run_page import run_page


class RunPage(Callback):
    """Writes ``report.html`` when the run ends: its numbers, answers before and after, and the judged pairs.

    It reads the files that `Summary` and `CompletionsTable` write into ``trainer.default_root_dir``, so list it behind
    them, and writes there on rank zero.

    Args:
        open_browser: open the page in a browser, where this machine has a display.
    """

    def __init__(self, open_browser: bool = False) -> None:
        self.open_browser = open_browser

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page, and open it."""
        if not trainer.is_global_zero:
            return
        path = (root(trainer) / "report.html").resolve()
        path.write_text(run_page(path.parent), encoding="utf-8")
        print(f"report: {path.as_uri()}", flush=True)
        # without a display a browser in text mode would take over the terminal
        has_display = sys.platform in ("darwin", "win32") or bool(
            os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
        )
        if self.open_browser and has_display:
            webbrowser.open(path.as_uri())
