"""Responses of the policy to held-out prompts, before training and now."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lightning_rlhf.callbacks.base import HeldOutCallback
from lightning_rlhf.callbacks.reporting import Row, root, show_table
from lightning_rlhf.evaluation.heldout import HeldOutRow
from lightning_rlhf.types import State


COLUMNS = ["prompt", "before", "after", "reward before", "reward after"]


class CompletionsTable(HeldOutCallback):
    """Shows held-out prompts with the policy's answers before and after training.

    Writes ``completions.md`` and ``completions.csv`` into ``trainer.default_root_dir`` after each validation of a fit,
    and shows the table in TensorBoard and W&B. The first validation of the run counts as before, and is kept in the
    checkpoint; the latest one counts as after.

    Args:
        num_prompts: prompts shown, the first of the held-out set, >= 1.
    """

    def __init__(self, num_prompts: int = 8) -> None:
        super().__init__()
        if num_prompts < 1:
            raise ValueError(f"CompletionsTable needs at least one prompt; got num_prompts={num_prompts}")
        self.num_prompts = num_prompts
        self._before: dict[tuple[int, int, int], tuple[str, float | None]] = {}

    def on_held_out(self, trainer: Trainer, pl_module: LightningModule, rows: list[HeldOutRow]) -> None:
        """Write the table."""
        shown = rows[: self.num_prompts]
        first = not self._before
        if first:
            self._before = {row.key: (row.response, row.reward) for row in shown}
        # as for the frontier: a validation outside fit must not replace the files of a run
        if trainer.is_global_zero and trainer.state.fn == TrainerFn.FITTING:
            table = [self._line(row, first) for row in shown]
            folder = root(trainer)
            text = markdown(COLUMNS, table)
            (folder / "completions.md").write_text(text, encoding="utf-8")
            write_csv(folder / "completions.csv", COLUMNS, table)
            show_table(trainer, "val/completions", COLUMNS, table, text)

    def _line(self, row: HeldOutRow, first: bool) -> Row:
        response, reward = self._before.get(row.key, ("", None))
        return (
            [row.prompt, response, None, reward, None]
            if first
            else [row.prompt, response, row.response, reward, row.reward]
        )

    def state_dict(self) -> State:
        """The answers before training, as plain data."""
        return {"before": self._before}

    def load_state_dict(self, state_dict: State) -> None:
        """Restore the state of `state_dict`."""
        self._before = state_dict["before"]


def cell(value: str | float | None) -> str:
    """Write a value into a Markdown cell, with Markdown and HTML escaped."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3f}"
    # "&" first: the other two replacements contain one
    for character, written in {"&": "&amp;", "<": "&lt;", ">": "&gt;"}.items():
        value = value.replace(character, written)
    value = "".join(f"\\{character}" if character in "\\|`*_[]" else character for character in value)
    # a line break would end the row of the table
    return "<br>".join(value.splitlines())


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str | float | None]]) -> str:
    """Write a Markdown table."""
    lines = [list(columns), ["---"] * len(columns), *([cell(value) for value in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str | float | None]]) -> None:
    """Write a table as CSV, unknown values left empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
