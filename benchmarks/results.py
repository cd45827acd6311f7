"""Measure the papers' claims again, and write them into the manual: ``python -m benchmarks.results``.

Runs the comparisons ``compare/tabular``, ``compare/menu`` and ``compare/rlaif`` (cells that are done are kept). Each
gets a page of its own in docs/results/, with tables, machine and date, beside its figures and the runs' curves, so that
a figure of the tables can be computed again without the runs. The first figure and a link to that page come between the
markers of docs/results.md, where the text is written by hand. ``--smoke`` does the same with two seeds and few labels,
into a folder of its own, in a few minutes. ``--only`` also takes comparisons that are left out otherwise, because they
take longer: ``menu_labels``, ``menu_models``, ``menu_judges``, ``menu_exploration``, ``menu_people``, ``menu_systems``,
``menu_ensembles``, ``menu_rlhf``, ``menu_thumbs``, ``quickstart_labels``, and ``stories``, ``stories_labels`` and
``stories_size``, which fetch a model with npm.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gzip
import io
import re
import shutil
import sys
from pathlib import Path

from benchmarks.harness import machine
from lightning_rlhf.cli import main
from lightning_rlhf.experiments.curves import read_cell


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results.md"
FIGURES = ("efficiency.png", "claims.png", "frontiers.png", "labels.png", "agreement.png", "alignment.png")
SMOKE = {
    "tabular": ["--experiment.seeds=2", "--experiment.arms=[Vanilla,PILAF,Policy-weighted]"],
    "menu": "compare/smoke",
    "rlaif": "compare/rlaif_smoke",
    "stories": ["--experiment.seeds=2", "--experiment.labels=8"],
    "menu_labels": ["--experiment.seeds=2", "--experiment.labels=160", "--at_labels=[80,160]"],
    "stories_labels": ["--experiment.seeds=2", "--experiment.labels=16", "--at_labels=[16]"],
    "stories_size": ["--experiment.seeds=2", "--experiment.labels=16", "--at_labels=[16]"],
    "menu_models": ["--experiment.seeds=2", "--experiment.labels=160", "--at_labels=[80,160]"],
    "menu_judges": ["--experiment.seeds=2", "--experiment.labels=160", "--at_labels=[80,160]"],
    "menu_exploration": ["--experiment.seeds=2", "--experiment.labels=96", "--at_labels=[48,96]"],
    "menu_people": ["--experiment.seeds=2"],
    "menu_systems": ["--experiment.seeds=2", "--experiment.labels=96", "--at_labels=[48,96]"],
    "menu_ensembles": ["--experiment.seeds=1"],
    "menu_rlhf": ["--experiment.seeds=1"],
    "menu_thumbs": ["--experiment.seeds=2", "--experiment.labels=96"],
    "quickstart_labels": ["--experiment.seeds=1", "--experiment.labels=48", "--at_labels=[24,48]"],
}
"""Makes a comparison short: arguments, or another comparison in its place."""
TITLES = {
    "tabular": "Tabular world",
    "menu": 'World "menu"',
    "rlaif": "RLAIF's claims",
    "stories": 'World "stories"',
    "menu_labels": 'Labels in the world "menu"',
    "stories_labels": 'Labels in the world "stories"',
    "stories_size": 'Labels in the world "stories", under the second oracle',
    "menu_models": 'Preference models in the world "menu"',
    "menu_judges": 'Judges of 78 and 63 % in the world "menu"',
    "menu_exploration": 'Efficient exploration in the world "menu"',
    "menu_people": 'People in the world "menu"',
    "menu_systems": 'Samplers of related systems in the world "menu"',
    "menu_ensembles": 'Ensembles of reward models in the world "menu"',
    "menu_rlhf": 'PILAF for reward models in the world "menu"',
    "menu_thumbs": 'PILAF for single responses in the world "menu"',
    "quickstart_labels": "SmolLM2-135M",
}
"""Titles of the pages with tables."""
ON_DEMAND = tuple(name for name in SMOKE if name not in ("tabular", "menu", "rlaif"))
"""Comparisons that are run only when asked for."""
EXACT = ("tabular",)
"""Comparisons that give the same curves again within minutes; theirs are large and not kept."""


def run(argv: list[str] | None = None) -> Path:
    """Run the comparisons and write the page; returns its path."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "results", help="folder of the cells")
    parser.add_argument("--out", type=Path, help="folder of the page; docs/ when not given, runs/ with --smoke")
    parser.add_argument("--only", choices=list(SMOKE), help="one comparison alone")
    parser.add_argument("--smoke", action="store_true", help="two seeds, to see that it works")
    parser.add_argument("rest", nargs="*", help="further arguments of `lightning-rlhf compare`, after --")
    options = parser.parse_args(argv)
    out = options.out or (options.runs if options.smoke else PAGE.parent)
    (out / "results").mkdir(parents=True, exist_ok=True)
    page = out / "results.md"
    text = (page if page.exists() else PAGE).read_text(encoding="utf-8")
    for name in SMOKE:
        if name != options.only and (options.only or name in ON_DEMAND):
            continue
        folder = options.runs / name
        short = SMOKE[name] if options.smoke else []
        config, short = (short, []) if isinstance(short, str) else (f"compare/{name}", short)
        main(["compare", config, f"--run_dir={folder}", *short, *options.rest])
        text = spliced(text, name, write_tables(section(folder, name, out), name, out))
    page.write_text(text, encoding="utf-8")
    return page


def section(folder: Path, name: str, out: Path) -> str:
    """A comparison's figures and tables for its page; copies the figures."""
    report = (folder / "report.md").read_text(encoding="utf-8")
    body = report.partition("\n\n")[2].partition("\n![")[0].strip()
    pictures = []
    for figure in FIGURES:
        if (folder / figure).exists():
            shutil.copy(folder / figure, out / "results" / f"{name}_{figure}")
            pictures.append(f"![{name}: {figure.partition('.')[0]}]({name}_{figure})")
    shutil.copy(folder / "report.json", out / "results" / f"{name}.json")
    if name not in EXACT:
        store_curves(folder / "curves.csv", out / "results" / f"{name}_curves.csv.gz")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    measured = f"Measured on {machine()}, one thread per run, {today}."
    return "\n\n".join([measured, *pictures, body, *answers(folder)])


def write_tables(content: str, name: str, out: Path) -> str:
    """Write the page of a comparison; returns the text for the summary that leads to it."""
    # headings below the title of a page of its own
    body = re.sub(r"^####(?= )", "##", content, flags=re.MULTILINE)
    page = f"# {TITLES[name]}: tables\n\nThe summary is on the page [Results](../results.md).\n\n{body}\n"
    (out / "results" / f"{name}.md").write_text(page, encoding="utf-8")
    measured = content.partition("\n\n")[0]
    figure = re.search(r"^(!\[.*\])\((.*)\)$", content, re.MULTILINE)
    shown = [] if figure is None else [f"{figure[1]}(results/{figure[2]})"]
    return "\n\n".join([*shown, f"[All tables and figures](results/{name}.md). {measured}"])


def store_curves(table: Path, path: Path) -> None:
    """Write setting, arm, seed, labels, reward, KL and J of all evaluations, to six digits, compressed."""
    text = io.StringIO()
    with table.open(newline="", encoding="utf-8") as file:
        writer = csv.writer(text)
        names, figures = ("setting", "arm", "seed", "labels"), ("reward", "kl", "j")
        writer.writerow((*names, *figures))
        for row in csv.DictReader(file):
            writer.writerow([*(row[name] for name in names), *(f"{float(row[name]):.6g}" for name in figures)])
    # no date inside: the same curves give the same file
    path.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))


def answers(folder: Path) -> list[str]:
    """A table of each arm's first held-out answer with the first seed, before and after; none if runs wrote none."""
    found: dict[tuple[str, str], tuple[int, list[str]]] = {}
    for cell in folder.glob("cells/*/*/*/cell.json"):
        identity, table = read_cell(cell)[1], cell.parent / "completions.md"
        # stages that arms share belong to none of them
        arm = (identity.get("setting", ""), identity.get("arm") or "")
        if table.exists() and all(arm) and identity["seed"] <= found.get(arm, (identity["seed"], []))[0]:
            found[arm] = identity["seed"], table.read_text(encoding="utf-8").splitlines()
    if not found:
        return []
    head, rule, *_ = next(iter(found.values()))[1]
    rows = [f"| {setting} | {arm} {lines[2]}" for (setting, arm), (_, lines) in sorted(found.items())]
    return ["#### Answers", "\n".join([f"| setting | arm {head}", f"| --- | --- {rule}", *rows])]


def spliced(text: str, name: str, content: str) -> str:
    """Put content between the markers of a name.

    Raises:
        ValueError: if the page lacks the markers.
    """
    pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{PAGE} has no markers <!-- begin {name} --> and <!-- end {name} -->; put them back")
    return pattern.sub(lambda found: f"{found[1]}\n{content}\n\n{found[2]}", text)


if __name__ == "__main__":
    print(f"wrote {run(sys.argv[1:])}")
