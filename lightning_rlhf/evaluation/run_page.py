"""The result of a run as one page for a browser: its numbers, answers before and after, and the judged pairs."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from lightning_rlhf.evaluation.feedback import Feedback, feedback_lines, feedback_summary
from lightning_rlhf.ledger.store import PreferenceStore


MOST_PAIRS = 200
"""Judged pairs on the page, the newest ones."""
STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --line: #d9dee5; --paper: #fbfcfd; --card: #fff;
  --good: #1f7a5c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #9aa5b4; --line: #323b47; --paper: #14181e;
  --card: #1c222a; --good: #63c7a3; } }
body { margin: 0 auto; max-width: 64rem; padding: 2rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
p.soft, th { color: var(--soft); }
table { border-collapse: collapse; width: 100%; table-layout: fixed; background: var(--card); }
th, td { border: 1px solid var(--line); padding: .6rem .75rem; text-align: left; vertical-align: top;
  overflow-wrap: anywhere; white-space: pre-wrap; }
td.chosen { border-left: 4px solid var(--good); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.5rem; }
dt { color: var(--soft); } dd { margin: 0; }
"""


def run_page(folder: str | Path) -> str:
    """HTML about the run in a folder, from the files that are there; it needs no other file and no network.

    Args:
        folder: folder of the run, with any of ``summary.json``, ``completions.csv`` and ``ledger.sqlite``.
    """
    root = Path(folder)
    parts = ["<h1>What the model learned</h1>"]
    summary = _summary(root / "summary.json")
    feedback: Feedback = {}
    pairs: list[tuple[str, str, str, float]] = []
    if (root / "ledger.sqlite").exists():
        with PreferenceStore(root / "ledger.sqlite", read_only=True) as store:
            feedback, pairs = feedback_summary(store), list(_pairs(store))
    parts.append(_numbers(summary, feedback))
    answers = _answers(root / "completions.csv")
    if answers:
        parts += [
            "<h2>Answers to questions it was not trained on</h2>",
            _table(("Question", "Before", "After"), answers),
        ]
    if pairs:
        parts.append(f"<h2>Your verdicts, the newest {min(len(pairs), MOST_PAIRS)} of {len(pairs)}</h2>")
        rows = [(prompt, a, b) for prompt, a, b, _ in pairs[-MOST_PAIRS:]]
        better = [1 if p > 0.5 else 2 if p < 0.5 else None for *_, p in pairs[-MOST_PAIRS:]]
        parts.append('<p class="soft">A green line marks the better response.</p>')
        parts.append(_table(("Question", "Response a", "Response b"), rows, better))
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>What the model learned</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _summary(path: Path) -> Mapping[str, object]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _numbers(summary: Mapping[str, object], feedback: Feedback) -> str:
    shown = {
        "labels": "Labels",
        "steps": "Optimizer steps",
        "kl_after": "KL to the model it began as, nats per answer",
        "reward_before": "Held-out reward before",
        "reward_after": "Held-out reward after",
        "cost": "Cost of the labels",
        "seconds": "Seconds",
    }
    entries = []
    for name, words in shown.items():
        value = summary.get(name)
        # without a held-out reward these are null
        if isinstance(value, int | float):
            entries.append(f"<dt>{words}</dt><dd>{value:.4g}</dd>")
    lines = "".join(f"<p>{escape(line)}</p>" for line in feedback_lines(feedback))
    return f"<dl>{''.join(entries)}</dl>{lines}"


def _answers(path: Path) -> list[tuple[str, str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [(row["prompt"], row["before"], row["after"]) for row in csv.DictReader(file)]


def _pairs(store: PreferenceStore) -> Iterator[tuple[str, str, str, float]]:
    for preference in store.preferences():
        comparison = preference.comparison
        # equal responses were judged by nobody
        if not preference.label.is_free_tie:
            # the last turn says what was asked; the system prompt is the same everywhere
            turns = comparison.prompt.messages
            asked = str(turns[-1].get("content") or "") if turns else comparison.prompt.text
            yield asked, comparison.a.text, comparison.b.text, preference.probability


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], marked: Sequence[int | None] | None = None) -> str:
    """A table; ``marked`` is the column of each row that is the chosen one."""
    lines = ["<tr>" + "".join(f"<th>{escape(name)}</th>" for name in columns) + "</tr>"]
    for place, row in enumerate(rows):
        chosen = None if marked is None else marked[place]
        cells = [
            f"<td{' class=chosen' if number == chosen else ''}>{escape(text)}</td>" for number, text in enumerate(row)
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"
