"""``lightning-rlhf label``: have existing pairs labeled, and say how good the labels are; no policy is involved."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

import torch
from tqdm.auto import tqdm

from lightning_rlhf.collectors.preferences import RoundCollector
from lightning_rlhf.collectors.progress import Bar
from lightning_rlhf.commands.export import Rows, check_target, export_ledger
from lightning_rlhf.evaluation.benchmarks import rewardbench_sections, subset_accuracies
from lightning_rlhf.evaluation.feedback import Feedback, feedback_lines, feedback_summary
from lightning_rlhf.evaluation.judges import JudgeMetrics
from lightning_rlhf.evaluation.report import (
    counted,
    judge_lines,
    judge_rows,
    markdown_table,
    percent,
    to_json,
    write_whole,
)
from lightning_rlhf.labelers.base import AbstractLabeler
from lightning_rlhf.labelers.recorded import recorded_probability
from lightning_rlhf.labelers.spread import SpreadLabeler
from lightning_rlhf.ledger.same_run import check_same_settings
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.losses.preference import reward_accuracy
from lightning_rlhf.prompts.base import AbstractPromptSource
from lightning_rlhf.prompts.text import text_prompts
from lightning_rlhf.randomness import Key
from lightning_rlhf.runtime.executors import one_thread
from lightning_rlhf.runtime.fingerprint import FREE_OF_SERVERS, described
from lightning_rlhf.samplers.offline import OfflineSampler
from lightning_rlhf.types import Comparison, Label, Prompt


PAGE = 1024
"""Pairs that are written to the ledger, or read for the report, at once."""


class LabelReport(TypedDict):
    """How far the labels of a run are, and how good.

    Attributes:
        pairs: pairs of the data.
        labelled: pairs with a label.
        ties: pairs of equal responses, which no labeler judges.
        failed: pairs without a label, by status.
        attempts: labels asked for.
        cost: their cost, in the unit of the labeler.
        bought_now: labels bought in the last call.
        seconds: time of the last call.
        left_out: rows that the source left out, by reason.
        figures: metrics of `JudgeMetrics`.
        subsets: result of `subset_accuracies`, by the names of parts of the data (`PromptRow.subset`).
        sections: result of `rewardbench_sections`.
        feedback: where the labels come from.
    """

    pairs: int
    labelled: int
    ties: int
    failed: dict[str, int]
    attempts: int
    cost: float
    bought_now: int
    seconds: float
    left_out: dict[str, int]
    feedback: Feedback
    figures: dict[str, float]
    subsets: dict[str, dict[str, float]]
    sections: dict[str, float]


class LabelRun:
    """Labels existing pairs, into a ledger, and reports how good the labels are.

    Calling the same command again continues: labels in the ledger are not asked for again. Which response of a pair is
    shown first is a fair coin, so that a preference for the first position cannot look like skill.

    Args:
        pairs: where the pairs come from: `DatasetPrompts`, `HHPrompts`, `LedgerPrompts`, or your own source.
        labeler: who says which response is better.
        run_dir: folder for the ledger and the report.
        out: also write the labeled pairs to this file (.jsonl or .parquet), as rows that TRL and `DatasetPrompts`
            read.
        rows: rows of ``out``: ``plain`` texts, ``conversational`` messages, or ``auto``.
        recorded_labels: whether the data say which response people prefer; false for pairs in an arbitrary
            order.
        label_attempts: times that a pair is shown to the labeler until it is given up, >= 1; a later call may raise it.
        chunk: pairs that are given to the labeler at once, >= 1; their labels are durable when it returns them.
        seed: seed of the order in which responses are shown, and of the labeler.
        processes: processes of this machine that label chunks at the same time, >= 1; or an executor that spreads them,
            such as `RayExecutor`, or another subclass of `concurrent.futures.Executor`. Default: this process alone.
    """

    def __init__(
        self,
        pairs: AbstractPromptSource,
        labeler: AbstractLabeler,
        run_dir: str = "runs/label",
        out: str | None = None,
        rows: Rows = "auto",
        recorded_labels: bool = True,
        label_attempts: int = 1,
        chunk: int = 64,
        seed: int = 0,
        processes: int | Executor | None = None,
    ) -> None:
        # 0 attempts or pairs would label nothing and report success
        for name, value in (("label_attempts", label_attempts), ("chunk", chunk), ("processes", processes)):
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        self.source, self.labeler, self.run_dir = pairs, labeler, Path(run_dir)
        self.out, self.rows, self.recorded_labels = out, rows, recorded_labels
        self.label_attempts, self.chunk, self.seed, self.processes = label_attempts, chunk, seed, processes

    @property
    def ledger(self) -> Path:
        """Path of the ledger."""
        return self.run_dir / "ledger.sqlite"

    def run(self, settings: Mapping[str, object] | None = None) -> LabelReport:
        """Label pairs without a label, write the report, print a summary, and return the report.

        Args:
            settings: settings that a continued run must share with the ledger, plain JSON; default: those of the
                objects.

        Raises:
            ValueError: if a row has no pair, or the ledger is of other data or settings.
        """
        if self.out is not None:
            check_target(str(self.ledger), self.out)  # before anything is paid for
        prompts, subsets = self._load()
        with PreferenceStore(self.ledger) as store:
            # a continued run must show the pairs in the same order, so the seed counts
            decisive = {"command": "label", "seed": self.seed, "recorded_labels": self.recorded_labels}
            objects = {"labeler": described(self.labeler)} if settings is None else settings
            check_same_settings(store, {**decisive, **objects}, {"pairs", *FREE_OF_SERVERS})
            check_same_pairs(store, prompts)
            with self._spread() as labeler:
                collector = RoundCollector(
                    store,
                    OfflineSampler(),
                    labeler,
                    Key((self.seed,)),
                    label_attempts=self.label_attempts,
                    progress=progress_bar,
                )
                collector.sample(0, prompts, None, PAGE)
                # the rate counts labels, not the reading of the data
                start = time.perf_counter()
                bought = collector.label(0, self.chunk)
                seconds = time.perf_counter() - start
            report = label_report(store, self.source.report, bought, seconds, subsets)
        self._write(report, settings or {})
        return report

    @contextmanager
    def _spread(self) -> Iterator[AbstractLabeler]:
        """The labeler, in the processes that it runs in."""
        if self.processes is None:
            yield self.labeler
        elif isinstance(self.processes, Executor):
            yield SpreadLabeler(self.labeler, self.processes, self.chunk)
        else:
            # started by the first chunk: a fork of this process would have its threads and its ledger
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["lightning_rlhf.labelers.spread"])
            with one_thread(), ProcessPoolExecutor(self.processes, mp_context=context) as pool:
                yield SpreadLabeler(self.labeler, pool, self.chunk)

    def _load(self) -> tuple[list[Prompt], list[str]]:
        """The pairs, and the part of the data that each belongs to."""
        rows = self.source.load()
        for row in rows:
            # named now, before labels are paid for
            if row.pair is None or row.is_single:
                raise ValueError(
                    f"{row.source}: has no pair of responses to label; give rows with 'chosen' and 'rejected', or name "
                    f"their columns, e.g. --pairs.chosen_column=a --pairs.rejected_column=b"
                )
        prompts = text_prompts(rows)
        if not self.recorded_labels:
            # in an arbitrary order the recorded label is no human choice
            prompts = [replace(prompt, recorded=None) for prompt in prompts]
        return prompts, [row.subset for row in rows]

    def _write(self, report: LabelReport, settings: Mapping[str, object]) -> None:
        lines = label_lines(report)
        write_whole(self.run_dir / "report.json", to_json({**report, "settings": settings}))
        text = f"# Labels\n\n{lines[0]}.\n\n{markdown_table(judge_rows(report['figures']))}"
        if report["subsets"]:
            text += f"\n## By subset\n\n{markdown_table(subset_rows(report))}"
        if report["left_out"]:
            text += f"\nRows left out: {counted(report['left_out'])}.\n"
        write_whole(self.run_dir / "report.md", text)
        print(*lines, sep="\n", flush=True)
        # `export_ledger` refuses a ledger without labels
        if self.out is not None and report["labelled"]:
            print(f"wrote {export_ledger(str(self.ledger), self.out, rows=self.rows)} rows to {self.out}", flush=True)


def check_same_pairs(store: PreferenceStore, prompts: list[Prompt]) -> None:
    """Compare the pairs of round 0 with those that are to be labeled now.

    Raises:
        ValueError: if one of them is another, or the ledger has more of them.
    """
    for _, position, comparison, _ in store.walk([0]):
        # a smaller data set would silently report on pairs that are not in it
        if position >= len(prompts):
            raise ValueError(
                f"ledger {store.path} holds more than the {len(prompts)} pairs of the data: a run may grow, not "
                f"shrink; raise the limit again, or use another run_dir"
            )
        # labels belong to the pair at the position, so it must be the same pair
        if comparison.prompt != prompts[position]:
            raise ValueError(
                f"pair {position + 1} of the data is not the one that ledger {store.path} holds there (it begins "
                f"{comparison.prompt.text[:60]!r}, now {prompts[position].text[:60]!r}): the data or their order "
                f"changed since the run started; restore them, or use another run_dir"
            )


def label_report(
    store: PreferenceStore, left_out: Mapping[str, int], bought: int, seconds: float, subsets: Sequence[str]
) -> LabelReport:
    """Summarize round 0 of a ledger of recorded pairs.

    Args:
        store: the ledger.
        left_out: rows that the source left out, by reason.
        bought: labels bought in this call.
        seconds: time that took.
        subsets: part of the data that each pair belongs to, in the order of the data.
    """
    metric = JudgeMetrics()
    rows = store.comparisons(0)
    decided = [
        (label.probability, human_probability(comparison), subset)
        for (_, comparison, label), subset in zip(rows, subsets, strict=True)
        # a free tie is no verdict of the labeler
        if label is not None and label.probability is not None and not label.is_free_tie
    ]
    judged = [(stated, human, subset) for stated, human, subset in decided if not math.isnan(human)]
    stated, human = (torch.tensor([pair[place] for pair in judged], dtype=torch.float64) for place in (0, 1))
    accuracies = subset_accuracies(reward_accuracy(stated - 0.5, human).tolist(), [subset for *_, subset in judged])
    # page by page: texts of all pairs need not fit into memory
    for start in range(0, len(rows), PAGE):
        update(metric, last_answers(store, rows[start : start + PAGE]))
    figures = {name: value.item() for name, value in metric.compute().items()}
    return {
        "pairs": len(rows),
        "labelled": store.num_labels,
        "ties": store.count_ties(),
        "failed": store.failed(0),
        "attempts": store.num_attempts,
        "cost": store.total_cost,
        "bought_now": bought,
        "seconds": seconds,
        "left_out": {reason: count for reason, count in left_out.items() if count},
        "figures": figures,
        "subsets": accuracies,
        "sections": rewardbench_sections(accuracies),
        "feedback": feedback_summary(store),
    }


def last_answers(
    store: PreferenceStore, rows: Sequence[tuple[int, Comparison, Label | None]]
) -> list[tuple[Comparison, Label]]:
    """Comparisons and their labels, or their last failed attempts; those that nobody has answered are left out."""
    found = []
    for identity, comparison, label in rows:
        # a failed attempt still counts for position and mass; people may not have answered yet
        answers = [label] if label is not None else store.history(identity)
        if answers:
            found.append((comparison, answers[-1]))
    return found


def update(metric: JudgeMetrics, judged: Sequence[tuple[Comparison, Label]]) -> None:
    """Give comparisons and their last labels, failed ones too, to a metric; lengths are characters.

    Free ties are left out: the labeler has not seen them.
    """
    # a free tie is no verdict of the labeler
    judged = [(comparison, label) for comparison, label in judged if not label.is_free_tie]
    comparisons, labels = [comparison for comparison, _ in judged], [label for _, label in judged]
    metric.update(
        torch.tensor([float("nan") if x.probability is None else x.probability for x in labels], dtype=torch.float64),
        torch.tensor([human_probability(c) for c in comparisons], dtype=torch.float64),
        # if all pairs are free ties the list is empty, and its shape [0] must become [0, 2]
        torch.tensor([[len(c.a.text), len(c.b.text)] for c in comparisons]).view(-1, 2),
        *(_noted(labels, name) for name in ("first_forward", "first_reverse", "mass")),
    )


def human_probability(comparison: Comparison) -> float:
    """P(a preferred) by the data; NaN if they do not say."""
    return float("nan") if comparison.prompt.recorded is None else recorded_probability(comparison)


def _noted(labels: list[Label], name: str) -> torch.Tensor:
    return torch.tensor([label.meta.get(name, float("nan")) for label in labels], dtype=torch.float64)


def label_lines(report: LabelReport) -> list[str]:
    """A report as a few lines for the terminal."""
    ties = report.get("ties", 0)
    missing = report["pairs"] - report["labelled"] - ties
    failed = f"; without a label {missing}: {counted(report['failed'])}" if missing else ""
    free = f"; free ties (equal responses) {ties}" if ties else ""
    speed = f", {report['bought_now'] / report['seconds']:.3g} per second" if report["bought_now"] else ""
    first = (
        f"labeled {report['labelled']} of {report['pairs']} pairs in {report['attempts']} attempts, "
        f"cost {report['cost']:.6g}{failed}{free}; {report['bought_now']} in this call{speed}"
    )
    lines = [first, *feedback_lines(report["feedback"]), *judge_lines(report["figures"])]
    if report["sections"]:
        lines.append(", ".join(f"{name} {100 * value:.1f} %" for name, value in report["sections"].items()))
    return lines


def subset_rows(report: LabelReport) -> list[tuple[str, str, str]]:
    """Accuracies by subset and section in words."""
    rows = [
        (name, percent(found, "accuracy"), f"{found['pairs']:.0f} pairs") for name, found in report["subsets"].items()
    ]
    sections = [(f"**{name}**", f"{100 * value:.1f} %", "RewardBench") for name, value in report["sections"].items()]
    return [*rows, *sections]


def progress_bar(description: str, total: int) -> AbstractContextManager[Bar]:
    """A progress bar on standard error; silent where that is no terminal."""
    bar: AbstractContextManager[Bar] = tqdm(
        total=total, desc=description.rpartition(": ")[2], unit="pair", disable=None, smoothing=0.05
    )
    return bar
