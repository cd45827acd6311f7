"""Pictures of what a run leaves, for the manual: ``python -m benchmarks.gallery``.

Runs the quickstart with a quarter of its rounds, or takes the folder of a run (``--run``), and writes docs/gallery/:
the reward-KL frontier, and the page ``report.html`` as a browser shows it, which needs chromium. Summary and first
answers come between the markers of docs/gallery.md. About a minute on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from shutil import which

import matplotlib.image
import numpy as np

from benchmarks.harness import machine
from benchmarks.results import ROOT, spliced
from lightning_rlhf.callbacks.summary import closing_line
from lightning_rlhf.cli import main


PAGE = ROOT / "docs" / "gallery.md"
COMMAND = [
    *("fit", "--config=quickstart", "--trainer.max_epochs=3", "--trainer.check_val_every_n_epoch=3"),
    "--trainer.callbacks+=RunPage",
]
ANSWERS = 4
"""Rows of the table of answers, the first ones."""


def run(argv: list[str] | None = None) -> Path:
    """Write pictures and page; returns the path of the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="folder of a finished run of the command on the page")
    parser.add_argument("--out", type=Path, default=PAGE.parent, help="folder of the page")
    parser.add_argument("--note", default="", help="text behind the name of the machine, e.g. how busy it was")
    options = parser.parse_args(argv)
    pictures = options.out / "gallery"
    pictures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.run or Path(scratch) / "run"
        if options.run is None:
            main([*COMMAND, f"--run_dir={folder}"])
        store_smaller(folder / "frontier.png", pictures / "frontier.png")
        photograph(folder / "report.html", pictures / "report.png")
        content = excerpt(folder, options.note)
    page = options.out / PAGE.name
    text = (page if page.exists() else PAGE).read_text(encoding="utf-8")
    page.write_text(spliced(text, "gallery", content), encoding="utf-8")
    return page


def excerpt(folder: Path, note: str = "") -> str:
    """Command, result and first answers of a run."""
    start = json.loads((folder / "run.json").read_text(encoding="utf-8"))["starts"][0]
    result = closing_line(json.loads((folder / "summary.json").read_text(encoding="utf-8")))
    answers = (folder / "completions.md").read_text(encoding="utf-8").splitlines()[: 2 + ANSWERS]
    command = " ".join(["lightning-rlhf", *COMMAND])
    return "\n\n".join(
        [
            f"```bash\n{command}\n```",
            f"On {machine()}{note}, {start['time'][:10]}; the last line of its output:",
            f"```text\n{result}\n```",
            "![Held-out reward against KL, at the start and at the end](gallery/frontier.png)",
            "`report.html`, by the callback `RunPage`:",
            "![The page with numbers, and answers before and after](gallery/report.png)",
            f"The first {ANSWERS} rows of `completions.md`, held-out prompts with their rewards:",
            "\n".join(answers),
        ]
    )


def photograph(page: Path, picture: Path, width: int = 1000, height: int = 1100) -> None:
    """Write the picture of a page in a browser.

    Raises:
        FileNotFoundError: if there is no chromium.
    """
    chromium = which("chromium") or which("google-chrome")
    if chromium is None:
        raise FileNotFoundError("the picture of report.html needs chromium; apt-get install chromium")
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "page.png"
        options = ["--headless=new", "--no-sandbox", "--hide-scrollbars", f"--window-size={width},{height}"]
        command = [chromium, *options, f"--screenshot={raw}", page.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True)
        store_smaller(raw, picture)


def store_smaller(source: Path, target: Path, levels: int = 16) -> None:
    """Copy a picture with few levels of each color, which compresses to a fraction."""
    pixels = matplotlib.image.imread(source)[..., :3]
    matplotlib.image.imsave(target, np.round(pixels * (levels - 1)) / (levels - 1))


if __name__ == "__main__":
    print(f"wrote {run(sys.argv[1:])}")
